"""This module holds the profile of an engine's steps: a small load is run, and every step taken apart. It does not know
how it is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from ...errors import ConfigError
from ...llm import LLM
from ...sampling_params import SamplingParams
from ...step import SchedulerOutput
from ..bench.machine import Yardstick
from ..roofline import StepWork
from .ceilings import describe_machine
from .history import STEP
from .probes import attached
from .spans import PartTime, Spans

__all__ = ["Load", "StepProfile"]

NUM_CALIBRATED: Final = 2000


class Load(NamedTuple):
    """What the engine is given to do in one round."""

    batch_sizes: Sequence[int] = (1, 8)
    """Requests of each batch; one batch after the other."""
    input_len: int = 128
    output_len: int = 32


class _Step(NamedTuple):
    """One step that was timed."""

    round: int
    batch_size: int
    kind: str
    """prefill, decode, or mixed."""
    work: StepWork
    seconds: float
    parts: dict[str, PartTime]

    @property
    def group(self) -> str:
        return f"{self.kind}, batch of {self.batch_size}"


class StepProfile:
    """Everything that is found out in one run.

    Args:
        llm: the engine; nothing else may use it meanwhile.
        load: what to run.
    """

    def __init__(self, llm: LLM, load: Load) -> None:
        self._llm, self._load = llm, load
        self._is_cuda = llm.engine.resolved.device != "cpu"
        make_event: Any = (lambda: torch.cuda.Event(enable_timing=True)) if self._is_cuda else None
        self._spans = Spans(make_event)
        self._steps: list[_Step] = []
        self.num_rounds = 0
        """Rounds that count and are over."""
        self._device_busy: float | None = None
        self._yardstick = Yardstick(llm.engine.resolved.device)

    @property
    def num_steps(self) -> int:
        """About how many steps a round has, for those who wait."""
        budget = self._llm.engine.resolved.max_num_batched_tokens
        sizes, (_, input_len, output_len) = self._load.batch_sizes, self._load
        return sum(-(-size * input_len // budget) + output_len - 1 for size in sizes)

    def run_round(self, *, counts: bool = True) -> Iterator[None]:
        """Run all batches once, each of new prompts; yields after every step.

        Args:
            counts: keep the times; not for a first round, which warms up.
        """
        if counts:
            self._yardstick.lay()
        with attached(self._llm, self._spans) as works:
            for batch_size in self._load.batch_sizes:
                yield from self._run_batch(batch_size, works, counts=counts)
        self.num_rounds += counts

    def trace(self, file: Path) -> Iterator[None]:
        """Run one more round under torch's profiler and write its Chrome trace; yields after every step.

        The profiler slows every operation down: of this round only the order and the proportions are true.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._is_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            self._spans.scope = torch.profiler.record_function
            try:
                yield from self.run_round(counts=False)
            finally:
                self._spans.scope = Spans().scope
        profiler.export_chrome_trace(str(file))
        kernels = [event.time_range for event in profiler.events() if event.device_type.name == "CUDA"]
        if self._is_cuda:
            self._device_busy = busy_part([(each.start, each.end) for each in kernels])

    def proton(self, file: Path) -> Iterator[None]:
        """Return what runs one more round under Triton's own profiler, step by step.

        Raises:
            ConfigError: there is no GPU.
        """
        if not self._is_cuda:
            raise ConfigError("--proton is given and the engine runs on a CPU; it needs a GPU, --trace does not")
        return self._under_proton(file)

    def _under_proton(self, file: Path) -> Iterator[None]:
        from octavo.kernels.profiling import proton_session

        with proton_session(file):
            yield from self.run_round(counts=False)

    def document(self) -> dict[str, Any]:
        """Return what was found, as plain JSON."""
        engine, names = self._llm.engine, ("dtype", "device", "backend", "block_size", "invariant")
        groups = list(dict.fromkeys(step.group for step in self._steps))
        about = {"model": engine.config.model, "fingerprint": engine.fingerprint}
        about |= {name: getattr(engine.resolved, name) for name in (*names, "max_num_batched_tokens")}
        return {
            "format": STEP,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "about": {**about, "load": {**self._load._asdict(), "batch_sizes": list(self._load.batch_sizes)}},
            "versions": {"torch": str(torch.__version__)},
            "machine": describe_machine(engine.resolved.device),
            "yardsticks_s": {"copy and product": self._yardstick.seconds},
            "metrics": dict(self._metrics(groups)),
            "groups": [self._group(name) for name in groups],
            "steps": [
                {"round": step.round, "batch_size": step.batch_size, "kind": step.kind, **step.work._asdict()}
                | {"seconds": step.seconds}
                for step in self._steps
            ],
            "span_s": span_cost_s(),
            "device_busy": self._device_busy,
        }

    def _run_batch(self, batch_size: int, works: list[SchedulerOutput], *, counts: bool) -> Iterator[None]:
        llm, (_, input_len, output_len) = self._llm, self._load
        rng = np.random.default_rng([self.num_rounds, batch_size, counts, len(self._steps)])
        params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        width = llm.engine.model_config.vocab_size if llm.engine.tokenizer is None else llm.tokenizer.vocab_size
        waiting = {llm.add(rng.integers(width, size=input_len).tolist(), params) for _ in range(batch_size)}
        self._spans.take()
        try:
            while waiting:
                works.clear()
                finished = {output.request_id for output in llm.step() if output.finished}
                if self._is_cuda:
                    torch.cuda.synchronize()
                seconds, parts = self._spans.take()
                if counts and works:
                    kind, work = describe_work(works[0])
                    self._steps.append(_Step(self.num_rounds, batch_size, kind, work, seconds, parts))
                waiting -= finished
                yield
        finally:
            for request_id in waiting:
                llm.abort(request_id)

    def _group(self, name: str) -> dict[str, Any]:
        """Return a mean step of one kind, and each part of it."""
        steps = [step for step in self._steps if step.group == name]
        total_s, num_steps = sum(step.seconds for step in steps), len(steps)
        found: dict[str, dict[str, float]] = {}
        for step in steps:
            for key, part in step.parts.items():
                whole = found.setdefault(key, dict.fromkeys(asdict(part), 0.0))
                for field, value in asdict(part).items():
                    whole[field] += value
        tokens_per_s = sum(step.work.num_tokens for step in steps) / total_s
        told = {"name": name, "num_steps": num_steps, "seconds": total_s / num_steps, "tokens_per_s": tokens_per_s}
        means = {key: {field: value / num_steps for field, value in sums.items()} for key, sums in found.items()}
        return told | {"parts": means}

    def _metrics(self, groups: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what a history follows: a step of each kind and its parts, as a mean of every round."""
        for group in groups:
            steps = [step for step in self._steps if step.group == group]
            rounds = [[step for step in steps if step.round == number] for number in range(self.num_rounds)]
            rounds = [each for each in rounds if each]
            yield f"{group}: a step", _metric(rounds, lambda step: step.seconds)
            for part in dict.fromkeys(key for steps in rounds for step in steps for key in step.parts):
                yield f"{group}: {part}", _metric(rounds, lambda step, part=part: _part_s(step, part))  # type: ignore[misc]


def _part_s(step: _Step, part: str) -> float:
    return step.parts[part].seconds if part in step.parts else 0.0


def _metric(rounds: Sequence[Sequence[_Step]], value: Callable[[_Step], float]) -> dict[str, Any]:
    means = [statistics.fmean(map(value, steps)) for steps in rounds]
    return {"unit": "s", "kind": "timed", "values": means}


def describe_work(step: SchedulerOutput) -> tuple[str, StepWork]:
    """Return what kind of step this is, and how much it has to do."""
    lengths = list(zip(step.num_scheduled_tokens.tolist(), step.num_computed_tokens.tolist(), strict=True))
    num_decodes = sum(query_len == 1 and computed > 0 for query_len, computed in lengths)
    kind = "decode" if num_decodes == len(lengths) else "mixed" if num_decodes else "prefill"
    return kind, StepWork.of([(query_len, computed + query_len) for query_len, computed in lengths], len(step.sampled))


def busy_part(ranges: Sequence[tuple[float, float]]) -> float:
    """Return which part of the time from the first beginning to the last end lies within ranges, which may overlap."""
    busy, reached = 0.0, -np.inf
    for begin, end in sorted(ranges):
        busy += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return busy / (reached - min(ranges)[0]) if ranges else 0.0


def span_cost_s() -> float:
    """Return what the stopwatch itself costs each time, measured here."""
    spans = Spans()
    nothing = spans.wrap("nothing", lambda: None)
    whole = spans.wrap("whole", lambda: [nothing() for _ in range(NUM_CALIBRATED)])
    whole()
    return spans.take()[0] / NUM_CALIBRATED
