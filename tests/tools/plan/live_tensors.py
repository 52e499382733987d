"""This module holds a count of the bytes of tensors that are alive while something runs. It does not know what runs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LiveTensors"]


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of storages made inside it, from the first tensor over each to the end of the last.

    What Triton's interpreter makes of a kernel's arguments is left out: a GPU has no such copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._counts: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if "aten.set_" in str(func):
            return out
        given = {_place(one) for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._see(tensor, given)
        return out

    def _see(self, tensor: torch.Tensor, given: set[int]) -> None:
        place, num_bytes = _place(tensor), tensor.untyped_storage().nbytes()
        if not num_bytes or (place in given and place not in self._counts):
            return
        if place not in self._counts:
            self._now += num_bytes
            self.peak = max(self.peak, self._now)
        self._counts[place] = self._counts.get(place, 0) + 1
        weakref.finalize(tensor, self._forget, place, num_bytes)

    def _forget(self, place: int, num_bytes: int) -> None:
        self._counts[place] -= 1
        if not self._counts[place]:
            del self._counts[place]
            self._now -= num_bytes


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
