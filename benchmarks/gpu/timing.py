"""This module holds how long a call takes on a GPU whose second-level cache is cold. It does not know the calls."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

__all__ = ["Ceilings", "Clock", "CudaClock", "roofline", "summary"]

NUM_RUNS = 25
NUM_WARMUP = 3
FLUSH_BYTES = 1 << 30
"""Far beyond any second-level cache, and long enough to read that the host has queued the next call meanwhile."""

Call = Callable[[], object]


class Clock(Protocol):
    """Times calls; a test's may be made of numbers."""

    def samples(self, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        """Return seconds of each call's runs, the calls taking turns."""
        ...

    def graphed(self, call: Call) -> Call:
        """Return a replay of what a call launches."""
        ...


class CudaClock:
    """CUDA events around each run."""

    def __init__(self, num_runs: int = NUM_RUNS) -> None:
        self._num_runs = num_runs
        self._buffer = torch.ones(FLUSH_BYTES // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")

    def _flush(self) -> None:
        # By reading: lines that a fill leaves dirty would be written back during the run that is timed.
        torch.sum(self._buffer, dim=0, out=self._sum)

    def samples(self, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        for call in calls.values():
            for _ in range(NUM_WARMUP):
                call()
        events: dict[str, list[Any]] = {name: [] for name in calls}
        for _ in range(self._num_runs):
            for name, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush()
                start.record()
                call()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}

    def graphed(self, call: Call) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replay: Call = graph.replay
        return replay


class Ceilings(dict[str, float]):
    """What the machine reached in this run: `copy_bytes_per_s`, `matmul_flops_per_s`; empty where not measured."""


def summary(seconds: list[float]) -> dict[str, float]:
    """Return the median of some runs and how far they are spread, in microseconds."""
    ordered = sorted(seconds)
    return {
        "us": round(statistics.median(ordered) * 1e6, 3),
        "us_p10": round(ordered[len(ordered) // 10] * 1e6, 3),
        "us_p90": round(ordered[-1 - len(ordered) // 10] * 1e6, 3),
    }


def roofline(seconds: float, num_bytes: int, num_flops: int, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Return achieved rates, and the part of the time that the larger of the two ceilings alone would take."""
    facts: dict[str, Any] = {
        "bytes": num_bytes,
        "flops": num_flops,
        "gb_per_s": round(num_bytes / seconds / 1e9, 1),
        "tflop_per_s": round(num_flops / seconds / 1e12, 3),
    }
    if ceilings:
        moving = num_bytes / ceilings["copy_bytes_per_s"]
        computing = num_flops / ceilings["matmul_flops_per_s"]
        facts["bound_by"] = "memory" if moving >= computing else "arithmetic"
        facts["fraction"] = round(max(moving, computing) / seconds, 4)
    return facts
