# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds the activations as Triton kernels. It does not know the matrices around them."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_choice, check_kernel_float, check_out, check_side_by_side
from ..common.launch import cdiv, next_power_of_2

__all__ = ["Config", "config", "gated_activation", "ungated_activation"]

_KINDS = ("silu", "gelu", "gelu_tanh")
# Powers of two: exp(x) = exp2(x · log2 e).
_MINUS_LOG2E = tl.constexpr(-1.4426950408889634)
_MINUS_TWO_LOG2E_ROOT = tl.constexpr(-2.302208198144325)  # -2 · log2 e · sqrt(2 / π)
_ROOT_HALF = tl.constexpr(0.7071067811865476)


@dataclass(frozen=True, slots=True)
class Config:
    """How one call is launched."""

    block: int
    num_warps: int


def config(*, size: int) -> Config:
    """Return the launch settings of one row's length: 8 elements per thread."""
    block = min(next_power_of_2(size), 2048)
    return Config(block=block, num_warps=max(block // 256, 1))


@triton.jit
def _activation_kernel(
    x,
    out,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = f(x), times the row's second half where GATED; f is g · sigmoid(g), g · Φ(g), or Φ's tanh approximation.

    One program handles BLOCK elements of one row. Grid: (rows, cdiv(SIZE, BLOCK)).
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_dim = o_dim < SIZE
    p_x = x + i_row * X_STRIDE + o_dim
    b_gate = tl.load(p_x, mask=m_dim, other=0.0).to(tl.float32)  # [BLOCK]
    if KIND == "gelu":
        b_out = 0.5 * b_gate * (1.0 + tl.math.erf(b_gate * _ROOT_HALF))  # [BLOCK]
    elif KIND == "silu":
        b_out = b_gate / (1.0 + tl.math.exp2(b_gate * _MINUS_LOG2E))
    else:
        # (1 + tanh(z)) / 2 is sigmoid(2z), which loses nothing far below 0.
        b_cubic = b_gate + 0.044715 * b_gate * b_gate * b_gate
        b_out = b_gate / (1.0 + tl.math.exp2(b_cubic * _MINUS_TWO_LOG2E_ROOT))
    if GATED:
        b_out *= tl.load(p_x + SIZE, mask=m_dim, other=0.0).to(tl.float32)
    tl.store(out + i_row * OUT_STRIDE + o_dim, b_out.to(out.dtype.element_ty), mask=m_dim)


def _launch(x: Tensor, kind: str, out: Tensor, *, gated: bool) -> Tensor:
    check_side_by_side(x=x, out=out)
    rows, written = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    size = written.shape[1]
    settings = config(size=size)
    if written.numel():
        _activation_kernel[(len(rows), cdiv(size, settings.block))](
            rows, written, X_STRIDE=rows.stride(0), OUT_STRIDE=written.stride(0), SIZE=size, KIND=kind, GATED=gated,
            BLOCK=settings.block, num_warps=settings.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def gated_activation(x: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """See `octavo.kernels.gated_activation`."""
    check_kernel_float("x", x)
    check_choice("kind", kind, _KINDS)
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [num_tokens, 2 * intermediate_size]")
    shape = (x.shape[0], x.shape[1] // 2)
    check_out(out, shape, x)
    return _launch(x, kind, x.new_empty(shape) if out is None else out, gated=True)


def ungated_activation(x: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """See `octavo.kernels.ungated_activation`."""
    check_kernel_float("x", x)
    check_choice("kind", kind, _KINDS)
    check_out(out, x.shape, x)
    return _launch(x, kind, x.new_empty(x.shape) if out is None else out, gated=False)
