"""This module holds the dense projection and how its weight is stored. It does not know what it projects.

On a CPU in float32 a weight [out, in] can be copied once into one of two quicker forms, and the plain one dropped.
Measured on two AVX-512 cores, all projections of SmolLM2-135M together, in ms by the number of rows:

    rows                                1     4     8    16    32    64   256
    plain                              16    27    34    41    47    67   190
    transposed, [in, out]              15    27    32    40    42    58   185
    packed, oneDNN's blocked layout    20    20    24    30    41    67   181
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

__all__ = ["INVARIANT_ROWS", "Layout", "Linear", "usable_layout"]

INVARIANT_ROWS = 64
"""Rows of every GEMM in invariant mode: a float32 product may round differently when the number of rows changes."""


Layout = Literal["plain", "transposed", "packed"]


def usable_layout(wanted: Layout, device: torch.device, dtype: torch.dtype) -> Layout:
    """Return the layout wanted where this device and dtype have it, else "plain"."""
    has_it = device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return wanted if has_it else "plain"


class Linear:
    """y = x W^T + b.

    Args:
        weight: [out, in]; kept, so that another module may share it, where the layout is plain, else copied.
        layout: how to store it, where this device and dtype have the choice.
        invariant: run fixed tiles of `INVARIANT_ROWS` rows, so that a row's bits do not depend on how many there are.
    """

    def __init__(self, weight: torch.Tensor, *, layout: Layout = "packed", invariant: bool = False) -> None:
        self._layout = usable_layout(layout, weight.device, weight.dtype)
        if self._layout == "packed":
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        elif self._layout == "transposed":
            weight = weight.t().clone(memory_format=torch.contiguous_format)
        self._weight = weight
        self.bias: torch.Tensor | None = None
        """[out]; a checkpoint may hold it anywhere, so it is given when it comes."""
        self._invariant = invariant
        self.tap: Callable[[torch.Tensor, torch.Tensor], object] | None = None
        """Called with every input and output, for tools that look on; None: nobody does."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Project [T, in] to [T, out]."""
        y = self._tiles(x) if self._invariant else self._product(x)
        if self.tap is not None:
            self.tap(x, y)
        return y

    def _tiles(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -num_rows % INVARIANT_ROWS))
        tiles = [self._product(tile) for tile in padded.split(INVARIANT_ROWS)]
        return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:num_rows]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._layout == "packed":
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        if self._layout == "transposed":
            return torch.mm(x, self._weight) if self.bias is None else torch.addmm(self.bias, x, self._weight)
        return F.linear(x, self._weight, self.bias)
