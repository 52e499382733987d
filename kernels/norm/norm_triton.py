# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds the normalisation ops as Triton kernels. It does not know the layers that use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_kernel_float, check_out, check_shape, check_side_by_side
from ..common.launch import next_power_of_2

__all__ = ["Config", "config", "layer_norm", "rms_norm"]

MAX_HIDDEN_SIZE = 16_384  # 32 float32 per thread of 16 warps; a wider row would spill


@dataclass(frozen=True, slots=True)
class Config:
    """How one call is launched."""

    block: int
    num_warps: int


def config(*, hidden_size: int) -> Config:
    """Return the launch settings of one row's length: 16 elements per thread, whatever the number of rows.

    The number of warps is the order of a row's sums: if it followed the batch, so would the bits.
    """
    block = next_power_of_2(hidden_size)
    return Config(block=block, num_warps=min(max(block // 512, 1), 16))


@triton.jit
def _load_sum(p_x, p_residual, o_dim, m_dim):
    """Return x, or what the residual holds once x is added to it, in float32: [BLOCK]."""
    b_x = tl.load(p_x + o_dim, mask=m_dim, other=0.0)  # [BLOCK]
    if p_residual is not None:
        b_residual = tl.load(p_residual + o_dim, mask=m_dim, other=0.0)  # [BLOCK]
        b_x = (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(b_x.dtype)
        tl.store(p_residual + o_dim, b_x, mask=m_dim)
    return b_x.to(tl.float32)


@triton.jit
def _inverse_root(square_sum, eps, HIDDEN_SIZE: tl.constexpr):
    """Return 1 / sqrt(square_sum / HIDDEN_SIZE + eps), each step rounded once: rsqrt alone may be off by two."""
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.math.div_rn(square_sum, 1.0 * HIDDEN_SIZE) + eps))


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    out,
    weight,
    eps,
    weight_offset,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = s / sqrt(mean(s²) + eps) · (weight + weight_offset); s = x, or residual += x as rounded.

    One program handles one row. Grid: (rows,).
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, BLOCK)
    m_dim = o_dim < HIDDEN_SIZE
    p_residual = residual if residual is None else residual + i_row * RESIDUAL_STRIDE
    b_weight = tl.load(weight + o_dim, mask=m_dim, other=0.0).to(tl.float32)  # [BLOCK]
    b_x = _load_sum(x + i_row * X_STRIDE, p_residual, o_dim, m_dim)  # [BLOCK]
    inverse = _inverse_root(tl.sum(b_x * b_x, axis=0), eps, HIDDEN_SIZE)
    b_out = b_x * inverse * (b_weight + weight_offset)  # [BLOCK]
    tl.store(out + i_row * OUT_STRIDE + o_dim, b_out.to(out.dtype.element_ty), mask=m_dim)


@triton.jit
def _layer_norm_kernel(
    x,
    residual,
    out,
    weight,
    bias,
    eps,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (s − mean(s)) / sqrt(var(s) + eps) · weight + bias; s = x, or residual += x as rounded.

    One program handles one row. Grid: (rows,).
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, BLOCK)
    m_dim = o_dim < HIDDEN_SIZE
    p_residual = residual if residual is None else residual + i_row * RESIDUAL_STRIDE
    b_weight = tl.load(weight + o_dim, mask=m_dim, other=0.0).to(tl.float32)  # [BLOCK]
    b_x = _load_sum(x + i_row * X_STRIDE, p_residual, o_dim, m_dim)  # [BLOCK]
    mean = tl.math.div_rn(tl.sum(b_x, axis=0), 1.0 * HIDDEN_SIZE)
    b_centred = tl.where(m_dim, b_x - mean, 0.0)  # [BLOCK]
    inverse = _inverse_root(tl.sum(b_centred * b_centred, axis=0), eps, HIDDEN_SIZE)
    b_out = b_centred * inverse * b_weight  # [BLOCK]
    if bias is not None:
        b_out += tl.load(bias + o_dim, mask=m_dim, other=0.0).to(tl.float32)
    tl.store(out + i_row * OUT_STRIDE + o_dim, b_out.to(out.dtype.element_ty), mask=m_dim)


def _launch(
    kernel: Any, x: Tensor, residual: Tensor | None, out: Tensor | None, *rest: Tensor | float | None
) -> Tensor:
    """Check what both norms share and launch one of them; `rest` are the kernel's own arguments."""
    check_kernel_float("x", x)
    hidden_size = x.shape[-1]
    if not 0 < hidden_size <= MAX_HIDDEN_SIZE:
        raise ValueError(f"x has {hidden_size} elements per row; the triton backend takes 1 to {MAX_HIDDEN_SIZE}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {tuple(residual.shape)} {residual.dtype}; x is {tuple(x.shape)} {x.dtype}")
    check_out(out, x.shape, x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    check_side_by_side(x=x, residual=residual, out=out)
    rows, written = x.view(-1, hidden_size), out.view(-1, hidden_size)
    sums = None if residual is None else residual.view(-1, hidden_size)
    settings = config(hidden_size=hidden_size)
    if len(rows):
        kernel[(len(rows),)](
            rows, sums, written, *rest, X_STRIDE=rows.stride(0), RESIDUAL_STRIDE=0 if sums is None else sums.stride(0),
            OUT_STRIDE=written.stride(0), HIDDEN_SIZE=hidden_size, BLOCK=settings.block, num_warps=settings.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


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
    check_shape("weight", weight, (x.shape[-1],))
    return _launch(_rms_norm_kernel, x, residual, out, weight.contiguous(), eps, weight_offset)


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
    check_shape("weight", weight, (x.shape[-1],))
    if bias is not None:
        check_shape("bias", bias, (x.shape[-1],))
        bias = bias.contiguous()
    return _launch(_layer_norm_kernel, x, residual, out, weight.contiguous(), bias, eps)
