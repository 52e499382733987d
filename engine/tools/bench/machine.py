"""This module names the machine that something was measured on, and measures the machine itself. It does not know what
else was measured.
"""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Any, Final

import torch

__all__ = ["Yardstick", "machine"]

COPY_ELEMENTS: Final = 1 << 23
MATMUL_SIZE: Final = 384
NUM_RUNS: Final = 5


class Yardstick:
    """A piece of work that never changes: where it takes longer, the machine is slower than it was.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._source = torch.ones(COPY_ELEMENTS, device=device)
        self._target = torch.empty_like(self._source)
        self._matrix = torch.ones((MATMUL_SIZE, MATMUL_SIZE), device=device)
        self.seconds: list[float] = []
        """What it took, each time it was laid on."""

    def lay(self) -> None:
        """Copy 32 MiB and multiply two matrices, five times over; note the median."""
        taken = []
        for _ in range(NUM_RUNS):
            start = time.perf_counter()
            self._target.copy_(self._source)
            torch.mm(self._matrix, self._matrix)
            if self._device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        self.seconds.append(statistics.median(taken))


def machine(device: str) -> dict[str, Any]:
    """Return the processor that did the work, and what it did it with.

    Args:
        device: "cpu" or "cuda".
    """
    facts: dict[str, Any] = {"torch": str(torch.__version__)}
    if device == "cuda":
        return facts | {"device": torch.cuda.get_device_name()}
    return facts | {"device": _cpu_name(), "num_threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
