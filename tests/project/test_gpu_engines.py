"""What is measured of whole engines, on a CPU with a tiny model: floors, steps, other engines, memory, loading."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from octavo.engine.config import setting_names
from octavo.engine.errors import ConfigError
from octavo.engine.footprint import kv_bytes_per_token, num_weights
from octavo.engine.tools.gpus import find_gpu
from octavo.engine.tools.plan import read_model
from octavo.engine.tools.roofline import Roofline, StepWork

from .gpu_benchmarks import RATES, ROOT, load

floors, models, steps, kv = load("gpu.floors", "gpu.models", "gpu.steps", "gpu.kv")
memory, loading = load("gpu.memory", "gpu.loading")
side, runs, lines = load("side_by_side", "peers.engine_runs", "gpu.lines")


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-0.6b", "tiny"])
@pytest.mark.parametrize("work", [StepWork.of([(1, 700)] * 64), StepWork.of([(5, 40), (1, 9)], 1)])
def test_floors_are_the_rooflines(name: str, work: StepWork, tmp_path: Path) -> None:
    model, gpu = read_model(str(models.write(tmp_path, name))), find_gpu("h100")
    found = floors.step_floors(model, gpu, work, dtype="bfloat16")
    parts = {part.name: part for part in Roofline(model, gpu, dtype="bfloat16").parts(work)}
    groups = {
        "projections": ("qkv", "o", "up", "down"),
        "attention": ("attention",),
        "head and sampling": ("head and sampling",),
        "norms, rotation, activation": ("norm", "write_kv", "activation", "between"),
    }
    assert set(parts) == set(groups)
    assert sum(map(len, groups.values())) == len(found)
    for group, names in groups.items():
        assert sum(found[part].num_bytes for part in names) == pytest.approx(parts[group].num_bytes)
        assert sum(found[part].flops for part in names) == pytest.approx(parts[group].flops)
    assert sum(floor.seconds for floor in found.values()) >= 0.999 * Roofline(model, gpu, dtype="bfloat16").step_s(work)


def test_shapes_are_those_of_the_models(tmp_path: Path) -> None:
    configs = ROOT / "tests/tools/plan/configs"
    for name in ("llama-3.1-8b", "qwen3-0.6b"):
        assert read_model(str(models.write(tmp_path, name))) == read_model(str(configs / f"{name}.json"))


class Ticks:
    """A clock that goes on by a second with every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_STEPS": 4, "NUM_WINDOWS": 2, "NUM_WARMUP": 2, "BUDGET_TOKENS": 64}.items():
        monkeypatch.setattr(steps, name, value)


def test_steps_are_timed_beside_their_floor(small_steps: None) -> None:
    size = steps.Size(3, 20)
    engine = steps.Engine("tiny", (size,), device="cpu", dtype="float32")
    llm = engine.get({})
    assert engine.get({}) is llm
    found = steps.measure(llm, size, RATES, clock=Ticks())
    assert found["us"] == 1e6 / steps.NUM_STEPS
    assert found["tokens_per_s"] == 3 * steps.NUM_STEPS
    assert found["fraction"] == pytest.approx(found["floor_us"] / found["us"], abs=1e-4)
    assert "floor_us" not in steps.measure(llm, size, {})
    assert not llm.engine.core.has_unfinished
    # Three sequences, each as long as its prompt and what it has generated: known from outside.
    with steps.decoding(llm, size):
        outputs = llm.stats.num_output_tokens
        work = steps.work_now(llm, size, outputs - 6, 0.5)
    assert work == StepWork(3, 3, 3, round(3 * 20.5) + 6, round(3 * 20.5) + 6)
    parts = steps.take_apart(llm, size, RATES, num_steps=2)
    names = {row["part"] for row in parts["parts"]}
    assert {"qkv", "o", "up", "down", "norm", "attention", "head and sampling"} <= names
    losses = [row["us"] - row["floor_us"] for row in parts["parts"]]
    assert losses == sorted(losses, reverse=True)
    assert any(row["floor_us"] > 0 for row in parts["parts"])
    engine.close()


def test_every_way_to_run_is_a_case(small_steps: None) -> None:
    size = steps.Size(2, 20)
    engine = steps.Engine("tiny", (size,), device="cpu", dtype="float32")
    ways = {
        name: way for name, way in steps.VARIANTS.items() if {key for key in way if way[key]} <= setting_names().keys()
    }
    cases = steps.make_cases(engine, "tiny", (size,), ways, RATES)
    order = ("graphs and overlap", "eager", "parts", "graphs", "overlap")
    assert list(cases) == [f"tiny/2x20/{name}" for name in order]
    found = {name: case() for name, case in cases.items()}
    assert {facts["status"] for facts in found.values()} == {"measured"}
    assert all(found[f"tiny/2x20/{name}"]["tokens_per_s"] > 0 for name in ways)
    engine.close()


def test_a_setting_that_is_not_there_is_said(small_steps: None) -> None:
    engine = steps.Engine("tiny", (steps.Size(1, 8),), device="cpu", dtype="float32")
    with pytest.raises(lines.NotRunError, match="no setting warp_speed"):
        engine.get({"warp_speed": True})
    engine.get({"warp_speed": False})
    with pytest.raises(lines.NotRunError, match="max_model_len"):
        steps.Engine("tiny", (steps.Size(1, 2000),), device="cpu", dtype="float32").get({})


def test_a_way_that_does_not_start_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (steps.Size(1, 8), steps.Size(2, 8))
    asked: list[Any] = []
    told: list[Any] = []

    def start(_: Any, way: dict[str, Any]) -> Any:
        asked.append(way)
        if way["graphs"]:
            raise RuntimeError("planted")
        raise ConfigError("refused")

    monkeypatch.setattr(steps.Engine, "_start", start)
    monkeypatch.setattr(lines.Lines, "write", lambda _, **line: told.append(line))
    engine = steps.Engine("tiny", sizes, device="cpu", dtype="float32")
    lines.Lines(None).run(steps.make_cases(engine, "tiny", sizes, steps.VARIANTS, {}))
    ended = {line["case"]: line["status"] for line in told if line.get("status", "started") != "started"}
    assert [name for name, status in ended.items() if status == "failed"] == [
        "tiny/1x8/graphs and overlap",
        "tiny/1x8/graphs",
    ]
    assert len(ended) == 10
    assert [way["graphs"] for way in asked].count(True) == 2


@pytest.mark.parametrize(("dtype", "bytes_per_head"), [("auto", 16 * 4), ("int8", 16 + 4), ("fp8", 16)])
def test_keys_and_values_in_other_dtypes(small_steps: None, dtype: str, bytes_per_head: int) -> None:
    size = steps.Size(2, 20)
    engine = steps.Engine("tiny", (size,), device="cpu", dtype="float32")
    found = kv.run(engine, dtype, size, {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1e30})
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * bytes_per_head
    assert found["end_to_end_tokens_per_s"] > 0
    # With memory alone to wait for, a dtype moves the floor by just the keys and values that it makes smaller.
    work = steps.work_now(engine.get({"kv_cache_dtype": dtype}), size, 0, 0.0)
    llm, rates = engine.get({"kv_cache_dtype": dtype}), {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1e30}
    attention = steps.floors_of(llm, work, rates)["attention"]
    wide = floors.step_floors(llm.engine.model_config, floors.measured_gpu(rates, "float32"), work, dtype="float32")
    tokens = work.kv_tokens_read + work.num_tokens
    assert wide["attention"].num_bytes - attention.num_bytes == tokens * 8 * (16 * 4 - bytes_per_head)


SCALE = side.Scale(5, 4, 30, 6, 3, (200.0,), num_rounds=2, online_s=0.02)


@pytest.fixture
def engines(tmp_path: Path) -> Any:
    model, settings = models.find(tmp_path, "tiny")
    workload = runs.Workload(model, settings, "cpu", "float32", 3, 64, max_num_batched_tokens=64, scratch=tmp_path)
    found = side.Engines(workload, side.resolve_model(model, **settings))
    yield found
    found.close()


def test_transformers_beside_ours(engines: Any) -> None:
    found = side.offline(engines, SCALE, 320)
    peer = found["beside"]["transformers_batching"]
    assert "reason" not in peer, peer["reason"]
    assert (found["status"], peer["num_answers"], len(peer["rounds"])) == ("measured", 5, 2)
    assert peer["num_equal"] == 5 or peer["num_near_ties"] > 0
    assert peer["worst_gap"] <= side.NEAR_TIE["float32"]
    assert peer["num_tokens_checked"] == 5 * SCALE.num_tokens
    assert peer["ratio"] > 0
    assert peer["about"]["attention"]
    assert "vllm_offline" in found["beside"]
    assert "transformers_batching" in side.line("offline", found)
    arriving = side.online(engines, SCALE, 320, 200.0)
    for each in (arriving, arriving["beside"]["transformers_batching"]):
        assert 0 < each["ttft_ms_p50"] <= each["ttft_ms_p99"]
        assert each["tpot_ms_p50"] > 0


class Wrong:
    """A peer whose answers are ours, but for one token."""

    def __init__(self, ours: Any, num_tokens: int | None = None) -> None:
        self.facts: dict[str, Any] = {}
        self._ours, self._num_tokens, self.is_closed = ours, num_tokens, False

    def offline(self, prompts: Any, num_tokens: int) -> Any:
        answers = self._ours.offline(prompts, self._num_tokens or num_tokens)
        if self._num_tokens is None and num_tokens > 4:
            answers.token_ids[1][3] = (answers.token_ids[1][3] + 7) % 300
        return answers

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(("num_tokens", "reason"), [(None, "nats behind our likeliest"), (3, "tokens, not 6")])
def test_an_engine_that_disagrees_is_not_reported(engines: Any, num_tokens: int | None, reason: str) -> None:
    engines.reasons = dict.fromkeys(runs.ENGINES, "left out")
    wrong = engines._others["wrong"] = Wrong(engines.ours, num_tokens)
    found = side.offline(engines, SCALE._replace(num_rounds=1), 320)
    assert (found["status"], wrong.is_closed) == ("failed", True)
    assert reason in found["reason"]
    assert reason in found["beside"]["wrong"]["reason"]
    assert "tokens_per_s" not in found["beside"]["wrong"]
    assert found["tokens_per_s"] > 0


def test_an_engine_that_fails_costs_only_itself(engines: Any) -> None:
    class Slow(Wrong):
        def offline(self, prompts: Any, num_tokens: int) -> Any:
            raise TimeoutError("1 of 5 answers after 9 s")

    class Broken(Wrong):
        def offline(self, prompts: Any, num_tokens: int) -> Any:
            raise KeyError("planted")

        def close(self) -> None:
            raise RuntimeError("stuck")

    engines.reasons = dict.fromkeys(runs.ENGINES, "left out")
    engines._others |= {"slow": Slow(engines.ours), "broken": Broken(engines.ours)}
    found = side.offline(engines, SCALE._replace(num_rounds=1), 320)
    assert found["status"] == "measured"
    assert found["beside"]["slow"] == {"reason": "out of time: 1 of 5 answers after 9 s"}
    assert "planted" in found["beside"]["broken"]["reason"]
    assert "closing it: stuck" in found["beside"]["broken"]["reason"]


def test_a_ratio_is_how_much_quicker_ours_is(engines: Any) -> None:
    class Late(Wrong):
        def offline(self, prompts: Any, num_tokens: int) -> Any:
            answers = self._ours.offline(prompts, num_tokens)
            answers.seconds = 1e6
            return answers

    engines.reasons = dict.fromkeys(runs.ENGINES, "left out")
    engines._others["late"] = Late(engines.ours)
    found = side.offline(engines, SCALE._replace(num_rounds=1), 320)
    late = found["beside"]["late"]
    assert late["tokens_per_s"] == round(5 * SCALE.num_tokens / 1e6, 2)
    assert late["ratio"] > 1000


def test_a_peer_with_too_little_room_sizes_its_own_cache(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (batching,) = load("peers.transformers_batching")
    asked = []

    def out_of_memory_once(self: Any, config: Any) -> None:
        asked.append(config.num_blocks)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("planted")
        self._manager = SimpleNamespace(start=lambda: None)

    monkeypatch.setattr(batching.TransformersRuns, "_prepare", out_of_memory_once)
    peer = runs.start("transformers_batching", engines.workload, engines._checkpoint)
    assert asked == [5, None], "three sequences of a block each and two more; what it chooses itself"
    assert "num_blocks" not in peer.facts["settings"]


@pytest.mark.parametrize("level", ["quick", "normal", "full"])
def test_two_engines_fit_beside_each_other(level: str, tmp_path: Path) -> None:
    """An H200 has 139 GiB: for ours and another one, with something left for what they compute in."""
    for name in ("llama-3.1-8b", "qwen3-0.6b", "qwen3-8b"):
        args = Namespace(model=name, device="cuda", dtype="auto", timeout_s=1.0)
        workload, checkpoint = side.make_workload(args, side.SCALES[level], tmp_path)
        model = checkpoint.model_config
        pool = workload.kv_cache_tokens * kv_bytes_per_token(model, model.dtype)
        assert 2 * (2 * num_weights(model) + pool) < 0.9 * 139 * 2**30, name


def test_our_own_answers_are_judged_too(engines: Any) -> None:
    prompts = side.make_prompts(SCALE, 3, 320, seed=5)
    answers = engines.ours.offline(prompts, 5)
    assert all(gap < 1e-4 for each in engines.ours.behind(prompts, answers.token_ids) for gap in each)
    assert [len(each) for each in engines.ours.behind(prompts, answers.token_ids)] == [5, 5, 5]
    assert all(math.isnan(first) for first in answers.first_s)
    again = engines.ours.online(prompts, 5, [0.02, 0.0, 0.01])
    assert again.token_ids == answers.token_ids
    assert all(0 < first < end for first, end in zip(again.first_s, again.end_s, strict=True))


def compare(folder: Path, *options: str) -> tuple[Any, list[dict[str, Any]]]:
    """Run the command; return how it ended and what it told."""
    out = folder / "lines"
    argv = [sys.executable, str(ROOT / "benchmarks/side_by_side.py"), "--device", "cpu", "--lines", str(out), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT / ".typing")}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    return done, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done, _ = compare(tmp_path, "--model", "nowhere")
    assert done.returncode != 0
    assert "model is 'nowhere'" in done.stderr


@pytest.mark.full
def test_the_comparison_is_a_command(tmp_path: Path) -> None:
    done, told = compare(tmp_path, "--model", "tiny")
    assert done.returncode == 0, done.stderr
    assert [line["status"] for line in told if line.get("status") != "started" and "case" in line] == ["measured"] * 2
    assert "tiny/offline: octavo" in done.stderr


class Numbers:
    """A device's memory, as told."""

    def __init__(self) -> None:
        self.held, self.resets = [100, 5100], 0

    def allocated(self) -> int:
        return self.held.pop(0)

    def reserved(self) -> int:
        return 9000

    def peak(self) -> int:
        return 5100 + 700

    def reset(self) -> None:
        self.resets += 1


def test_memory_beside_the_plan() -> None:
    numbers = Numbers()
    settings = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 64}
    found = memory.measure("tiny", {}, numbers, **settings, kv_cache_tokens=1024)
    assert (found["started_bytes"], found["step_bytes"], numbers.resets) == (5000, 700, 1)
    assert found["planned_step_bytes"] > 700
    assert found["within_plan"]
    assert found["step_tokens"] == 64
    with pytest.raises(lines.NotRunError, match="no setting"):
        memory.measure("tiny", {"warp_speed": 1}, numbers)


def test_loading_from_files(tmp_path: Path) -> None:
    folder = loading.write_checkpoint(tmp_path, "tiny", torch.float32)
    found = loading.measure(folder, "cpu", "float32")
    assert found["bytes"] == (folder / "model.safetensors").stat().st_size > 100_000
    assert {"from disk", "from memory", "disk alone", "memory alone", "link alone"} <= set(found["gb_per_s"])
    assert all(rate > 0 for rate in found["gb_per_s"].values())
