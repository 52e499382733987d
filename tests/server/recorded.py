"""This module holds the run of recording.json: a busy engine on simulated time. It does not know who opens it.

Run as a script it writes the recording anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.observe import recording
from octavo.engine.observe.live import LiveFeed
from octavo.engine.observe.metrics import Metrics
from octavo.engine.observe.ring import EventRing
from octavo.engine.runner.fake_runner import FakeRunner
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler, SchedulerLimits
from octavo.engine.step import ModelOutput, SchedulerOutput

RECORDING = Path(__file__).with_name("recording.json")
LIMITS = SchedulerLimits(
    vocab_size=500,
    max_model_len=1024,
    max_num_seqs=12,
    max_num_batched_tokens=192,
    num_blocks=112,
    block_size=16,
    model_id="fake",
)
DURATION_S = 8.0
SNAPSHOT_S = 0.2


class _Flight:
    """A step that is over at some time."""

    def __init__(self, runner: _SlowRunner, over_s: float, output: ModelOutput) -> None:
        self._runner, self._over_s, self._output = runner, over_s, output

    def wait(self) -> ModelOutput:
        self._runner.now_s = max(self._runner.now_s, self._over_s)
        return self._output


class _SlowRunner(FakeRunner):
    """A runner whose steps take simulated time, one by one: a constant, and more for every sequence and token."""

    def __init__(self) -> None:
        super().__init__(
            num_blocks=LIMITS.num_blocks,
            block_size=LIMITS.block_size,
            max_num_seqs=LIMITS.max_num_seqs,
            max_model_len=LIMITS.max_model_len,
            alphabet=LIMITS.vocab_size,
        )
        self.now_s = self._free_s = 1000.0

    def execute(self, step: SchedulerOutput) -> _Flight:  # type: ignore[override]
        self._free_s = max(self.now_s, self._free_s)
        self._free_s += 0.011 + 0.0003 * len(step.rows) + 0.00012 * step.num_tokens
        return _Flight(self, self._free_s, super().execute(step))

    def clock(self) -> float:
        self.now_s += 0.00002
        return self.now_s


def record(*, overlap: bool = False, told: list[dict[str, Any]] | None = None) -> bytes:
    """Run requests that share prefixes, come in bursts and do not all fit, and return the recording.

    Args:
        overlap: with two steps out.
        told: gets what a watcher of the live view is told, step by step.
    """
    runner, ring, rng = _SlowRunner(), EventRing(), Random(3)
    limits = replace(LIMITS, max_steps_in_flight=2 if overlap else 1)
    core = EngineCore(Scheduler(limits, runner.clock, ring), runner)
    feed = LiveFeed(ring, Metrics(model_name="fake", num_blocks=LIMITS.num_blocks, max_model_len=LIMITS.max_model_len))
    prefixes = [[rng.randrange(500) for _ in range(length)] for length in (160, 96)]
    start_s = next_s = shown_s = runner.now_s
    added = 0
    while runner.now_s < start_s + DURATION_S or core.has_unfinished:
        while next_s <= runner.now_s and next_s < start_s + DURATION_S:
            is_burst = 2.5 < next_s - start_s < 3.2
            prompt = rng.choice((*prefixes, [])) + [rng.randrange(500) for _ in range(rng.randint(8, 260))]
            params = SamplingParams(n=rng.choice((1, 1, 1, 1, 2)), max_tokens=rng.randint(12, 110), seed=added)
            core.add_request(f"cmpl-{added:04d}", prompt, params, stream=True)
            added += 1
            next_s += rng.expovariate(26.0 if is_burst else 3.2)
        if core.has_unfinished:
            core.step()
        else:
            runner.now_s = min(next_s, start_s + DURATION_S)
        if told is not None:
            told.append(feed.next(core.snapshot()))
        if runner.now_s >= shown_s + SNAPSHOT_S:
            shown_s = runner.now_s
            ring.on_snapshot(core.snapshot())
    names = ("num_blocks", "block_size", "max_num_seqs", "max_model_len", "max_num_batched_tokens", "vocab_size")
    facts = {name: getattr(LIMITS, name) for name in names} | recording.schedule_facts(EngineConfig(), overlap=overlap)
    return recording.dumps(ring, {"model": "fake", **facts})


if __name__ == "__main__":
    RECORDING.write_bytes(record())
