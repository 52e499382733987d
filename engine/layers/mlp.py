"""This module holds the feed-forward block, gated or not. It does not know the norm in front of it."""

from __future__ import annotations

from typing import Literal

import torch
from octavo.kernels import gated_activation, ungated_activation

from .linear import Linear

__all__ = ["MLP"]


class MLP:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not gated.

    Args:
        up: [2 * intermediate, H], gate first, or [intermediate, H].
        down: [H, intermediate].
        kind: "silu", "gelu" or "gelu_tanh".
    """

    def __init__(self, up: Linear, down: Linear, kind: Literal["silu", "gelu", "gelu_tanh"], *, gated: bool) -> None:
        self.up = up
        self.down = down
        self._kind = kind
        self._activation = gated_activation if gated else ungated_activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map [T, H] to [T, H]."""
        return self.down(self._activation(self.up(x), self._kind))
