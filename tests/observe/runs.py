"""This module holds small runs over the fake runner with everything in them that can happen. It does not know what is
made of their events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from octavo.engine.config import FaultConfig
from octavo.engine.core import EngineCore
from octavo.engine.events import EventKind, Recorder, RequestEvent, StepEvent
from octavo.engine.runner.fake_runner import FakeRunner
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler, SchedulerLimits

__all__ = ["Log", "Run", "Told", "busy_run", "make_core", "replay"]

NUM_BLOCKS = 40
MAX_MODEL_LEN = 200
VOCAB_SIZE = 500


class TickingClock:
    """Goes on by a millisecond whenever it is read, so that no two times are equal."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now = round(self.now + 0.001, 6)
        return self.now


class Log:
    """A recorder that keeps everything in order, and hands it on."""

    def __init__(self, *recorders: Recorder) -> None:
        self.events: list[RequestEvent | StepEvent] = []
        self._recorders = recorders

    def on_request(self, event: RequestEvent) -> None:
        self.events.append(event)
        for recorder in self._recorders:
            recorder.on_request(event)

    def on_step(self, event: StepEvent) -> None:
        self.events.append(event)
        for recorder in self._recorders:
            recorder.on_step(event)


def make_core(recorder: Recorder | None, clock: Callable[[], float] | None = None, **changes: Any) -> EngineCore:
    limits = {
        "vocab_size": VOCAB_SIZE,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 32,
        "num_blocks": NUM_BLOCKS,
        "block_size": 4,
        "model_id": "fake",
    } | changes
    runner = FakeRunner(
        num_blocks=limits["num_blocks"],
        block_size=limits["block_size"],
        max_num_seqs=limits["max_num_seqs"],
        max_model_len=limits["max_model_len"],
        alphabet=VOCAB_SIZE,
    )
    return EngineCore(Scheduler(SchedulerLimits(**limits), clock or TickingClock(), recorder), runner)


@dataclass
class Run:
    core: EngineCore
    log: Log
    num_heard: dict[tuple[str, int], int] = field(default_factory=dict)
    """By sequence: tokens in its news."""


def busy_run(*recorders: Recorder, num_requests: int = 40, seed: int = 0, max_steps_in_flight: int = 1) -> Run:
    """Run requests that share prefixes in a pool that is too small, some aborted, cut, failed, in several choices."""
    log, rng = Log(*recorders), Random(seed)
    # Now and then a row is taken for nothing, and given back to the same sequence within the step.
    core = make_core(log, faults=FaultConfig(preempt_every=13), max_steps_in_flight=max_steps_in_flight)
    run = Run(core, log)
    runner = core.runner
    assert isinstance(runner, FakeRunner)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    added = step = 0
    while added < num_requests or core.has_unfinished:
        while added < num_requests and (rng.random() < 0.4 or not core.has_unfinished):
            prompt = shared[: rng.randrange(41)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))]
            n, max_tokens = rng.choice((1, 1, 1, 3)), rng.choice((1, 5, 20, 60))
            core.add_request(f"r{added}", prompt, SamplingParams(n=n, max_tokens=max_tokens, seed=1), stream=True)
            added += 1
        if step == 25:
            runner.fail_next = "after"
        if step in (10, 40):
            runner.nan_rows = set(range(2))
        said = core.step()
        if step % 9 == 0:
            said += core.abort(f"r{rng.randrange(added)}")
        for output in said:
            key = (output.request_id, output.index)
            run.num_heard[key] = run.num_heard.get(key, 0) + len(output.new_token_ids)
            if output.finish_reason is None and run.num_heard[key] == 12 and output.index == 0:
                core.finish(output.request_id, 0, 11)
        step += 1
    core.scheduler.check_integrity()
    return run


@dataclass
class Told:
    """What a log says of one sequence, put together the slow and plain way."""

    arrived: RequestEvent
    admitted: list[RequestEvent] = field(default_factory=list)
    preempted: list[RequestEvent] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    token_steps: list[int] = field(default_factory=list)
    entries: list[tuple[int, int]] = field(default_factory=list)
    """(step, tokens run)."""
    finished: RequestEvent | None = None
    end_step: int | None = None
    """The first step that its row does not run for it any more."""


def replay(log: Log) -> dict[tuple[str, int], Told]:
    """Return what is told of each sequence."""
    told: dict[tuple[str, int], Told] = {}
    owners: dict[int, list[tuple[int, Told]]] = {}
    for event in log.events:
        if isinstance(event, StepEvent):
            for place, (row, count) in enumerate(zip(event.rows, event.num_scheduled_tokens, strict=True)):
                owner = next(owner for first, owner in reversed(owners[int(row)]) if first <= event.step)
                if owner.end_step is None or event.step < owner.end_step:
                    owner.entries.append((event.step, int(count)))
                if place in event.sampled:
                    owner.token_times.append(event.end_s)
                    owner.token_steps.append(event.step)
            continue
        key = (event.request_id, event.choice)
        if event.kind == EventKind.ARRIVED:
            told[key] = Told(event)
        elif event.kind == EventKind.ADMITTED:
            owners.setdefault(event.row, []).append((event.step, told[key]))
            told[key].admitted.append(event)
            told[key].end_step = None
        elif event.kind == EventKind.PREEMPTED:
            told[key].preempted.append(event)
            told[key].end_step = event.step
        elif event.kind == EventKind.FINISHED:
            told[key].finished = event
            told[key].end_step = event.step + 1
    return told
