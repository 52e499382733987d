"""This module holds which machine this is and what it does at best in the same run. It does not know what is timed."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..bench.kernels import Clock
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
    device = clock.device
    is_cpu, size = device.type == "cpu", MATMUL_SIZE[device.type]
    # Random, as zeros take less power and so run faster than data will.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    copied = {"a copy in memory": COPY_BYTES[device.type]} | ({"a copy in its caches": CACHED_BYTES} if is_cpu else {})
    calls: dict[str, Callable[[], object]] = {"matmul": lambda: torch.mm(a, b, out=product)}
    for name, num_bytes in copied.items():
        source = torch.ones(num_bytes // 4, device=device)
        calls[name] = partial(torch.empty_like(source).copy_, source)
    for call in calls.values():
        call()
    rounds = [{name: statistics.median(clock.samples(call)) for name, call in calls.items()} for _ in range(num_rounds)]
    seconds = {name: [each[name] for each in rounds] for name in calls}
    flops_per_s = 2 * size**3 / min(seconds["matmul"])
    where = "this CPU" if is_cpu else "this GPU"
    # What is copied is read once and written once.
    ceilings = [
        Ceiling(f"{where}, measured: {name}", 2 * num_bytes / min(seconds[name]), flops_per_s)
        for name, num_bytes in copied.items()
    ]
    return ceilings[::-1], seconds


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what times depend on: two runs compare only where this is equal."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(), "num_threads": None}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return {"device": name, "num_threads": torch.get_num_threads()}
