"""The suite for machines with a GPU, where there is none: its orchestration with made-up children, its measuring with a
clock of numbers, and one real run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from octavo.kernels import paged_attention_decode, use_backend
from octavo.kernels.dispatch import override
from octavo.kernels.spec import Case, load_specs
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "scripts" / "gpu_suite.py"
GPU = {"name": "made up", "arch": 90, "num_sms": 1, "memory_bytes": 1, "l2_bytes": 1, "cuda": "0"}
MACHINE = {"packages": {"torch": "2", "triton": "3"}, "gpu": GPU}
IDENTITY = {"source": "abc", "torch": "2", "triton": "3", "gpu": "made up"}
RUN = {"started": "now", "identity": IDENTITY, "machine": MACHINE}
RATES = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": 1e14}
SMALL = {"num_kv_heads": 2, "group_size": 2, "head_dim": 64, "block_size": 16}


def load(*names: str) -> list[ModuleType]:
    """Import modules of benchmarks/, which is no package of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return [importlib.import_module(name) for name in names]


children, store, cases, checking, kernels = load(
    "gpu.children", "gpu.store", "gpu.cases", "gpu.checking", "gpu.kernels"
)
bits, page, timing, peers = load("gpu.bits", "gpu.page", "gpu.timing", "peers")


@pytest.fixture(autouse=True)
def _on_torch() -> Iterator[None]:
    with use_backend("torch"):
        yield


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
    monkeypatch.setattr(module, "prepare_environment", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # which it sets, put back after
    return module


# Children


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


# Results


def test_results_survive_and_resume(tmp_path: Path) -> None:
    path = tmp_path / "out" / "suite.json"
    first = store.Store(path, RUN)
    first.add("tests", "a", {"status": "passed"})
    first.add("tests", "b", {"status": "crashed"})
    first.add("bench", "c", {"status": "measured", "us": 1.0})
    first.close("bench", "done", None, 2.0)
    first.close("tests", "partial", "no time", 1.0)
    assert json.loads(path.read_text()) == first.data
    assert [each.name for each in path.parent.iterdir()] == ["suite.json"]
    second = store.Store(path, RUN, resume=True)
    assert (second.finished("tests"), second.is_done("tests")) == (["a"], False)
    assert (second.finished("bench"), second.is_done("bench")) == (["c"], True)
    other = store.Store(path, RUN | {"identity": IDENTITY | {"source": "def"}}, resume=True)
    assert other.data["sections"] == {}


def test_sources_have_a_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    before = store.source_hash(tmp_path, ["a"])
    assert before == store.source_hash(tmp_path, ["a"])
    (tmp_path / "a" / "x.py").write_text("2")
    assert before != store.source_hash(tmp_path, ["a"])


# The suite


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


def test_only_and_skip(suite: ModuleType, make_job: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    names = ("static", "tests", "bench")
    monkeypatch.setattr(suite, "SECTIONS", sections(suite, make_job, **{n: {"a": "return {}"} for n in names}))
    assert suite.main(["--out", str(tmp_path), "--only", "static,bench", "--skip", "bench"]) == 0
    statuses = [part["status"] for part in read(tmp_path)["sections"].values()]
    assert statuses == ["done", "not run", "not run"]
    with pytest.raises(SystemExit):
        suite.main(["--only", "everything"])


def test_every_section_names_what_is_there(suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of all sections: modules and tests exist, and their options are known."""
    collected = tmp_path / "collected"
    plan = [f"tests/kernels/test_norm.py::test_{i}" for i in range(130)]
    collected.write_text(json.dumps({"plan": plan}) + "\n")
    monkeypatch.setattr(suite.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(suite.shutil, "which", lambda *_, **__: "/bin/compute-sanitizer")
    args = suite.parse(["--full", "--model", "m"])
    results = store.Store(tmp_path / "suite.json", RUN)
    results.add("ceilings", "copy", {"status": "measured", **RATES})
    context = suite.Context(args, MACHINE, results, tmp_path, time.monotonic() + 60)
    jobs = [job for section in suite.SECTIONS.values() for job in section.jobs(context)]
    modules = {job.argv[job.argv.index("-m") + 1] for job in jobs}
    paths = [word for job in jobs for word in job.argv if word.startswith("tests/")]
    assert {"gpu.ceilings", "gpu.compiling", "gpu.kernels", "gpu.bits", "gpu.sanitized", "gpu.engines"} < modules
    load(*(name for name in modules if name.startswith("gpu.") and name != "gpu.engines"))
    assert paths.count("tests/kernels/test_norm.py") == 3
    assert all((ROOT / path).exists() for path in paths)
    assert not any("aot" in path for path in paths)


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
    found = run_here(tmp_path, "--skip", "static")["sections"]
    assert {part["status"] for part in found.values()} == {"not run"}
    assert [part["reason"] for part in found.values()] == ["not asked for", *["no GPU"] * (len(found) - 1)]


@pytest.mark.full
def test_the_static_part(tmp_path: Path) -> None:
    found = run_here(tmp_path, "--quick", "--kernel", "_list_work")
    assert found["sections"]["static"]["status"] == "done", found["sections"]["static"]
    rows = [facts for facts in found["sections"]["static"]["cases"].values() if facts["status"] == "measured"]
    assert rows
    assert all(row["kernel"] == "_list_work" and row["target"] == "sm_90" and row["spills"] == 0 for row in rows)


# Measuring


class Numbers:
    """A clock that runs each call once and says what it was told."""

    def __init__(self, **seconds: float) -> None:
        self._seconds = seconds

    def samples(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [self._seconds.get(name, 1e-3)] * 5 for name in calls}

    def graphed(self, call: Callable[[], object]) -> Callable[[], object]:
        return call


def bench(op: str, case: Case) -> Any:
    return cases.Bench(load_specs()[op], case)


def attention(op: str, seqs: tuple[tuple[int, int], ...], **values: Any) -> Any:
    return bench(f"paged_attention_{op}", Case("small", {**SMALL, "seqs": seqs, **values}, "float16", "bench"))


def measured(one: Any, **options: Any) -> dict[str, Any]:
    inputs = cases.make_inputs(one, torch.device("cpu"))
    found: dict[str, Any] = kernels.measure(one, inputs, Numbers(**options), RATES, with_peers=True)
    return found


def test_a_case_is_timed_beside_what_is_there() -> None:
    one = attention("decode", ((1, 40), (1, 40)))
    found = measured(one, octavo=1e-4)
    assert found["status"] == "measured"
    assert (found["us"], found["graph"], found["bound_by"]) == (100.0, True, "memory")
    assert found["bytes"] == one.spec.bytes(one.case)
    assert found["fraction"] == pytest.approx(found["bytes"] / 1e12 / 1e-4, abs=1e-4)
    assert found["beside"]["torch SDPA, gathered before"]["us"] == 1000.0
    assert found["beside"]["torch SDPA, gathering"]["max_abs_diff"] < 0.01
    assert "not here" in found["beside"]["FlashInfer"]["reason"] or "us" in found["beside"]["FlashInfer"]


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_a_wrong_result_is_not_timed(op: str) -> None:
    one = attention(op, ((1, 40), (1, 70)))
    right = octavo_op(op)

    def off(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        out[1] *= 1.01  # the first sequence is right
        return out

    with override(f"paged_attention_{op}", off), pytest.raises(AssertionError, match="off by"):
        measured(one)


def octavo_op(op: str) -> Callable[..., Tensor]:
    from octavo.kernels.dispatch import implementation

    found: Callable[..., Tensor] = implementation(f"paged_attention_{op}", "torch")
    return found


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("rms_norm", "bfloat16-residual"),
        ("layer_norm", "float16"),
        ("gated_activation", "silu-bfloat16"),
        ("write_kv", "neox-bfloat16"),
        ("copy_blocks", "chain-bf16"),
        ("sample", "chat-bfloat16"),
        ("log_softmax_top", "top-5-bfloat16"),
    ],
)
def test_other_ops(op: str, case: str) -> None:
    one = bench(op, load_specs()[op].case(case))
    assert measured(one)["error_u"] == 0.0


def test_results_that_differ() -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert checking.same_result("x", x, x, 1.0) == 0.0
    with pytest.raises(AssertionError, match="off by"):
        checking.same_result("x", x * 1.02, x, 1.0)
    with pytest.raises(AssertionError, match="not written"):
        checking.same_result("x", x, torch.full_like(x, float("nan")), 1.0)
    with pytest.raises(AssertionError, match="differs"):
        checking.same_result("x", torch.tensor([1]), torch.tensor([2]), 1.0)
    with pytest.raises(AssertionError, match="off by"):
        checking.same_result("x", torch.tensor([1.0]), torch.tensor([1.00001]), None)


def test_what_is_timed() -> None:
    quick, normal, full = (cases.benches(level) for level in ("quick", "normal", "full"))
    names = [{one.name for one in level} for level in (quick, normal, full)]
    assert names[0] < names[1] < names[2]
    assert len(names[2]) == len(full)
    timed = {one.spec.name for one in normal}
    assert timed == set(load_specs())
    assert {one.group for one in full} == set(cases.GROUPS)
    found = {one.name: one for one in full}
    assert cases.input_bytes(found["decode/256x32768"]) > 256 * 32768 * 4096
    inputs = cases.make_inputs(found["decode/8x512-block16"], torch.device("meta"))
    assert inputs["k_cache"].shape == (1 + 8 * 32, 8, 16, 128)


def test_bits_differ() -> None:
    x = torch.tensor([1.0, 2.0])
    assert bits.differing(x, x.clone())["equal"]
    assert bits.differing(x, torch.nextafter(x, torch.tensor(9.0)))["num_differing"] == 2
    assert not bits.differing(torch.tensor([0.0]), torch.tensor([-0.0]))["equal"]


def test_the_page_shows_what_was_found(tmp_path: Path) -> None:
    results = store.Store(tmp_path / "suite.json", RUN)
    results.add("ceilings", "copy", {"status": "measured", **RATES})
    results.add("tests", "tests/a.py::test_<x>", {"status": "failed", "reason": "1 < 2", "seconds": 0.5})
    facts = timing.roofline(1e-4, 10**7, 10**9, RATES) | timing.summary([1e-4] * 5)
    slower = {"FlashInfer": facts | {"us": 200.0}, "vLLM Triton": {"reason": "not here: x"}}
    results.add("bench", "decode/64x4096", {"status": "measured", **facts, "beside": slower})
    found = page.make_page(results.data)
    assert found.count("<svg") == 1
    assert "decode/64x4096: 10 TFLOP/s at 100 FLOP/byte" in found
    assert "width:50.0%" in found
    assert "vLLM Triton is not here: x" in found
    assert "test_&lt;x&gt;" in found
    assert "1 &lt; 2" in found
    assert "http" not in found
    assert "decode/64x4096" in page.make_table(results.data)


# Peers, against stand-ins that compute from what they are given


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend the last rows of one sequence: q [rows, heads, d], keys and values [tokens, kv heads, d]."""
    group_size = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group_size, 1).float() for x in (keys, values))
    scores = torch.einsum("rhd,thd->hrt", q.float(), keys) * scale
    rows, tokens = scores.shape[1:]
    later = torch.ones(rows, tokens).triu(tokens - rows + 1).bool()
    return torch.einsum("hrt,thd->rhd", scores.masked_fill(later, float("-inf")).softmax(-1), values).to(q.dtype)


class FakeWrapper:
    """FlashInfer's wrapper, as far as we call it: HND pages by index list."""

    def __init__(self, workspace: Tensor, layout: str, **_: Any) -> None:
        assert layout == "HND"

    def plan(self, *lists: Tensor, page_size: int, sm_scale: float, **_: Any) -> None:
        *starts, self.first, self.blocks, self.last = lists
        self.starts = starts[0] if starts else torch.arange(len(self.first))
        self.page_size, self.scale = page_size, sm_scale

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor], out: Tensor) -> None:
        for s in range(len(self.last)):
            own = self.blocks[self.first[s] : self.first[s + 1]].long()
            length = (len(own) - 1) * self.page_size + int(self.last[s])
            keys, values = (cache[own].transpose(1, 2).flatten(0, 1)[:length] for cache in caches)
            rows = slice(int(self.starts[s]), int(self.starts[s + 1]))
            out[rows] = dense_attention(q[rows], keys, values, self.scale)


def fake_unified_attention(**given: Any) -> None:
    starts, block_size = given["cu_seqlens_q"].tolist(), given["k"].shape[1]
    for s, length in enumerate(given["seqused_k"].tolist()):
        own = given["block_table"][s, : -(-length // block_size)].long()
        keys, values = (given[name][own].flatten(0, 1)[:length] for name in ("k", "v"))
        rows = slice(starts[s], starts[s + 1])
        given["out"][rows] = dense_attention(given["q"][rows], keys, values, given["softmax_scale"])


def fake_decode_attention_fwd(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, first: Tensor, slots: Tensor, *rest: Any, logit_cap: float
) -> None:
    scale = rest[4]
    for s in range(len(q)):
        own = slots[first[s] : first[s + 1]]
        out[s : s + 1] = dense_attention(q[s : s + 1], keys[own], values[own], scale)


FAKES: dict[str, dict[str, Any]] = {
    "flashinfer": {
        "BatchDecodeWithPagedKVCacheWrapper": FakeWrapper,
        "BatchPrefillWithPagedKVCacheWrapper": FakeWrapper,
    },
    "triton_unified_attention": {"unified_attention": fake_unified_attention},
    "decode_attention": {"decode_attention_fwd": fake_decode_attention_fwd},
}


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_peers_get_what_we_get(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, contents in FAKES.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "_given_up", {})
    for package in ("vllm", "sglang"):
        monkeypatch.setitem(sys.modules, package, None)
    one = attention(op, ((1, 40), (1, 7), (1, 64)) if op == "decode" else ((5, 40), (17, 17), (1, 3)))
    inputs = cases.make_inputs(one, torch.device("cpu"))
    expected = octavo_op(op)(**inputs)
    found = {}
    for name, peer in peers.find(op):
        if name != "torch flex_attention":  # compiling it takes a minute
            found[name], call = peers.prepare(peer, one.case, inputs, expected)
            assert (call is None) == ("reason" in found[name])
    wanted = {"FlashInfer", "vLLM Triton"} | ({"SGLang Triton, 8 splits"} if op == "decode" else set())
    assert {name for name, facts in found.items() if "reason" not in facts} >= wanted, found
    assert found["torch SDPA, gathering"]["reason"] == "only for sequences of equal length"


@pytest.mark.parametrize("seqs", [((5, 40), (5, 40)), ((17, 17),), ((1, 9), (1, 9))])
def test_sdpa_sees_what_a_chunk_sees(seqs: tuple[tuple[int, int], ...]) -> None:
    one = attention("prefill", seqs)
    inputs = cases.make_inputs(one, torch.device("cpu"))
    ways = {name: peer for name, peer in peers.find("prefill") if name.startswith("torch SDPA")}
    assert len(ways) == 2
    for peer in ways.values():
        facts, call = peers.prepare(peer, one.case, inputs, octavo_op("prefill")(**inputs))
        assert call is not None, facts


def test_a_peer_that_is_never_ready_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PREPARATION_S", 0.05)
    monkeypatch.setattr(peers, "_given_up", {})
    asked = []

    def make(case: Case, inputs: dict[str, Any]) -> Any:
        asked.append(case)
        time.sleep(30)

    one = attention("decode", ((1, 40),))
    for _ in range(2):
        facts, call = peers.prepare(peers.Peer("slow", make), one.case, {}, torch.zeros(1))
        assert (call, facts["reason"]) == (None, "not ready after 0 s")
    assert len(asked) == 1


def test_a_peer_that_disagrees_is_not_timed() -> None:
    one = attention("decode", ((1, 40),))
    inputs = cases.make_inputs(one, torch.device("cpu"))
    expected = paged_attention_decode(**inputs)
    wrong = peers.Peer("wrong", lambda case, inputs: lambda: 1.1 * expected)
    facts, call = peers.prepare(wrong, one.case, inputs, expected)
    assert call is None
    assert "disagrees" in facts["reason"]
