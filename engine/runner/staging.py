"""This module holds how a step's numbers cross between host and device. It does not know what they mean.

Nothing here waits for the device but `HostCopy.wait`. What a copy reads or writes on the host is page-locked memory of
torch's own allocator, which hands none of it out again before the copy is done: so there is no ring of buffers to be
overrun, however many steps are on their way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["HostCopy", "Staging", "room_for"]

_ALIGNED = 4
"""Elements: every array begins at a multiple of 16 bytes, as kernels like it and 64-bit numbers need it."""


def room_for(*sizes: int) -> int:
    """Return the elements that arrays of these sizes take together."""
    return sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)


class Staging:
    """Packs arrays of one step and copies them to the device at once.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_remote = device.type == "cuda"
        self.num_copies = 0
        """So far: one for each call."""

    def upload(self, *arrays: npt.NDArray[np.int32], out: Tensor | None = None) -> list[Tensor]:
        """Return the arrays as tensors on the device.

        Args:
            arrays: [n] each.
            out: int32, of at least `room_for` their sizes: they are put at its beginning, in their order. None: in
                memory of their own.
        """
        starts, size = [], 0
        for array in arrays:
            starts.append(size)
            size += room_for(len(array))
        host = torch.empty(size, dtype=torch.int32, pin_memory=self._is_remote)
        packed = host.numpy()
        for start, array in zip(starts, arrays, strict=True):
            packed[start : start + len(array)] = array
        to = self._device
        device = host.to(to, non_blocking=True) if out is None else out[:size].copy_(host, non_blocking=True)
        self.num_copies += 1
        return [device[start : start + len(array)] for start, array in zip(starts, arrays, strict=True)]


class HostCopy:
    """Tensors on their way to the host, behind all that the device has been given to do.

    Args:
        tensors: on `device`; not written any more.
        device: where they are; also for none of them, to wait for the device.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors = list(tensors)
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[Tensor]:
        """Return them once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
