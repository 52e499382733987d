"""This module holds what launchers ask of the machine they launch on. It does not know any kernel.

A launch configuration is a pure function of shapes, dtypes and the target, so that the set of compiled variants can be
listed from an engine's configuration alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from ..dispatch import interpreted

__all__ = ["Target", "cdiv", "next_power_of_2", "target"]


@dataclass(frozen=True, slots=True)
class Target:
    """What kernels are compiled for."""

    arch: int
    """Compute capability times ten: 80, 89, 90, 100, 120."""
    num_sms: int
    """Streaming multiprocessors; the grid of a persistent kernel."""
    shared_bytes: int
    """Shared memory that one program can have."""


def target(device: torch.device) -> Target:
    """Return the target of one device: of the active Triton driver, or what the interpreter stands in for."""
    if interpreted():
        # Few programs, so that a persistent loop has several rounds.
        return Target(arch=90, num_sms=2, shared_bytes=232_448)
    return _driver_target(device.index or 0)


@functools.cache
def _driver_target(index: int) -> Target:
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(index)
    return Target(
        arch=int(driver.get_current_target().arch),
        num_sms=int(properties["multiprocessor_count"]),
        shared_bytes=int(properties["max_shared_mem"]),
    )


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least n (1 for n below 1)."""
    return 1 << max(n - 1, 0).bit_length()
