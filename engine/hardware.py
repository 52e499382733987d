"""This module holds what can be found out about the machine. It does not know what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .errors import ConfigError
from .resolve import Hardware

__all__ = ["detect"]


def detect(device: Literal["auto", "cpu", "cuda"]) -> Hardware:
    """Describe the device to run on.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' and no CUDA device is visible; allowed: cpu, or auto")
    # The torch backend, the only one so far, is made for CPUs: a GPU is used only where it is asked for.
    if device == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        return Hardware("cuda", torch.cuda.get_device_name(), free_bytes)
    threads = torch.get_num_threads()
    return Hardware("cpu", f"this CPU ({threads} thread{'s' if threads > 1 else ''})", available_memory_bytes())


def available_memory_bytes() -> int:
    """Return the bytes that this process can still take: the kernel's own estimate, within its cgroup's limit."""
    available = 0
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    if not available:
        raise ConfigError("the machine's free memory cannot be read from /proc/meminfo; give kv_cache_tokens")
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    if limit.isdigit():
        used = _read(Path("/sys/fs/cgroup/memory.current")).strip()
        available = min(available, int(limit) - int(used or 0))
    return available


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
