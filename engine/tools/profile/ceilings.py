"""This module holds what the machine does at best, measured in the same run. It does not know what is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..bench.kernels import Clock
from ..bench.machine import machine
from ..report import Ceiling

__all__ = ["describe_machine", "measure_ceilings"]

COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
CACHED_BYTES = 1 << 18
"""Of a second copy on a CPU, which stays within its caches, as the small calls there do."""
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def measure_ceilings(
    clock: Clock, dtype: torch.dtype, num_rounds: int = 3
) -> tuple[list[Ceiling], dict[str, list[float]]]:
    """Measure what the machine does at best: copy memory, and multiply random matrices.

    Returns:
        The rates of the fastest rounds, the highest first, and the seconds of all rounds by name.
    """
    device, kind = clock.device, clock.device.type
    # Random, as zeros take less power and so run faster than data will.
    a, b = (torch.randn(MATMUL_SIZE[kind], MATMUL_SIZE[kind], device=device).to(dtype) for _ in range(2))
    copied = {"a copy in memory": COPY_BYTES[kind]} | ({"a copy in its caches": CACHED_BYTES} if kind == "cpu" else {})
    calls: dict[str, Callable[[], object]] = {"matmul": partial(torch.mm, a, b, out=torch.empty_like(a))}
    for name, num_bytes in copied.items():
        source = torch.ones(num_bytes // 4, device=device)
        calls[name] = partial(torch.empty_like(source).copy_, source)
    for call in calls.values():
        call()
    rounds = [{name: statistics.median(clock.samples(call)) for name, call in calls.items()} for _ in range(num_rounds)]
    seconds = {name: [each[name] for each in rounds] for name in calls}
    flops_per_s, where = 2 * MATMUL_SIZE[kind] ** 3 / min(seconds["matmul"]), "CPU" if kind == "cpu" else "GPU"
    # What is copied is read once and written once.
    ceilings = [
        Ceiling(f"this {where}, measured: {name}", 2 * num_bytes / min(seconds[name]), flops_per_s)
        for name, num_bytes in copied.items()
    ]
    return ceilings[::-1], seconds


def describe_machine(device: str) -> dict[str, Any]:
    """Return what times depend on and no code changes: two runs compare only where this is equal."""
    return {name: value for name, value in machine(device).items() if name != "torch"}
