"""This module holds a stand-in for Triton's driver that records launches. It does not know any kernel.

Triton specialises a kernel on its arguments (types, multiples of 16, ones) before it looks for a compiled one, and asks
a hook before it compiles. So the ordinary launchers, run with tensors that hold nothing on a driver that only names a
target, tell exactly the variants that a GPU would need. With tensors on the "meta" device an op that reads a tensor on
the host fails, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from .. import dispatch
from ..common import launch
from .targets import Gpu

__all__ = ["Launch", "fake_driver", "recording"]

LAUNCH_OPTIONS: Final = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_pdl")


@dataclass(frozen=True, slots=True)
class Launch:
    """One variant of a kernel: everything that its compilation depends on but the kernel's source."""

    module: str
    kernel: str
    target: str
    """The architecture it is compiled for: sm_90."""
    specialization: str
    """Triton's own description, JSON, from which the variant can be compiled in another process."""

    @property
    def constants(self) -> dict[str, Any]:
        """The values of the kernel's constants, and the launch options that differ from one variant to another."""
        options = self._data["options"]
        launched = {name: options[name] for name in LAUNCH_OPTIONS if name in options}
        return self._by_argument("constant_keys", "constant_vals") | launched

    @property
    def signature(self) -> dict[str, str]:
        """Argument -> its type, with :16 where it is known to be a multiple of 16; constants left out."""
        attributes = self._by_argument("attrs_keys", "attrs_vals")
        types = ((name, kind) for name, kind in self._data["signature"].items() if kind != "constexpr")
        return {name: f"{kind}{':16' if attributes.get(name) else ''}" for name, kind in types}

    @property
    def _data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.specialization)
        return data

    def _by_argument(self, keys: str, values: str) -> dict[str, Any]:
        data = self._data
        names = list(data["signature"])
        return {names[path[0]]: value for path, value in zip(data[keys], data[values], strict=True)}


class _Utils:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._gpu.shared_bytes - 1024,
            "max_num_regs": 65_536,
            "multiprocessor_count": self._gpu.num_sms,
            "warpSize": 32,
        }


class _FakeDriver:
    """What Triton asks of a driver up to the point where it would load a kernel."""

    def __init__(self, gpu: Gpu, device: int) -> None:
        self._arch, self._device = gpu.arch, device
        self.utils = _Utils(gpu)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def fake_driver(gpu: Gpu, device: int | None = None) -> Iterator[None]:
    """Make Triton compile for `gpu`, whatever this machine has, until the end of the `with` statement.

    Args:
        device: under which number Triton keeps what it has compiled; None: one for each architecture.
    """
    driver = triton.runtime.driver
    previous = driver._active
    driver.set_active(_FakeDriver(gpu, gpu.arch if device is None else device))
    launch._driver_target.cache_clear()
    try:
        yield
    finally:
        driver.set_active(previous)
        launch._driver_target.cache_clear()


@contextmanager
def recording(gpu: Gpu) -> Iterator[dict[Launch, None]]:
    """Run ops on the triton backend of a GPU that is not there: kernels are neither compiled nor run.

    Yields:
        The variants that were launched, in order, each once; what an op returns means nothing.
    """
    seen: dict[Launch, None] = {}

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        seen.setdefault(Launch(fn.module, fn.name, f"sm_{gpu.arch}", compile["specialization_data"]))
        return True  # Triton takes this for "do not compile", and launches nothing

    previous = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        # On a device of its own: what has been compiled for another would be launched, and the hook would not be asked.
        with fake_driver(gpu, -gpu.arch), dispatch.launching_nothing(), dispatch.use_backend("triton"):
            yield seen
    finally:
        knobs.runtime.jit_cache_hook = previous
