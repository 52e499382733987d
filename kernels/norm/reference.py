"""This module holds the normalisation ops in plain torch. It does not know Triton."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from ..common.checks import check_float, check_out, check_shape

__all__ = ["layer_norm", "rms_norm"]


def _add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return x
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual is {tuple(residual.shape)} {residual.dtype}; x is {tuple(x.shape)} {x.dtype}")
    return residual.add_(x)


@functools.cache
def _roots(size: int, eps: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return sqrt(size) and sqrt(size * eps) as tensors."""
    return (
        torch.tensor(math.sqrt(size), dtype=dtype, device=device),
        torch.tensor(math.sqrt(size * eps), dtype=dtype, device=device),
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """See `octavo.kernels.rms_norm`."""
    check_float("x", x)
    check_shape("weight", weight, (x.shape[-1],))
    check_out(out, x.shape, x)
    x = _add_residual(x, residual)
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == compute_dtype and not weight_offset and weight.dtype == x.dtype:
        # sqrt(mean(x²) + eps) = hypot(|x|, sqrt(n eps)) / sqrt(n): between two projections, whose weights sweep the
        # CPU's caches, every further call costs microseconds even on one row (measured 28 us, torch's rms_norm 32).
        root_n, offset = _roots(x.shape[-1], eps, x.dtype, x.device)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.mul(x, torch.div(root_n, torch.hypot(norm, offset)), out=out).mul_(weight)
    wide = x.to(compute_dtype)
    gain = weight.to(compute_dtype)
    if weight_offset:
        gain = gain + weight_offset
    inverse = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    y = (wide * inverse).mul_(gain)
    if out is not None:
        return out.copy_(y)
    return y.to(x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `octavo.kernels.layer_norm`."""
    check_float("x", x)
    check_shape("weight", weight, (x.shape[-1],))
    if bias is not None:
        check_shape("bias", bias, (x.shape[-1],))
    check_out(out, x.shape, x)
    x = _add_residual(x, residual)
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    wide_bias = None if bias is None else bias.to(compute_dtype)
    y = functional.layer_norm(x.to(compute_dtype), (x.shape[-1],), weight.to(compute_dtype), wide_bias, eps)
    if out is not None:
        return out.copy_(y)
    return y.to(x.dtype)
