"""This package holds the normalisation ops. It does not know the layers that use them."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import active

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Compute x / sqrt(mean(x²) + eps) · (weight + weight_offset) over the last axis, in float32 at least.

    With `residual`, first `residual += x` in place, and the sum as rounded to residual's dtype is what is normalised.

    Args:
        x: [..., hidden_size] float; unchanged unless it is also `out`.
        weight: [hidden_size] float.
        residual: shape and dtype of x, overwritten.
        out: shape and dtype of x, written and returned; may be `x` itself.
    """
    y: Tensor = active["rms_norm"](x, weight, eps=eps, residual=residual, weight_offset=weight_offset, out=out)
    return y


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute (x − mean(x)) / sqrt(var(x) + eps) · weight + bias over the last axis, in float32 at least.

    `residual` and `out` as in `rms_norm`; the variance is the biased one.

    Args:
        x: [..., hidden_size] float.
        weight: [hidden_size] float.
        bias: [hidden_size] float, or None for zero.
    """
    y: Tensor = active["layer_norm"](x, weight, bias, eps=eps, residual=residual, out=out)
    return y
