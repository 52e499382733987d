"""This module holds what this machine's CPU reaches, measured in about a second. It does not know any model."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..config import DTypeName
from ..hardware import detect
from .gpus import Gpu

__all__ = ["measure_cpu"]

COLUMNS = 4096
READ_ROWS = 16_384
"""Of a matrix that no cache holds: 256 MiB in float32."""
GEMM_ROWS = (256, 1024)
NUM_RUNS = 3


def measure_cpu(dtype: DTypeName) -> Gpu:
    """Measure how fast this CPU reads a matrix once and multiplies two, with the threads that torch has.

    The best of several runs counts: what else the machine does makes them slower, nothing makes them faster.

    Args:
        dtype: what to multiply; only its rate is known afterwards.
    """
    hardware = detect("cpu")
    with torch.inference_mode():
        bytes_per_s = _bytes_per_s()
        flops_per_s = _flops_per_s(getattr(torch, dtype))
    return Gpu(
        name="cpu",
        title=hardware.name,
        architecture="cpu",
        memory_bytes=hardware.available_bytes,
        bandwidth_bytes_per_s=bytes_per_s,
        flops={dtype: flops_per_s},
        num_sms=torch.get_num_threads(),
        source="measured just now",
    )


def _bytes_per_s() -> float:
    matrix, vector = torch.ones(READ_ROWS, COLUMNS), torch.ones(COLUMNS)
    return matrix.nbytes / _best_s(lambda: torch.mv(matrix, vector))


def _flops_per_s(dtype: torch.dtype) -> float:
    rows, inner = GEMM_ROWS
    x, weight = torch.ones(rows, COLUMNS, dtype=dtype), torch.ones(inner, COLUMNS, dtype=dtype)
    return 2 * rows * inner * COLUMNS / _best_s(lambda: torch.nn.functional.linear(x, weight))


def _best_s(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
