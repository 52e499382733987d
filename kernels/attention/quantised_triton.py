# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds what attention does with one tile of int8 or e4m3 keys or values. It does not know what rows attend
to it.

Two neighbours of a row are read as one 16-bit number, so that loads are wide and no byte moves alone; the even and the
odd elements are two tiles, and so are the rows of q and what a row has attended to. Integer operations make their bits
float16, exactly; only float32 rows are multiplied in float32. Scales stay outside of the products: those of keys
multiply scores, those of values weights, or, where a layer has one, the result.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend_pairs", "cache_pairs", "join_pairs", "layer_scale", "no_pairs", "score_pairs", "split_queries"]

# Takes e4m3's bits, shifted into float16's fields, to 144 times their number, exactly: at most 64,512, while NaN's bits
# overflow to infinity.
_E4M3_GAIN = tl.constexpr(36864.0)
_E4M3_STEPS = tl.constexpr(144.0)
# Two pairs, as the machine converts them: the even elements' bytes side by side, then the odd ones'; two for each.
_E4M3_CONVERSION = tl.constexpr("""{
    .reg .b32 bytes;
    .reg .b16 even, odd;
    prmt.b32 bytes, $2, 0, 0x3120;
    mov.b32 {even, odd}, bytes;
    cvt.rn.f16x2.e4m3x2 $0, even;
    cvt.rn.f16x2.e4m3x2 $1, odd;
}""")
# Value scales below it are as good as 0: their inverse must be finite.
_LEAST_PEAK = tl.constexpr(2.0**-100)
_PAIRS: Final = {torch.int8: torch.int16, torch.float8_e4m3fn: torch.uint16}


def cache_pairs(cache: Tensor) -> Tensor:
    """Return a quantised cache as pairs of neighbours, [..., head_dim / 2]: int16 of int8, uint16 of e4m3."""
    return cache.view(_PAIRS[cache.dtype]) if cache.dtype in _PAIRS else cache


@triton.jit
def layer_scale(scale):
    """Return a layer's one scale, given as a number or as a tensor of one."""
    # The interpreter hands numbers on as they are; `tl.to_tensor` is not there before Triton 3.7.
    scale = scale if hasattr(scale, "dtype") else tl.full((), scale, tl.float32)
    if scale.dtype.is_ptr():
        scale = tl.load(scale).to(tl.float32)
    return scale


@triton.jit
def split_queries(b_q):
    """Return rows as their even and their odd elements [rows, BLOCK_D / 2], and what scores are to be multiplied with.

    A bfloat16 row is brought into float16's range by a power of two, its largest element to 2**14.
    """
    b_unit = tl.full((b_q.shape[0],), 1.0, tl.float32)
    if b_q.dtype == tl.bfloat16:
        b_wide = b_q.to(tl.float32)
        b_exponent = tl.max(b_wide.to(tl.int32, bitcast=True) & 0x7F800000, 1)  # [rows]
        b_exponent = tl.maximum(b_exponent, 15 << 23) - (14 << 23)
        b_unit = b_exponent.to(tl.float32, bitcast=True)  # [rows]
        b_q = (b_wide * (0x7F000000 - b_exponent).to(tl.float32, bitcast=True)[:, None]).to(tl.float16)
    b_even, b_odd = tl.split(tl.reshape(b_q, (b_q.shape[0], b_q.shape[1] // 2, 2)))
    return b_even, b_odd, b_unit


@triton.jit
def _tile(b_words, SHAPE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return the float16 numbers whose bits are the low and the high halves of words: what `_halves` takes apart."""
    b_both = tl.join((b_words & 0xFFFF).to(tl.uint16), (b_words >> 16).to(tl.uint16))
    if TRANSPOSED:
        b_both = tl.permute(b_both, (0, 2, 1))
    return tl.reshape(b_both, SHAPE).to(tl.float16, bitcast=True)


@triton.jit
def _halves(b_pairs, VALUES: tl.constexpr, WIDE: tl.constexpr, NATIVE: tl.constexpr):
    """Return the even and the odd elements of pairs as numbers: two of [BLOCK_N, BLOCK_D / 2], e4m3 times 144.

    Two pairs that a matrix instruction takes from one register, of one key or of two values, are one 32-bit word, so
    that an operation serves two numbers.

    Args:
        NATIVE: let the machine convert e4m3 (sm_89 and later; the interpreter cannot), times 1, for 16-bit rows.
    """
    if NATIVE and b_pairs.dtype == tl.uint16:
        return tl.inline_asm_elementwise(
            _E4M3_CONVERSION, "=r,=r,r", [b_pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    N: tl.constexpr = b_pairs.shape[0]
    HALF: tl.constexpr = b_pairs.shape[1]
    if VALUES:
        b_low, b_high = tl.split(tl.permute(tl.reshape(b_pairs, (N // 2, 2, HALF)), (0, 2, 1)))
    else:
        b_low, b_high = tl.split(tl.reshape(b_pairs, (N, HALF // 2, 2)))
    b_words = b_low.to(tl.uint16, bitcast=True).to(tl.uint32) | (b_high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    if b_pairs.dtype == tl.int16:
        # The bits of 1024 + 128 + x.
        b_even = _tile((b_words & 0x00FF00FF) ^ 0x64806480, b_pairs.shape, VALUES) - 1152.0
        b_odd = _tile(((b_words >> 8) & 0x00FF00FF) ^ 0x64806480, b_pairs.shape, VALUES) - 1152.0
    else:
        b_even = ((b_words & 0x00800080) << 8) | ((b_words & 0x007F007F) << 7)
        b_odd = (b_words & 0x80008000) | ((b_words & 0x7F007F00) >> 1)
        b_even = _tile(b_even, b_pairs.shape, VALUES) * _E4M3_GAIN
        b_odd = _tile(b_odd, b_pairs.shape, VALUES) * _E4M3_GAIN
    if WIDE:
        b_even, b_odd = b_even.to(tl.float32), b_odd.to(tl.float32)
    return b_even, b_odd


@triton.jit
def score_pairs(b_q, b_pairs, k_scale, o_slot, NATIVE: tl.constexpr = False):
    """Return the products of rows and keys: [rows, BLOCK_N]; NaN where a key is not a number.

    Args:
        b_q: what `split_queries` returns.  b_pairs: [BLOCK_N, BLOCK_D / 2].
        k_scale: int8: where slot 0's is; e4m3: the layer's.  o_slot: [BLOCK_N].
    """
    b_even, b_odd = _halves(b_pairs, False, b_q[0].dtype == tl.float32, NATIVE)
    b_scores = tl.dot(b_q[0], b_even.T, input_precision="ieee")
    b_scores = tl.dot(b_q[1], b_odd.T, b_scores, input_precision="ieee")
    if b_pairs.dtype == tl.int16:
        b_scores *= b_q[2][:, None] * tl.load(k_scale + o_slot)[None, :]
    else:
        b_scores *= (b_q[2] * (k_scale / (1.0 if NATIVE else _E4M3_STEPS)))[:, None]
    return b_scores + b_scores * 0.0  # an infinite score would hide its key from the row, or the others


@triton.jit
def no_pairs(BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return what rows have attended to before the first tile: even and odd elements, and their unit."""
    b_half = tl.zeros((BLOCK_H, BLOCK_D // 2), tl.float32)
    return b_half, b_half, tl.full((BLOCK_H,), _LEAST_PEAK, tl.float32)


@triton.jit
def attend_pairs(
    b_weights, b_pairs, b_acc, b_rescale, v_scale, o_slot, WIDE: tl.constexpr, NATIVE: tl.constexpr = False
):
    """Take one tile of values into what `no_pairs` begins.

    Scales of int8 differ from slot to slot, and a weight times its scale may be anything. So a row counts in units of
    the largest such product yet: float16 keeps of the others what matters beside it, and a key alone its exact value.

    Args:
        b_weights: [rows, BLOCK_N] float32.  b_pairs: [BLOCK_N, BLOCK_D / 2].  b_rescale: [rows].
        WIDE: whether to multiply in float32.
    """
    b_even, b_odd, b_peak = b_acc
    if b_pairs.dtype == tl.int16:
        b_weights *= tl.load(v_scale + o_slot)[None, :]
        if not WIDE:
            b_new_peak = tl.maximum(tl.maximum(b_peak * b_rescale, tl.max(b_weights, 1)), _LEAST_PEAK)
            b_inverse = 1.0 / b_new_peak
            b_weights *= b_inverse[:, None]
            b_rescale *= b_peak * b_inverse
            b_peak = b_new_peak
    b_even_values, b_odd_values = _halves(b_pairs, True, WIDE, NATIVE)
    b_weights = b_weights.to(b_even_values.dtype)
    b_even = tl.dot(b_weights, b_even_values, b_even * b_rescale[:, None], input_precision="ieee")
    b_odd = tl.dot(b_weights, b_odd_values, b_odd * b_rescale[:, None], input_precision="ieee")
    return b_even, b_odd, b_peak


@triton.jit
def join_pairs(b_acc, v_scale, INT8: tl.constexpr, WIDE: tl.constexpr, NATIVE: tl.constexpr = False):
    """Return what rows have attended to as whole rows: [rows, BLOCK_D]."""
    b_even, b_odd, b_peak = b_acc
    b_whole = tl.reshape(tl.join(b_even, b_odd), (b_even.shape[0], 2 * b_even.shape[1]))
    if not INT8:
        if not NATIVE:
            b_whole = tl.math.div_rn(b_whole, tl.full(b_whole.shape, _E4M3_STEPS, tl.float32))
        b_whole *= v_scale
    elif not WIDE:
        b_whole *= b_peak[:, None]
    return b_whole + b_whole * 0.0  # infinite where a value is not a number
