# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds the KV-cache write as a Triton kernel. It does not know who owns a block.

A head's elements are held as three tiles: the first and the second of each pair that is rotated together, and the rest
past rotary_dim. A rotation then needs no exchange between threads, and every element is read once and by the thread
that writes it, which is what lets q change in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_choice, check_kernel_float, check_side_by_side, check_write_kv
from ..common.launch import cdiv, next_power_of_2
from ..rope.reference import RopeStyle

__all__ = ["Config", "config", "plan_write_kv", "write_kv"]

# 1.5 · 2**23: adding it to |x| < 2**22 leaves x, rounded half to even, in the low bits of the sum.
_ROUNDER = tl.constexpr(12582912.0)
# 2**14, whose last bit is worth 2**-9, the smallest e4m3: the same trick for what is below e4m3's normal numbers.
_E4M3_ROUNDER = tl.constexpr(16384.0)


@dataclass(frozen=True, slots=True)
class Config:
    """How one call is launched."""

    block_h: int
    """Heads of one program."""
    block_half: int
    """Pairs of a head, rounded up to a power of two."""
    block_rest: int
    """Elements past rotary_dim, rounded up to a power of two; 0: there are none."""
    num_warps: int


def config(*, head_dim: int, rotary_dim: int) -> Config:
    """Return the launch settings of one geometry: 8 elements of each half per thread, one wide load in bfloat16.

    Args:
        rotary_dim: elements held as pairs; without a rotation any even number up to head_dim.
    """
    half, rest = next_power_of_2(rotary_dim // 2), head_dim - rotary_dim
    return Config(
        block_h=8, block_half=half, block_rest=next_power_of_2(rest) if rest else 0, num_warps=max(half // 32, 1)
    )


@triton.jit
def _load_pairs(p_heads, m_head, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the first and the second of each pair of a head: two of [heads, BLOCK_HALF], zeros past HALF."""
    if INTERLEAVED:  # one wide load, split in registers
        o_dim = tl.arange(0, 2 * BLOCK_HALF)
        b_both = tl.load(p_heads + o_dim[None, :], mask=m_head & (o_dim[None, :] < 2 * HALF), other=0.0)
        b_first, b_second = tl.split(tl.reshape(b_both, (b_both.shape[0], BLOCK_HALF, 2)))
    else:
        o_dim = tl.arange(0, BLOCK_HALF)
        m_pair = m_head & (o_dim[None, :] < HALF)  # [heads, BLOCK_HALF]
        b_first = tl.load(p_heads + o_dim[None, :], mask=m_pair, other=0.0)  # [heads, BLOCK_HALF]
        b_second = tl.load(p_heads + HALF + o_dim[None, :], mask=m_pair, other=0.0)  # [heads, BLOCK_HALF]
    return b_first, b_second


@triton.jit
def _load_rest(p_heads, m_head, HALF: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr):
    """Return a head's elements past its pairs, zeros past REST: [heads, BLOCK_REST]; where there are none, one zero."""
    if REST:
        o_dim = tl.arange(0, BLOCK_REST)
        return tl.load(p_heads + 2 * HALF + o_dim[None, :], mask=m_head & (o_dim[None, :] < REST), other=0.0)
    else:
        return tl.zeros((1, 1), p_heads.dtype.element_ty)


@triton.jit
def _store_head(
    p_heads,
    m_head,
    b_first,
    b_second,
    b_rest,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Store what `_load_pairs` and `_load_rest` return, in the destination's dtype."""
    b_first, b_second = b_first.to(p_heads.dtype.element_ty), b_second.to(p_heads.dtype.element_ty)
    if INTERLEAVED:
        o_dim = tl.arange(0, 2 * b_first.shape[1])
        b_both = tl.reshape(tl.join(b_first, b_second), (b_first.shape[0], 2 * b_first.shape[1]))
        tl.store(p_heads + o_dim[None, :], b_both, mask=m_head & (o_dim[None, :] < 2 * HALF))
    else:
        o_dim = tl.arange(0, b_first.shape[1])
        m_pair = m_head & (o_dim[None, :] < HALF)  # [heads, BLOCK_HALF]
        tl.store(p_heads + o_dim[None, :], b_first, mask=m_pair)
        tl.store(p_heads + HALF + o_dim[None, :], b_second, mask=m_pair)
    if REST:
        o_dim = tl.arange(0, b_rest.shape[1])
        m_rest = m_head & (o_dim[None, :] < REST)  # [heads, BLOCK_REST]
        tl.store(p_heads + 2 * HALF + o_dim[None, :], b_rest.to(p_heads.dtype.element_ty), mask=m_rest)


@triton.jit
def _prepared(
    p_heads,
    m_head,
    norm,
    b_cos,
    b_sin,
    eps,
    ROTATE: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Return heads normalised and rotated in float32, rounded once, to their own dtype: the three tiles."""
    b_first, b_second = _load_pairs(p_heads, m_head, HALF, BLOCK_HALF, INTERLEAVED)
    b_rest = _load_rest(p_heads, m_head, HALF, REST, BLOCK_REST)
    b_a, b_b, b_c = b_first.to(tl.float32), b_second.to(tl.float32), b_rest.to(tl.float32)
    if norm is not None:
        # Once per head, as cosines are.
        p_norm = norm + tl.zeros_like(m_head).to(tl.int32)  # [heads, 1]
        b_gain_a, b_gain_b = _load_pairs(p_norm, m_head, HALF, BLOCK_HALF, INTERLEAVED)
        b_square = tl.sum(b_a * b_a + b_b * b_b, axis=1) + tl.sum(b_c * b_c, axis=1)  # [heads]
        b_inverse = tl.math.div_rn(1.0, tl.math.sqrt_rn(b_square / (2 * HALF + REST) + eps))[:, None]  # [heads, 1]
        b_a *= b_inverse * b_gain_a.to(tl.float32)
        b_b *= b_inverse * b_gain_b.to(tl.float32)
        if REST:
            b_c *= b_inverse * _load_rest(p_norm, m_head, HALF, REST, BLOCK_REST).to(tl.float32)
    if ROTATE:
        b_a, b_b = b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin
    return b_a.to(b_first.dtype), b_b.to(b_first.dtype), b_c.to(b_first.dtype)


@triton.jit
def _magnitude(b_x):
    """Return max |x| of each head as its bits, which order like the numbers and put NaN last: [heads]."""
    return tl.max(b_x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _int8(b_x, b_divisor):
    """Return x / divisor rounded half to even and clamped to ±127."""
    b_steps = tl.math.div_rn(b_x.to(tl.float32), tl.broadcast_to(b_divisor, b_x.shape))
    b_steps = tl.minimum(tl.maximum(b_steps, -127.0), 127.0)
    return (b_steps + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _e4m3(b_x, scale):
    """Return the bits of x / scale in float8_e4m3fn, rounded half to even, clamped to ±448; NaN stays NaN.

    In integers, as sm_80 has no such conversion and the interpreter must agree bit by bit.
    """
    b_bits = tl.math.div_rn(b_x.to(tl.float32), tl.full(b_x.shape, 0.0, tl.float32) + scale).to(tl.int32, bitcast=True)
    b_size = tl.minimum(b_bits & 0x7FFFFFFF, 0x43E00000)  # of 448
    # From 8 to 4 exponent bits (bias 127 to 7), from 23 to 3 mantissa bits; a carry out of the mantissa is right.
    b_normal = (b_size + 0x7FFFF + ((b_size >> 20) & 1) >> 20) - (120 << 3)
    b_small = (b_size.to(tl.float32, bitcast=True) + _E4M3_ROUNDER).to(tl.int32, bitcast=True) - 0x46800000
    b_code = tl.where(b_size < 0x3C800000, b_small, b_normal)  # 2**-6, the smallest normal number
    b_code = tl.where((b_bits & 0x7FFFFFFF) > 0x7F800000, 0x7F, b_code)
    return (b_code | (b_bits >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def _store_slot(
    cache,
    scale,
    o_row,
    m_head,
    b_first,
    b_second,
    b_rest,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Quantise heads where the cache asks for it, and store them in its rows o_row: [heads, 1] int64."""
    p_heads = cache + o_row * (2 * HALF + REST)  # [heads, 1]
    if cache.dtype.element_ty == tl.int8:
        b_bits = tl.maximum(_magnitude(b_first), _magnitude(b_second))  # [heads]
        if REST:
            b_bits = tl.maximum(b_bits, _magnitude(b_rest))
        b_amax = b_bits.to(tl.float32, bitcast=True)[:, None]  # [heads, 1]
        b_scale = tl.math.div_rn(b_amax, tl.full(b_amax.shape, 127.0, tl.float32))  # [heads, 1]
        tl.store(scale + o_row, b_scale, mask=m_head)
        b_divisor = tl.where(b_scale > 0, b_scale, 1.0)  # [heads, 1]
        b_first, b_second = _int8(b_first, b_divisor), _int8(b_second, b_divisor)
        if REST:
            b_rest = _int8(b_rest, b_divisor)
    elif cache.dtype.element_ty == tl.uint8:  # the bits of float8_e4m3fn
        # The interpreter hands numbers on as they are; `tl.to_tensor` is not there before Triton 3.7.
        step = scale if hasattr(scale, "dtype") else tl.full((), scale, tl.float32)
        if step.dtype.is_ptr():
            step = tl.load(step).to(tl.float32)
        b_first, b_second, b_rest = _e4m3(b_first, step), _e4m3(b_second, step), _e4m3(b_rest, step)
    _store_head(p_heads, m_head, b_first, b_second, b_rest, HALF, REST, INTERLEAVED)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping", "positions"])
def _write_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    positions,
    cos_sin,
    q_norm,
    k_norm,
    k_scale,
    v_scale,
    eps,
    Q_TOKEN_STRIDE: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    K_TOKEN_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    V_TOKEN_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KV_TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """q = R(N(q)), k_cache[slot] = R(N(k)), v_cache[slot] = v; N is RMSNorm of a head, R turns (a, b) by the position.

    R(a, b) = (a cos - b sin, b cos + a sin). One program handles BLOCK_H heads of one token, of k and v or of q.
    Grid: (num_tokens, KV_TILES + cdiv(NUM_Q_HEADS, BLOCK_H)); without the tiles of q where q does not change.
    """
    i_token = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    ROTATE: tl.constexpr = cos_sin is not None
    b_cos, b_sin = 1.0, 0.0
    if ROTATE:
        p_row = cos_sin + tl.load(positions + i_token).to(tl.int64) * (2 * HALF)
        # Once per head, from L1: a tile of one row would come in a layout of its own, to be exchanged through shared
        # memory (measured on sm_90: 304 instructions and 6 barriers, this way 264 and none).
        o_pair = tl.zeros((BLOCK_H, 1), tl.int32) + tl.arange(0, BLOCK_HALF)[None, :]  # [BLOCK_H, BLOCK_HALF]
        b_cos = tl.load(p_row + o_pair, mask=o_pair < HALF, other=0.0).to(tl.float32)
        b_sin = tl.load(p_row + HALF + o_pair, mask=o_pair < HALF, other=0.0).to(tl.float32)
    if i_tile < KV_TILES:
        slot = tl.load(slot_mapping + i_token).to(tl.int64)
        o_head = (i_tile * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]  # [BLOCK_H, 1]
        m_head = o_head < tl.where(slot >= 0, NUM_KV_HEADS, 0)  # padding has no heads to write
        # Of the cache seen as [num_blocks * NUM_KV_HEADS * BLOCK_SIZE, head_dim].
        o_row = (slot // BLOCK_SIZE * NUM_KV_HEADS + o_head) * BLOCK_SIZE + slot % BLOCK_SIZE  # [BLOCK_H, 1] int64
        p_k = k + i_token * K_TOKEN_STRIDE + o_head * K_HEAD_STRIDE
        b_first, b_second, b_rest = _prepared(
            p_k, m_head, k_norm, b_cos, b_sin, eps, ROTATE, HALF, REST, BLOCK_HALF, BLOCK_REST, INTERLEAVED
        )
        _store_slot(k_cache, k_scale, o_row, m_head, b_first, b_second, b_rest, HALF, REST, INTERLEAVED)
        p_v = v + i_token * V_TOKEN_STRIDE + o_head * V_HEAD_STRIDE
        b_first, b_second = _load_pairs(p_v, m_head, HALF, BLOCK_HALF, INTERLEAVED)
        b_rest = _load_rest(p_v, m_head, HALF, REST, BLOCK_REST)
        _store_slot(v_cache, v_scale, o_row, m_head, b_first, b_second, b_rest, HALF, REST, INTERLEAVED)
    else:
        o_head = ((i_tile - KV_TILES) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]  # [BLOCK_H, 1]
        m_head = o_head < NUM_Q_HEADS
        p_q = q + i_token * Q_TOKEN_STRIDE + o_head * Q_HEAD_STRIDE
        b_first, b_second, b_rest = _prepared(
            p_q, m_head, q_norm, b_cos, b_sin, eps, ROTATE, HALF, REST, BLOCK_HALF, BLOCK_REST, INTERLEAVED
        )
        _store_head(p_q, m_head, b_first, b_second, b_rest, HALF, REST, INTERLEAVED)


def plan_write_kv(
    slot_mapping: Tensor,
    *,
    positions: Tensor,
    cos_sin: Tensor | None,
    rope_style: RopeStyle,
    block_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
) -> None:
    """See `octavo.kernels.plan_write_kv`: the kernel finds rows and cosines faster than it could read a plan."""
    check_choice("rope_style", rope_style, ("neox", "interleaved"))


def write_kv(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, positions: Tensor,
    cos_sin: Tensor | None = None, rope_style: RopeStyle = "neox", q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6, k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None, plan: None = None,
) -> None:  # fmt: skip
    """See `octavo.kernels.write_kv`."""
    check_write_kv(
        q, k, v, k_cache, v_cache, slot_mapping, positions=positions, cos_sin=cos_sin, q_norm=q_norm, k_norm=k_norm,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    check_kernel_float("q", q)
    check_choice("rope_style", rope_style, ("neox", "interleaved"))
    if k_cache.dtype == torch.float64:
        raise ValueError("k_cache has dtype torch.float64; the triton backend takes no float64")
    check_side_by_side(q=q, k=k, v=v, slot_mapping=slot_mapping, positions=positions)
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    paired = cos_sin.shape[1] if cos_sin is not None else head_dim // 2 * 2
    settings = config(head_dim=head_dim, rotary_dim=paired)
    kv_tiles = cdiv(num_kv_heads, settings.block_h)
    q_tiles = cdiv(q.shape[1], settings.block_h) if cos_sin is not None or q_norm is not None else 0
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    _write_kernel[(num_tokens, kv_tiles + q_tiles)](
        q, k, v, k_cache, v_cache, slot_mapping, positions, None if cos_sin is None else cos_sin.contiguous(),
        None if q_norm is None else q_norm.contiguous(), None if k_norm is None else k_norm.contiguous(), k_scale,
        v_scale, eps, Q_TOKEN_STRIDE=q.stride(0), Q_HEAD_STRIDE=q.stride(1), K_TOKEN_STRIDE=k.stride(0),
        K_HEAD_STRIDE=k.stride(1), V_TOKEN_STRIDE=v.stride(0), V_HEAD_STRIDE=v.stride(1), NUM_Q_HEADS=q.shape[1],
        NUM_KV_HEADS=num_kv_heads, BLOCK_SIZE=k_cache.shape[2], HALF=paired // 2, REST=head_dim - paired,
        INTERLEAVED=rope_style == "interleaved" and cos_sin is not None, KV_TILES=kv_tiles, BLOCK_H=settings.block_h,
        BLOCK_HALF=settings.block_half, BLOCK_REST=settings.block_rest, num_warps=settings.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
