"""This package holds the activations of a decoder's MLP. It does not know the matrices around them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..dispatch import active

__all__ = ["Activation", "gated_activation", "ungated_activation"]

Activation = Literal["silu", "gelu", "gelu_tanh"]


def gated_activation(x: Tensor, kind: Activation, *, out: Tensor | None = None) -> Tensor:
    """Compute activation(gate) · up, in float32 at least and rounded once.

    Args:
        x: [num_tokens, 2 * intermediate_size] float: the gate first, then up.
        kind: silu is g·sigmoid(g); gelu is the exact one (erf), gelu_tanh its tanh approximation.
        out: [num_tokens, intermediate_size], dtype of x, written and returned.
    """
    y: Tensor = active["gated_activation"](x, kind, out=out)
    return y


def ungated_activation(x: Tensor, kind: Activation, *, out: Tensor | None = None) -> Tensor:
    """Compute activation(x) elementwise, in float32 at least and rounded once.

    Args:
        x: [num_tokens, intermediate_size] float.
        kind: as in `gated_activation`.
        out: shape and dtype of x, written and returned; may be `x` itself.
    """
    y: Tensor = active["ungated_activation"](x, kind, out=out)
    return y
