# ruff: noqa: N803 (compile-time constants are in capitals)
"""This module holds kernels that the tests of the interpreter run. It does not know what they show."""

from __future__ import annotations

import triton
import triton.language as tl

LINES = ("b_x = tl.load(p_x + o_x)", "tl.store(p_out + o_x, b_x)", "tl.atomic_add(p_sum + o_x, b_x)")
"""The three memory operations of `shifted`, without their shifts."""


@triton.jit
def cast(p_x, p_out, num, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < num)
    tl.store(p_out + o_x, b_x.to(p_out.dtype.element_ty), mask=o_x < num)


@triton.jit
def truncate(p_x, p_out):
    tl.store(p_out, tl.load(p_x).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def arithmetic(p_x, p_y, p_out, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    b_x, b_y = tl.load(p_x + o_x), tl.load(p_y + o_x)
    tl.store(p_out + o_x, (b_x * b_y + b_x) * (b_y - 2.5))


@triton.jit
def extremes(p_x, p_y, p_out, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    b_x, b_y = tl.load(p_x + o_x), tl.load(p_y + o_x)
    tl.store(p_out + o_x, tl.where(b_x < b_y, tl.maximum(b_x, b_y), tl.full((BLOCK,), 0.5, b_x.dtype)))


@triton.jit
def maximum(p_x, p_y, p_out, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    tl.store(p_out + o_x, tl.maximum(tl.load(p_x + o_x), tl.load(p_y + o_x)))


@triton.jit
def clamped(p_x, p_y, p_out, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    b_y = tl.abs(tl.load(p_y + o_x))
    tl.store(p_out + o_x, tl.clamp(tl.load(p_x + o_x), -b_y, b_y))


@triton.jit
def negated(p_x, p_y, p_out, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    tl.store(p_out + o_x, -tl.load(p_x + o_x) + tl.abs(tl.load(p_y + o_x)))


@triton.jit
def fused(p_x, p_y, p_out, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x)
    tl.store(p_out + o_x, tl.fma(b_x, tl.load(p_y + o_x), b_x))


@triton.jit
def dot(p_x, p_y, p_out, PRECISION: tl.constexpr):
    o_x = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    b_out = tl.dot(tl.load(p_x + o_x), tl.load(p_y + o_x), input_precision=PRECISION)
    tl.store(p_out + o_x, b_out)


@triton.jit
def shifted(p_x, p_out, p_sum, load_by, store_by, atomic_by, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    p_x += load_by
    b_x = tl.load(p_x + o_x)
    p_out += store_by
    tl.store(p_out + o_x, b_x)
    p_sum += atomic_by
    tl.atomic_add(p_sum + o_x, b_x)


@triton.jit
def _load(p_x, o_x):
    return tl.load(p_x + o_x)


@triton.jit
def through_a_helper(p_x, p_out, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    tl.store(p_out + o_x, _load(p_x, o_x))


@triton.jit
def masked(p_x, p_out, num, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    tl.store(p_out + o_x * 1000, tl.load(p_x + o_x * 1000, mask=o_x < 1), mask=o_x < 1)
    tl.store(p_out + o_x, tl.load(p_x + o_x, mask=o_x < num), mask=o_x < num)


@triton.jit
def far(p_x, p_out, i_block, stride, WIDE: tl.constexpr):
    offset = i_block.to(tl.int64) * stride if WIDE else i_block * stride
    tl.store(p_out, tl.load(p_x + offset))
