"""This module holds what a scheduling step costs on the host: schedule and update, with a runner that does nothing.

    python benchmarks/scheduler.py [--json]

Steady decode is measured at several numbers of running sequences and two context lengths, with one step out at a time
and with two (overlap: a step is scheduled before the one before it is taken over), interleaved with bare Python loops
over as many rows in the same run, so that their ratio means something on a busy machine too. A loop does the least of
what a step must: count, append, look for a stop token and for the limit. One works on the same arrays, element by
element, which is the price of one careless line; one on plain objects and lists, which no runner could use.
No figure is printed for a case that has produced a wrong token.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from octavo.engine.core import EngineCore
from octavo.engine.request import RowTable
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler, SchedulerLimits
from octavo.engine.step import ModelOutput, SchedulerOutput

NUM_SEQS = (32, 256, 1024)
CONTEXT_TOKENS = (100, 4000)
BLOCK_SIZE = 64
TOKEN = 5
RESULTS = Path(__file__).parent / "results" / "scheduler.json"


@dataclass(frozen=True, slots=True)
class StepCost:
    """Microseconds of one steady decode step; the mean includes the steps in which many rows need a block."""

    num_seqs: int
    context_tokens: int
    overlap: bool
    median_us: float
    mean_us: float
    p99_us: float
    array_loop_us: float
    """Median of a Python loop over as many rows that touches the same arrays element by element."""
    object_loop_us: float
    """Median of the lightest loop there is: over one object with a list per sequence, and no blocks."""

    @property
    def ratio(self) -> float:
        """Of the median to that of the loop over the same arrays."""
        return self.median_us / self.array_loop_us


@dataclass(frozen=True, slots=True)
class AdmissionCost:
    """Microseconds to admit one prompt, with hashing: from the queue to the step that runs it."""

    prompt_tokens: int
    block_size: int
    cold_us: float
    """Nothing of it is cached."""
    hit_us: float
    """All of it is, and its blocks are found and compared."""


class NullRunner:
    """Samples the same token everywhere and computes nothing."""

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        return ModelOutput(np.full(len(step.sampled), TOKEN, dtype=np.int32))


@dataclass(slots=True)
class _Sequence:
    num_tokens: int
    num_computed_tokens: int
    max_num_tokens: int
    token_ids: list[int] = field(default_factory=list)


def array_loop(table: RowTable, token_ids: npt.NDArray[np.int32], stop_token_id: int) -> int:
    """Take one token for each row of a table, one after another, and count those that end."""
    num_ended = 0
    num_tokens, num_computed, max_num_tokens = table.num_tokens, table.num_computed_tokens, table.max_num_tokens
    for row, token in enumerate(token_ids.tolist()):
        position = num_tokens[row]
        table.token_ids[row, position] = token
        num_tokens[row] = position + 1
        num_computed[row] += 1
        if token == stop_token_id or position + 1 >= max_num_tokens[row]:
            num_ended += 1
    return num_ended


def object_loop(sequences: list[_Sequence], token_ids: npt.NDArray[np.int32], stop_token_id: int) -> int:
    """Do the same over objects."""
    num_ended = 0
    for sequence, token in zip(sequences, token_ids.tolist(), strict=True):
        sequence.num_tokens += 1
        sequence.num_computed_tokens += 1
        sequence.token_ids.append(token)
        if token == stop_token_id or sequence.num_tokens >= sequence.max_num_tokens:
            num_ended += 1
    return num_ended


def make_core(
    num_seqs: int, context_tokens: int, num_steps: int, block_size: int = BLOCK_SIZE, *, overlap: bool = False
) -> EngineCore:
    """Return a core whose limits hold so many sequences of that length for so many steps."""
    tokens = context_tokens + num_steps + 2 * block_size
    limits = SchedulerLimits(
        vocab_size=50_000,
        max_model_len=tokens,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(8192, num_seqs),
        num_blocks=num_seqs * (tokens // block_size + 2),
        block_size=block_size,
        eos_token_ids=frozenset({0}),
        model_id="null",
        max_steps_in_flight=2 if overlap else 1,
    )
    return EngineCore(Scheduler(limits, time.monotonic), NullRunner())


def measure_steps(num_seqs: int, context_tokens: int, num_steps: int = 256, *, overlap: bool = False) -> StepCost:
    """Measure steady decode, step and loops in turns."""
    # The first sequences decode while the last prompts still run.
    max_tokens = num_steps + num_seqs * context_tokens // 8192 + num_seqs + 8
    core = make_core(num_seqs, context_tokens, max_tokens, overlap=overlap)
    rng = np.random.default_rng(0)
    for i in range(num_seqs):
        # Lengths that differ spread the steps in which rows need a block, as they are in real load.
        prompt = rng.integers(1, 50_000, context_tokens - int(rng.integers(BLOCK_SIZE))).tolist()
        core.add_request(str(i), prompt, SamplingParams(max_tokens=max_tokens))
    scheduler = core.scheduler
    while scheduler.stats.num_waiting or not _all_decode(scheduler):
        core.step()
    _check(core, num_seqs)
    out = deque(work for work, _ in core._flights)
    table = RowTable(num_seqs, num_steps + 1, 1)
    table.max_num_tokens[:] = num_steps + 1
    sequences = [_Sequence(0, 0, num_steps + 1) for _ in range(num_seqs)]
    tokens = np.full(num_seqs, TOKEN, dtype=np.int32)
    output = ModelOutput(tokens)
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(num_steps):
        moments = [time.perf_counter()]
        work = scheduler.schedule()
        assert work is not None
        out.append(work)
        scheduler.update(out.popleft(), output)
        moments.append(time.perf_counter())
        array_loop(table, tokens, 0)
        moments.append(time.perf_counter())
        object_loop(sequences, tokens, 0)
        moments.append(time.perf_counter())
        for kind, begin, end in zip(times, moments, moments[1:], strict=False):
            kind.append(1e6 * (end - begin))
    _check(core, num_seqs)
    step_us, array_us, object_us = times
    return StepCost(
        num_seqs=num_seqs,
        context_tokens=context_tokens,
        overlap=overlap,
        median_us=statistics.median(step_us),
        mean_us=statistics.fmean(step_us),
        p99_us=sorted(step_us)[int(0.99 * num_steps)],
        array_loop_us=statistics.median(array_us),
        object_loop_us=statistics.median(object_us),
    )


def _all_decode(scheduler: Scheduler) -> bool:
    return all(scheduler.rows.num_tokens[r.row] > r.num_prompt_tokens for r in scheduler.running_requests())


def _check(core: EngineCore, num_seqs: int) -> None:
    """Refuse to time a scheduler that is wrong."""
    core.scheduler.check_integrity()
    running = core.scheduler.running_requests()
    assert len(running) == num_seqs, f"{len(running)} of {num_seqs} sequences run"
    for request in running:
        outputs = core.scheduler.rows.output_token_ids(request)
        assert outputs == [TOKEN] * len(outputs), f"{request.request_id} has the wrong tokens"


def measure_admission(prompt_tokens: int = 1024, block_size: int = BLOCK_SIZE, repeats: int = 40) -> AdmissionCost:
    """Measure the step that admits one prompt to an idle engine."""
    core = make_core(4, prompt_tokens, repeats * prompt_tokens, block_size)
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"cold": [], "hit": []}
    for i in range(repeats):
        prompt = rng.integers(1, 50_000, prompt_tokens).tolist()
        for name, kind in times.items():
            core.add_request(f"{name}{i}", prompt, SamplingParams(max_tokens=1))
            begin = time.perf_counter()
            work = core.scheduler.schedule()
            kind.append(1e6 * (time.perf_counter() - begin))
            assert work is not None
            assert (work.num_computed_tokens[0] > 0) == (name == "hit"), f"{name}: {work.num_computed_tokens}"
            core.scheduler.update(work, core.runner.execute(work))
    assert not core.has_unfinished
    return AdmissionCost(prompt_tokens, block_size, *(statistics.median(kind) for kind in times.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what scheduling costs on the host.")
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name} to benchmarks/results/")
    args = parser.parse_args()
    steps: list[StepCost] = []
    print("steady decode, microseconds a step: schedule + update")
    heads = ("running", "context", "overlap", "median", "mean", "p99", "loop", "ratio", "objects")
    print(" ".join(f"{head:>8}" for head in heads))
    for num_seqs in NUM_SEQS:
        for context_tokens, overlap in product(CONTEXT_TOKENS, (False, True)):
            cost = measure_steps(num_seqs, context_tokens, overlap=overlap)
            steps.append(cost)
            costs = (cost.median_us, cost.mean_us, cost.p99_us, cost.array_loop_us, cost.ratio, cost.object_loop_us)
            print(
                f"{num_seqs:8} {context_tokens:8} {'yes' if overlap else 'no':>8}", *(f"{each:8.2f}" for each in costs)
            )
    admissions = [measure_admission(block_size=block_size) for block_size in (16, 64)]
    for admission in admissions:
        print(
            f"admission of {admission.prompt_tokens} tokens in blocks of {admission.block_size}: "
            f"{admission.cold_us:.1f} us cold, {admission.hit_us:.1f} us as a hit"
        )
    if args.json:
        RESULTS.parent.mkdir(exist_ok=True)
        report = {
            "machine": f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
            "steps": [asdict(cost) | {"ratio": cost.ratio} for cost in steps],
            "admissions": [asdict(admission) for admission in admissions],
        }
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
