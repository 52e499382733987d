"""The orchestration of the suite for machines with a GPU, where there is none: made-up children, and one real run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .gpu_benchmarks import IDENTITY, MACHINE, RATES, ROOT, RUN, load

TIMED = ("step", "bench", "engines", "kv", "memory", "loading")
SUITE = ROOT / "scripts" / "gpu_suite.py"
children, store = load("gpu.children", "gpu.store")


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, on a machine with a GPU that nobody touches."""
    spec = importlib.util.spec_from_file_location("gpu_suite", SUITE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_suite", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "probe", lambda: MACHINE)
    monkeypatch.setattr(module, "source_hash", lambda *_: "abc")  # whoever edits a file between two runs
    monkeypatch.setattr(module, "prepare_environment", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # which it sets, put back after
    return module


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return `make_job(**cases)`: a child whose cases are lines of Python."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))

    def make(timeout_s: float = 1.0, before: str = "", **bodies: str) -> Any:
        text = "import argparse, os, time\nfrom gpu.lines import Lines, NotRunError\n" + before + "\n"
        for name, body in bodies.items():
            text += f"def {name}():\n" + textwrap.indent(body, "    ") + "\n"
        text += "parser = argparse.ArgumentParser()\nLines.add_options(parser)\n"
        text += "Lines.from_options(parser.parse_args()).run({%s})\n" % ", ".join(f"{n!r}: {n}" for n in bodies)  # noqa: UP031
        path = tmp_path / "child.py"
        path.write_text(text)
        return children.Job("job", [sys.executable, str(path)], case_timeout_s=timeout_s)

    return make


def follow(job: Any, finished: tuple[str, ...] = (), seconds: float = 60.0) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    left = children.run_job(job, found.__setitem__, finished, time.monotonic() + seconds)
    return found, left


def test_a_case_that_crashes_or_hangs_costs_only_itself(make_job: Callable[..., Any]) -> None:
    found, left = follow(
        make_job(
            good="return {'value': 3}",
            wrong="assert False, 'off by one'",
            broken="raise KeyError('x')",
            dead="print('last words', flush=True)\nos._exit(11)",
            stuck="time.sleep(60)",
            elsewhere="raise NotRunError('no room')",
            last="return {'status': 'measured'}",
        )
    )
    assert {name: facts["status"] for name, facts in found.items()} == {
        "good": "passed",
        "wrong": "failed",
        "broken": "failed",
        "dead": "crashed",
        "stuck": "timed out",
        "elsewhere": "not run",
        "last": "measured",
    }
    assert found["good"]["value"] == 3
    assert found["wrong"]["reason"] == "off by one"
    assert "last words" in found["dead"]["output"]
    assert left == 0


BROKEN = """
import sys, types

def give_back():
    if was_broken:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

was_broken = []
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: None, empty_cache=give_back)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
"""


def test_what_a_measured_case_has_broken_costs_the_next_one_nothing(make_job: Callable[..., Any]) -> None:
    told = "return {'status': 'measured', 'process': os.getpid()}"
    found, left = follow(make_job(30, BROKEN, a=f"was_broken.append(1)\n{told}", b=told, c=told))
    assert (left, [facts["status"] for facts in found.values()]) == (0, ["measured"] * 3)
    assert found["a"]["process"] != found["b"]["process"] == found["c"]["process"]


def test_time_runs_out(make_job: Callable[..., Any]) -> None:
    found, left = follow(make_job(60, a="return {}", b="time.sleep(60)", c="return {}"), seconds=1.0)
    assert (list(found), left) == (["a"], 2)


def test_finished_cases_are_not_run_again(make_job: Callable[..., Any]) -> None:
    found, _ = follow(make_job(a="os._exit(1)", b="return {}"), finished=("a",))
    assert list(found) == ["b"]


def test_a_child_that_cannot_start(make_job: Callable[..., Any]) -> None:
    found, _ = follow(make_job(before="raise ValueError('no such option')", a="return {}"))
    assert found["job"]["status"] == "crashed"
    assert "no such option" in found["job"]["output"]
    found, _ = follow(make_job(before="import not_there_at_all", a="return {}"))
    assert found["job"] == {"status": "not run", "reason": "needs the package not_there_at_all"}


def test_a_child_that_tells_nothing() -> None:
    def job(code: str, **options: Any) -> Any:
        return children.Job("it", [sys.executable, "-c", code], tells=False, **options)

    assert follow(job("pass"))[0] == {"it": {"status": "passed"}}
    assert follow(job("raise SystemExit(9)"))[0]["it"]["reason"] == "exit status 9"
    assert follow(job("pass", collect=lambda: {"row": {"status": "measured"}}))[0] == {"row": {"status": "measured"}}
    assert follow(job("raise SystemExit(9)"), finished=("it",))[0] == {}


def test_tests_tell_of_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 0, 'planted'\n"
        "def test_c(): os._exit(4)\n"
        "def test_e(): import not_there_at_all\n"
        "@pytest.mark.parametrize('backend', ['torch', 'triton'])\n"
        "def test_d(backend): pytest.skip('not now')\n"
    )
    argv = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "gpu.pytest_lines",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    found, _ = follow(children.Job("tests", [*argv, "--rootdir", str(tmp_path)], case_timeout_s=30))
    outcomes = {name.partition("::")[2]: facts["status"] for name, facts in found.items()}
    skipped = {"test_d[triton]": "not run", "test_e": "not run"}
    assert outcomes == {"test_a": "passed", "test_b": "failed", "test_c": "crashed"} | skipped
    assert "planted" in found["test_it.py::test_b"]["reason"]
    found, _ = follow(children.Job("tests", [*argv, "--rootdir", str(tmp_path), "--shard", "1/5"], case_timeout_s=30))
    assert list(found) == ["test_it.py::test_a"]


def test_results_survive_and_resume(tmp_path: Path) -> None:
    path = tmp_path / "out" / "suite.json"
    first = store.Store(path, RUN)
    first.add("tests", "a", {"status": "passed"})
    first.add("tests", "b", {"status": "crashed"})
    first.add("tests", "d", {"status": "predicted"})
    first.add("bench", "c", {"status": "measured", "us": 1.0})
    first.close("bench", "done", None, 2.0)
    first.close("tests", "partial", "no time", 1.0)
    assert json.loads(path.read_text()) == first.data
    assert [each.name for each in path.parent.iterdir()] == ["suite.json"]
    second = store.Store(path, RUN, resume=True)
    assert (second.finished("tests"), second.is_done("tests")) == (["a", "d"], False)
    assert (second.finished("bench"), second.is_done("bench")) == (["c"], True)
    second.add("bench", "peer", {"status": "not run", "reason": "needs the package x"})
    second.save()
    assert not store.Store(path, RUN, resume=True).is_done("bench"), "the package may have been brought"
    other = store.Store(path, RUN | {"identity": IDENTITY | {"source": "def"}}, resume=True)
    assert other.data["sections"] == {}
    assert other.put_aside == path.with_name("suite-2026-01-02T030405Z.json")
    assert json.loads(other.put_aside.read_text())["sections"]["bench"]["cases"].keys() == {"c"}


def test_a_smaller_run_is_no_reason_to_leave_a_larger_one_out(tmp_path: Path) -> None:
    path, by_level = tmp_path / "suite.json", ["tests"]
    quick, full = (RUN | {"level": level} for level in ("quick", "full"))
    first = store.Store(path, quick, by_level=by_level)
    for section in ("tests", "bench"):
        first.add(section, "a", {"status": "passed"})
        first.close(section, "done", None, 1.0)
    again = store.Store(path, quick, resume=True, by_level=by_level)
    assert (again.is_done("tests"), again.finished("tests")) == (True, ["a"])
    larger = store.Store(path, full, resume=True, by_level=by_level)
    assert not larger.is_done("tests")
    assert not larger.is_done("bench"), "there are more of them"
    assert (larger.finished("tests"), larger.finished("bench")) == ([], ["a"])
    assert list(larger.cases("tests")) == ["a"], "what was found is kept until it is found anew"
    larger.add("tests", "a", {"status": "passed"})
    larger.close("tests", "done", None, 1.0)
    assert store.Store(path, full, resume=True, by_level=by_level).is_done("tests")


def test_sources_have_a_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    before = store.source_hash(tmp_path, ["a"])
    assert before == store.source_hash(tmp_path, ["a"])
    (tmp_path / "a" / "x.py").write_text("2")
    assert before != (changed := store.source_hash(tmp_path, ["a"]))
    (tmp_path / "a" / "tuned").mkdir()
    (tmp_path / "a" / "tuned" / "sm_90.json").write_text("{}")
    assert changed != store.source_hash(tmp_path, ["a"]), "launch settings decide how long a kernel takes"


def sections(suite: ModuleType, make_job: Callable[..., Any], **bodies: dict[str, str]) -> dict[str, Any]:
    def section(cases: dict[str, str]) -> Any:
        return suite.Section(lambda _: [make_job(30, **cases)])

    return {name: section(cases) for name, cases in bodies.items()}


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "suite.json").read_text())
    return found


def test_sections_in_order_within_a_budget(
    suite: ModuleType, make_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"one": "return {}", "two": "time.sleep(60)"}
    fake = sections(suite, make_job, static={"a": "return {}"}, tests=slow, bench={"b": "return {}"})
    monkeypatch.setattr(suite, "SECTIONS", fake)
    monkeypatch.setattr(suite, "RESERVE_S", 0.5)
    out = tmp_path / "out"
    assert suite.main(["--out", str(out), "--budget-s", "3"]) == 0
    found = read(out)["sections"]
    assert [(name, part["status"]) for name, part in found.items()] == [
        ("static", "done"),
        ("tests", "partial"),
        ("bench", "not run"),
    ]
    assert (list(found["tests"]["cases"]), found["bench"]["reason"]) == (["one"], "no time left")
    assert "Roofline" in (out / "suite.html").read_text()

    fake["tests"] = sections(suite, make_job, tests={"one": "os._exit(1)", "two": "assert 0"})["tests"]
    assert suite.main(["--out", str(out), "--resume"]) == 1
    found = read(out)["sections"]
    assert [part["status"] for part in found.values()] == ["done", "done", "done"]
    assert {name: facts["status"] for name, facts in found["tests"]["cases"].items()} == {
        "one": "passed",
        "two": "failed",
    }
    assert suite.main(["--out", str(out), "--resume", "--only", "static"]) == 1, "an old failure is a failure"


def test_what_another_machine_lacks_is_done_again(
    suite: ModuleType, make_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"it": "return {'status': 'measured', 'at': time.time_ns()}"}
    fake = sections(suite, make_job, ceilings=body, loading=body)
    fake["ceilings"] = suite.Section(fake["ceilings"].jobs, again=True)
    monkeypatch.setattr(suite, "SECTIONS", fake)
    found = []
    for _ in range(2):
        assert suite.main(["--out", str(tmp_path), "--resume"]) == 0
        found.append({name: part["cases"]["it"]["at"] for name, part in read(tmp_path)["sections"].items()})
    assert {name for name, at in found[0].items() if at == found[1][name]} == {"loading"}


def test_results_outlive_their_page(
    suite: ModuleType, make_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("bench", "step")
    monkeypatch.setattr(suite, "SECTIONS", sections(suite, make_job, **{n: {"a": "return {}"} for n in names}))
    monkeypatch.setattr(suite, "make_page", lambda data: data["no such thing"])
    assert suite.main(["--out", str(tmp_path)]) == 0
    assert [part["status"] for part in read(tmp_path)["sections"].values()] == ["done", "done"]


def test_only_and_skip(suite: ModuleType, make_job: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    names = ("static", "tests", "bench")
    monkeypatch.setattr(suite, "SECTIONS", sections(suite, make_job, **{n: {"a": "return {}"} for n in names}))
    assert suite.main(["--out", str(tmp_path), "--only", "static,bench", "--skip", "bench"]) == 0
    statuses = [part["status"] for part in read(tmp_path)["sections"].values()]
    assert statuses == ["done", "not run", "not run"]
    with pytest.raises(SystemExit):
        suite.main(["--only", "everything"])


def test_a_section_that_cannot_be_prepared(suite: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    def jobs(reason: Exception) -> Any:
        def raising(_: Any) -> Any:
            raise reason

        return suite.Section(raising)

    fake = {"tests": jobs(KeyError("x")), "sanitizer": jobs(suite.NotRunError("not installed"))}
    monkeypatch.setattr(suite, "SECTIONS", fake)
    assert suite.main(["--out", str(tmp_path)]) == 1
    found = read(tmp_path)["sections"]
    assert "KeyError" in found["tests"]["cases"]["tests"]["reason"]
    assert found["sanitizer"]["reason"] == "not installed"


def test_every_section_names_what_is_there(suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of all sections: modules and tests exist, and their options are known."""
    collected = tmp_path / "collected"
    plan = [f"tests/kernels/test_norm.py::test_{i}" for i in range(130)]
    collected.write_text(json.dumps({"plan": plan}) + "\n")
    monkeypatch.setattr(suite.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/bin/compute-sanitizer")
    args = suite.parse(["--full", "--model", "m"])
    results = store.Store(tmp_path / "suite.json", RUN)
    results.add("ceilings", "copy", {"status": "measured", **RATES})
    context = suite.Context(args, MACHINE, results, tmp_path, time.monotonic() + 60)
    sections = {name: section for name, section in suite.SECTIONS.items() if name != "tune" or suite_tunes()}
    jobs = [job for section in sections.values() for job in section.jobs(context)]
    assert all(job.case_timeout_s <= suite.SECTION_S for name in TIMED for job in suite.SECTIONS[name].jobs(context))
    modules = {job.argv[job.argv.index("-m") + 1] for job in jobs if "-m" in job.argv}
    paths = [word for job in jobs for word in job.argv if word.startswith("tests/")]
    assert {"gpu.ceilings", "gpu.compiling", "gpu.kernels", "gpu.bits", "gpu.sanitized", "gpu.engines"} < modules
    assert {"gpu.floors", "gpu.steps", "gpu.kv", "gpu.memory", "gpu.loading", "side_by_side"} < modules
    load(*(name for name in modules if name.startswith("gpu.") and name != "gpu.engines"))
    assert paths.count("tests/kernels/test_norm.py") == 3
    assert all((ROOT / path).exists() for path in paths)
    assert not any("aot" in path for path in paths)


def suite_tunes() -> bool:
    """Whether there is what the section "tune" runs; without it, it says so."""
    return (ROOT / "scripts" / "tune.py").exists()


def test_a_section_has_an_end_of_its_own(
    suite: ModuleType, make_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"one": "return {}", "two": "time.sleep(60)"}
    monkeypatch.setattr(suite, "SECTIONS", sections(suite, make_job, tests=slow))
    monkeypatch.setattr(suite, "SECTION_S", 1.5)
    assert suite.main(["--out", str(tmp_path), "--budget-s", "300"]) == 0
    part = read(tmp_path)["sections"]["tests"]
    assert (part["status"], list(part["cases"])) == ("partial", ["one"])


def run_here(folder: Path, *options: str) -> dict[str, Any]:
    """Run the script on this machine."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    argv = [sys.executable, str(SUITE), "--out", str(folder), *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no NVIDIA GPU is visible")
    assert "</html>" in (folder / "suite.html").read_text()
    found = read(folder)
    assert found["run"]["machine"]["gpu"] is None
    return found


def test_a_run_without_a_gpu(tmp_path: Path) -> None:
    found = run_here(tmp_path, "--quick", "--skip", "static")["sections"]
    assert {name: part["status"] for name, part in found.items()} == {
        name: "done" if name == "predictions" else "not run" for name in found
    }
    reasons = {name: part["reason"] for name, part in found.items()}
    assert reasons == dict.fromkeys(found, "no GPU") | {"predictions": None, "static": "not asked for"}
    facts = found["predictions"]["cases"]["llama-3.1-8b on h100"]
    assert facts["status"] == "predicted"
    # 15.0 GB of weights at 3.35 TB/s, by hand; keys and values and a little more on top.
    assert 15.0e9 / 3.35e12 * 1e6 < facts["steps"][0]["floor_us"] < 1.1 * 15.0e9 / 3.35e12 * 1e6
    assert "nothing was measured" in (tmp_path / "suite.html").read_text()


@pytest.mark.full
def test_the_static_part(tmp_path: Path) -> None:
    found = run_here(tmp_path, "--quick", "--kernel", "_list_work")
    assert found["sections"]["static"]["status"] == "done", found["sections"]["static"]
    rows = [facts for facts in found["sections"]["static"]["cases"].values() if facts["status"] == "measured"]
    assert rows
    assert all(row["kernel"] == "_list_work" and row["target"] == "sm_90" and row["spills"] == 0 for row in rows)
