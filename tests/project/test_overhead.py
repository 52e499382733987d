"""The benchmark of the host's work: what its figures mean, by a log of numbers, and that it refuses a wrong engine."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo.engine.runner.sampler import Sampler
from octavo.kernels import use_backend

from .gpu_benchmarks import load

null_device, overhead = load("null_device", "overhead")
NUM_SEQS, STEPS = 5, 6
ARGS = Namespace(steps=STEPS, prompt_tokens=70, rounds=1)


@pytest.fixture(autouse=True)
def _on_torch() -> Iterator[None]:
    with use_backend("torch"):  # whose end takes the null ops away
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = null_device.write_checkpoint(tmp_path_factory.mktemp("null"))
    return path


def run(folder: Path, rows: str, told: str) -> Any:
    case = overhead.Case(NUM_SEQS, rows, told, "here", 0.0, False)
    engine = overhead.Here(folder, NUM_SEQS, False, ARGS)
    start = int(np.count_nonzero(engine.log.num_seqs))
    requests = overhead.Load.of(case, ARGS, seed=1)
    requests.check(engine.run(case, requests), engine.tokenizer)
    return overhead.cost_of(engine.log, start, case, STEPS)


@pytest.mark.parametrize(
    ("rows", "told"), [("greedy", "at the end"), ("sampled", "streamed"), ("sampled", "stop strings")]
)
def test_every_part_is_measured(folder: Path, rows: str, told: str) -> None:
    cost = run(folder, rows, told)
    parts = (cost.schedule, cost.execute, cost.collect, cost.update, cost.text)
    assert all(part > 0 for part in parts), cost
    assert cost.work == pytest.approx(sum(parts) + cost.other)
    assert cost.work_p99 >= cost.work
    assert cost.cpu > 0


def test_a_device_that_takes_its_time_is_waited_for(folder: Path) -> None:
    case = overhead.Case(NUM_SEQS, "greedy", "streamed", "here", 1.0, False)
    engine = overhead.Here(folder, NUM_SEQS, False, ARGS)
    requests = overhead.Load.of(case, ARGS, seed=1)
    engine.run(case, requests)
    log = engine.log
    ran = slice(int(np.flatnonzero(log.num_seqs)[0]), int(np.count_nonzero(log.num_seqs)))
    begun_at_s = log.begun_at_s[ran]
    assert (np.diff(begun_at_s) >= 1e-3).all(), "a step has begun before the one before it had ended"
    assert (log.ended_at_s[ran] >= begun_at_s + 1e-3).all(), "a step was taken over before the device had ended it"


def test_an_engine_with_a_wrong_token_is_not_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = null_device.null_forward

    def neighbours(token_ids: Any, metadata: Any, cache: Any, capture: Any = ()) -> Any:
        hidden, states = forward(token_ids, metadata, cache, capture)
        return hidden.roll(1, 0), states

    monkeypatch.setattr(null_device, "null_forward", neighbours)
    with pytest.raises(SystemExit, match="wrong tokens"):
        run(folder, "greedy", "at the end")


def test_a_neighbours_seed_is_not_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Sampler.add

    def swapped(self: Sampler, row: int, *args: Any, seed: int, **options: Any) -> None:
        add(self, row, *args, seed=seed ^ 1, **options)

    monkeypatch.setattr(Sampler, "add", swapped)
    with pytest.raises(SystemExit, match="wrong tokens"):
        run(folder, "sampled", "at the end")


def test_a_wrong_text_is_not_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.engine.text.detokenizer import Detokenizer

    append = Detokenizer.append
    monkeypatch.setattr(Detokenizer, "append", lambda self, ids: append(self, ids).replace("e", "E"))
    with pytest.raises(SystemExit, match="wrong text"):
        run(folder, "greedy", "streamed")


def test_figures_of_a_log(tmp_path: Path) -> None:
    """Steps of 5 ms, begun every 6 ms, with 1.5 ms of the host's work of which 0.5 ms is slept through by its CPU."""
    log = null_device.StepLog(tmp_path / "log")
    num = 2 * overhead.WARM_STEPS + STEPS
    at = np.arange(num)
    log.num_seqs[:num] = log.num_tokens[:num] = NUM_SEQS
    log.begun_at_s[:num] = 0.006 * at
    log.ended_at_s[:num] = 0.006 * (at + 1)
    log.asleep_s[:num], log.asleep_cpu_s[:num] = 0.0045, 0.0002
    log.cpu_at_s[:num] = 0.0012 * at
    for name, value in {
        "schedule_s": 1e-4,
        "execute_s": 2e-4,
        "collect_s": 3e-5,
        "update_s": 1e-4,
        "text_s": 4e-4,
    }.items():
        getattr(log, name)[:num] = value
    cost = overhead.cost_of(log, 0, overhead.Case(NUM_SEQS, "greedy", "streamed", "here", 5.0, True), STEPS)
    assert cost.waits == pytest.approx(1 / 6)
    assert (cost.work, cost.work_p99, cost.cpu) == pytest.approx((1500, 1500, 1000))
    assert (cost.schedule, cost.execute, cost.collect, cost.update, cost.text) == pytest.approx(
        (100, 200, 30, 100, 400)
    )
    assert cost.other == pytest.approx(1500 - 830)


def test_too_few_steps_are_not_reported(tmp_path: Path) -> None:
    log = null_device.StepLog(tmp_path / "log")
    log.num_seqs[:5] = log.num_tokens[:5] = NUM_SEQS
    with pytest.raises(SystemExit, match="only 0 steps"):
        overhead.cost_of(log, 0, overhead.Case(NUM_SEQS, "greedy", "streamed", "here", 5.0, True), STEPS)
