"""This module counts the kernels that are compiled while a process runs. It does not know which there are.

Compiling takes seconds, so a process that serves does it before, and calls `mark_warm`; what is compiled from then on
is a stall that somebody waits for, and a variant that the warm-up should have met.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any, Final

from triton import knobs

__all__ = ["COMPILED", "Compiled", "describe_variant"]

_log = logging.getLogger("octavo.kernels")


def describe_variant(specialization: str) -> str:
    """Return a variant as text: arguments with types, :16 for a multiple of 16, constants with values, launch options.

    Args:
        specialization: Triton's own description, JSON.
    """
    data = json.loads(specialization)
    names = list(data["signature"])
    constants = {
        names[path[0]]: value for path, value in zip(data["constant_keys"], data["constant_vals"], strict=True)
    }
    divisible = {names[path[0]] for path, found in zip(data["attrs_keys"], data["attrs_vals"], strict=True) if found}
    arguments = [
        f"{name}={constants[name]}" if name in constants else f"{name}: {kind}{':16' if name in divisible else ''}"
        for name, kind in data["signature"].items()
    ]
    return ", ".join([*arguments, *(f"{name}={data['options'][name]}" for name in ("num_warps", "num_stages"))])


@dataclass(slots=True)
class Compiled:
    """Counts since `watch`; a kernel that Triton found in its cache on disk counts as well: loading takes time, too."""

    num_kernels: int = 0
    num_late: int = 0
    """After `mark_warm`."""
    is_warm: bool = False
    _hook: Any = None
    _warned: set[str] = field(default_factory=set)

    def watch(self) -> None:
        """Start to count; once more does nothing, and whoever else listens to Triton still hears of every kernel."""
        if self._hook is not None and knobs.runtime.jit_post_compile_hook is self._hook:
            return
        following = knobs.runtime.jit_post_compile_hook

        def hook(**event: Any) -> Any:
            self._count(event["fn"].name, event["compile"]["specialization_data"])
            return None if following is None else following(**event)

        knobs.runtime.jit_post_compile_hook = self._hook = hook

    def mark_cold(self) -> None:
        """Say that a warm-up begins: of an engine, or of one more in this process."""
        self.watch()
        self.is_warm = False

    def mark_warm(self) -> None:
        """Say that from now on nothing should need to be compiled."""
        self.watch()
        self.is_warm = True

    def _count(self, kernel: str, specialization: str) -> None:
        self.num_kernels += 1
        if not self.is_warm:
            return
        self.num_late += 1
        if kernel not in self._warned:
            self._warned.add(kernel)
            variant = describe_variant(specialization)
            _log.warning("kernel %s was compiled after warm-up, which delayed a step: %s", kernel, variant)


COMPILED: Final = Compiled()
"""The process's one counter: Triton has one hook."""
