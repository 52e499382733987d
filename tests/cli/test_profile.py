"""This module checks `octavo profile` from its flags to its files. It does not know how anything is measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.engine.tools.profile import steps
from octavo.kernels import use_backend

from .conftest import Run

KERNELS = ("profile", "kernels", "--no-compile", "--only", "norm")
STEP = ("profile", "step", "--load-format", "dummy", "--kv-cache-tokens", "2048", "--batch-size", "1,3")
SMALL = ("--input-len", "9", "--output-len", "3", "--rounds", "2", "--device", "cpu", "--backend", "torch")


@pytest.fixture(autouse=True)
def _torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


def test_kernels_show_their_calls_without_running_any(octavo: Run, tmp_path: Path) -> None:
    ran = octavo(*KERNELS, "--no-time", "--html", tmp_path / "page.html", "--json", tmp_path / "out.json")
    assert (ran.status, ran.err) == (0, "")
    assert "rms_norm, 64 tokens" in ran.out
    assert "data sheet" in ran.out
    document = json.loads((tmp_path / "out.json").read_text())
    assert [call["seconds"] for call in document["calls"]] == [None, None]
    assert document["about"]["model"] == "llama-3-8b"
    assert "Nothing was timed" in (tmp_path / "page.html").read_text()


def test_kernels_are_timed_beside_an_earlier_run(octavo: Run, tmp_path: Path) -> None:
    words = (*KERNELS, "--geometry", "smollm2-135m", "--time", "--rounds", "3", "-q")
    for name in ("first", "second"):
        assert octavo(*words, "--json", tmp_path / f"{name}.json").status == 0
    # As if it had been a thousand times faster: no noise is so large.
    for name in ("first", "second"):
        old = json.loads((tmp_path / f"{name}.json").read_text())
        for metric in old["metrics"].values():
            metric["values"] = [value / 1000 for value in metric["values"]]
        (tmp_path / f"{name}.json").write_text(json.dumps(old))
    history = ("--history", tmp_path / "first.json", tmp_path / "second.json")
    ran = octavo(*words, *history, "--html", tmp_path / "page.html", "--json", "-")
    assert ran.status == 1
    assert ran.err.count("worse: rms_norm") == 2
    assert json.loads(ran.out)["about"]["backend"] == "torch"
    assert re.search(r"first</text>.*second</text>", (tmp_path / "page.html").read_text())


def test_steps_are_taken_apart(octavo: Run, model_folder: Path, tmp_path: Path) -> None:
    files = ("--html", tmp_path / "page.html", "--json", tmp_path / "out.json", "--trace", tmp_path / "trace.json")
    ran = octavo(*STEP, model_folder, *SMALL, *files, "-q")
    assert (ran.status, ran.err) == (0, "")
    assert "decode, batch of 3" in ran.out
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["about"]["load"] == {"batch_sizes": [1, 3], "input_len": 9, "output_len": 3}
    assert len(document["steps"]) == 2 * 2 * 3
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "decode, batch of 3" in (tmp_path / "page.html").read_text()
    again = octavo(*STEP, model_folder, *SMALL, "--history", tmp_path / "out.json", "-q")
    assert "is no JSON" not in again.err
    assert again.status in (0, 1)  # a machine may be busier now


def test_a_model_may_be_a_config_alone_even_beside_a_history(octavo: Run, model_folder: Path, tmp_path: Path) -> None:
    words = (*KERNELS, model_folder / "config.json", "--json", tmp_path / "out.json")
    assert octavo(*words).status == 0
    ran = octavo(*words, "--history", tmp_path / "out.json", tmp_path / "out.json")
    assert (ran.status, ran.err) == (0, "nothing is worse than in out, out\n")
    sizes = json.loads((tmp_path / "out.json").read_text())["about"]["sizes"]
    assert (sizes["hidden_size"], sizes["vocab_size"], sizes["dtype"]) == (32, 264, "float32")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("kernels", "--target", "sm_75"), "--target is 'sm_75'; allowed: sm_80, "),
        (("kernels", "--geometry", "llama-9"), "--geometry: unknown model 'llama-9'; known: llama-3-8b"),
        (("kernels", "smollm2-135m", "--geometry", "gpt2"), "both given"),
        (("kernels", "a", "b"), "two models are named"),
        (("kernels", "--block-size", "64,x"), "--block-size is '64,x'; allowed: integers above 0"),
        (("kernels", "--no-compile", "--block-size", "64,48"), "--block-size is 48; allowed: 16, 32, 64, 128"),
        (("kernels", "--no-compile", "--only", "zzz"), "--only is zzz; no op of these calls has such a name"),
        (("kernels", "--no-compile", "--html", "."), "--html .: is a folder"),
        (("kernels", "--kv-cache", "int4"), "--kv-cache is 'int4'; allowed: auto, int8, e4m3"),
        (("kernels", "--no-compile", "--html", "no/where.html"), "there is no folder no"),
        (("kernels", "--no-compile", "--history", "missing.json"), "--history missing.json: No such file"),
        (("kernels", "--rounds", "0"), "--rounds is 0"),
        (("kernels", "--workers", "0"), "--workers is 0"),
        (("step", "--batch-size", "0"), "--batch-size is '0'"),
        (("step", "--input-len", "0"), "--input-len is 0"),
        (("step", "m", "--model", "n"), "the model is given twice"),
    ],
)
def test_mistakes_are_named_before_anything_runs(octavo: Run, words: tuple[str, ...], says: str) -> None:
    ran = octavo("profile", *words)
    assert ran.status == 2
    assert says in ran.err
    assert "Traceback" not in ran.err


def test_a_history_of_something_else_is_refused_before_anything_runs(
    octavo: Run, model_folder: Path, tmp_path: Path
) -> None:
    old: dict[str, Any] = {"format": "octavo profile kernels 1", "metrics": {}, "about": {}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    ran = octavo(*STEP, model_folder, *SMALL, "--history", tmp_path / "old.json", "-q")
    assert (ran.status, "is no JSON of octavo profile step 1" in ran.err) == (2, True)


def test_a_history_of_another_load_is_refused_before_anything_runs(
    octavo: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert octavo(*STEP, model_folder, *SMALL, "--json", tmp_path / "old.json", "-q").status == 0
    monkeypatch.delattr(steps.StepProfile, "run_round")
    ran = octavo(*STEP, model_folder, *SMALL, "--output-len", "4", "--history", tmp_path / "old.json", "-q")
    assert (ran.status, ran.out) == (2, "")
    assert "its load is {'batch_sizes': [1, 3], 'input_len': 9, 'output_len': 3}, of this run" in ran.err


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 6), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120")],
)
def test_a_gpu_that_is_no_target_has_the_nearest_older_one(
    capability: tuple[int, int], target: str, octavo: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    ran = octavo(*KERNELS, "--no-time", "--json", "-")
    assert json.loads(ran.out)["about"]["targets"] == [target]
