"""This module holds what can be found out about the machine. It does not know what is made of it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .errors import ConfigError
from .resolve import Hardware

__all__ = ["detect", "free_gpu_bytes", "is_out_of_memory", "peak_gpu_bytes"]


MIN_CAPABILITY = (8, 0)
"""Of the GPUs that the kernels are made for: Ampere, and what came after it."""


def detect(device: Literal["auto", "cpu", "cuda"], backend: Literal["auto", "torch", "triton"] = "auto") -> Hardware:
    """Describe the device to run on: a GPU the kernels are made for, where there is one, else the CPU.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if device == "cuda" and (capability is None or capability < MIN_CAPABILITY):
        found = "no CUDA device is visible" if capability is None else f"the GPU's capability is {capability}"
        raise ConfigError(f"device is 'cuda' and {found}; allowed: cpu, auto, or a GPU of capability 8.0 or higher")
    # The torch backend is made for CPUs: it uses a GPU only where it is asked to.
    usable = capability is not None and capability >= MIN_CAPABILITY and backend != "torch"
    if device == "cuda" or (device == "auto" and usable):
        return Hardware("cuda", torch.cuda.get_device_name(), free_gpu_bytes())
    threads = torch.get_num_threads()
    return Hardware("cpu", f"this CPU ({threads} thread{'s' if threads > 1 else ''})", available_memory_bytes())


def free_gpu_bytes() -> int:
    """Return the bytes of the GPU that can still be taken, once torch has given back what it keeps for later: of an
    engine that is no more almost all that it had.
    """
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def peak_gpu_bytes(run: Callable[[], object]) -> int:
    """Run something on the GPU and return the most bytes of tensors it held at once, beside those that stay: what there
    was before, and what libraries keep from their first call on.
    """
    import torch

    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak_bytes = int(torch.cuda.max_memory_allocated())
    gc.collect()
    return peak_bytes - int(torch.cuda.memory_allocated())


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory has run out: torch's allocator does so in a class of its own, the CUDA driver
    (through torch, where a graph is captured, or Triton), cuBLAS and torch on a CPU only in words.
    """
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


def available_memory_bytes() -> int:
    """Return the bytes that this process can still take: the kernel's own estimate, within its cgroup's limit.

    Where the kernel gives none (on macOS), half of the memory there is.
    """
    available = _fields(Path("/proc/meminfo")).get("MemAvailable:", 0) * 1024
    if not available:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    if limit.isdigit():
        used = int(_read(Path("/sys/fs/cgroup/memory.current")).strip() or 0)
        # Files read lately count as used and are given up on demand: a model just downloaded, for one.
        cached = _fields(Path("/sys/fs/cgroup/memory.stat")).get("inactive_file", 0)
        available = min(available, int(limit) - max(0, used - cached))
    return available


def num_cores() -> int:
    """Return how many cores this process may keep busy."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines "name number ..."."""
    lines = [line.split() for line in _read(path).splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
