# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds what attention does with one tile of keys. It does not know what rows attend to it.

Scores, maxima and sums are float32 and to base 2: exp(x) is exp2(x · LOG2E), so that the softmax scale and LOG2E fold
into one factor and every exponential is one instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Target, next_power_of_2
from ..dispatch import TRITON_BLOCK_SIZES

__all__ = [
    "LARGEST",
    "LN2",
    "LOG2E",
    "capped",
    "check_supported",
    "finish",
    "fit_tiles",
    "key_rows",
    "load_rows",
    "slot_rows",
    "softmax_step",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of finite float32
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_HEAD_DIM, _MAX_HEAD_DIM = 16, 256


@triton.jit
def slot_rows(b_block, o_key, BLOCK_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return where each key's row starts in one KV head's part of the pool, in elements: [BLOCK_N] int64.

    Args:
        b_block: [BLOCK_N], each key's block, or the one block of them all; int64 before it is multiplied.
        o_key: [BLOCK_N] positions.
    """
    return b_block.to(tl.int64) * BLOCK_STRIDE + (o_key % BLOCK_SIZE) * HEAD_DIM


@triton.jit
def key_rows(p_blocks, o_key, BLOCK_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return `slot_rows` of keys whose blocks are looked up.

    One block id per key, not per block: a reshape of ids to keys would lose what is known of their alignment, and with
    it every wide load.

    Args:
        p_blocks: the sequence's row of the block table.
        o_key: [BLOCK_N] positions, each of them a key that some row sees: what lies elsewhere may be NaN.
    """
    return slot_rows(tl.load(p_blocks + o_key // BLOCK_SIZE), o_key, BLOCK_STRIDE, BLOCK_SIZE, HEAD_DIM)


@triton.jit
def load_rows(p_rows, o_row, m_row, o_dim, HEAD_DIM: tl.constexpr):
    """Return rows of head_dim elements, zeros past head_dim and where a row is masked: [rows, BLOCK_D].

    Args:
        p_rows: where offset 0 is.  o_row: [rows], where each row starts, in elements.
        m_row: [rows] bool, or None: all.  o_dim: [BLOCK_D], no mask where BLOCK_D is head_dim.
    """
    p_tile = p_rows + o_row[:, None] + o_dim[None, :]  # [rows, BLOCK_D]
    if o_dim.shape[0] == HEAD_DIM:
        if m_row is None:
            return tl.load(p_tile)
        else:
            return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    else:
        m_dim = o_dim[None, :] < HEAD_DIM
        if m_row is None:
            return tl.load(p_tile, mask=m_dim, other=0.0)
        else:
            return tl.load(p_tile, mask=m_row[:, None] & m_dim, other=0.0)


@triton.jit
def capped(b_scores, factor, soft_cap):
    """Return soft_cap · tanh(b_scores · factor) · LOG2E: [rows, BLOCK_N].

    Args:
        factor: scale / soft_cap.
    """
    # tanh(x) = 1 - 2 / (exp(2x) + 1), right in both limits: the exponential becomes 0, or infinite. It cancels near 0,
    # where scores below a large cap are: there x + x³ · P(x²), P fitted to a tenth of float32's roundoff.
    b_x = b_scores * factor
    b_far = 1.0 - 2.0 / (tl.math.exp2(b_x * (2 * LOG2E)) + 1.0)
    b_square = b_x * b_x
    b_near = 0.020639042 - 0.0057049339 * b_square
    b_near = -0.0537397019 + b_near * b_square
    b_near = 0.13331442 + b_near * b_square
    b_near = -0.333332819 + b_near * b_square
    b_near = b_x + b_x * b_square * b_near
    return tl.where(tl.abs(b_x) < 0.625, b_near, b_far) * (soft_cap * LOG2E)


@triton.jit
def softmax_step(b_scores, b_max, b_sum, factor, MASKED: tl.constexpr):
    """Take one tile of scores into a running softmax.

    Args:
        b_scores: [rows, BLOCK_N], -inf where a row does not see a key.
        b_max, b_sum: [rows], of exp2(score · factor) over the keys so far, the sum relative to the maximum.
        factor: above 0; makes the scores ones to base 2.
        MASKED: whether a row may have seen nothing, this tile included.

    Returns:
        The tile's weights [rows, BLOCK_N], what the accumulator is to be multiplied with [rows], new maximum and sum.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * factor)
    b_shift = b_new_max
    if MASKED:
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # -inf - -inf is NaN
    b_weights = tl.math.exp2(b_scores * factor - b_shift[:, None])
    b_rescale = tl.math.exp2(b_max - b_shift)
    return b_weights, b_rescale, b_new_max, b_sum * b_rescale + tl.sum(b_weights, 1)


@triton.jit
def finish(b_acc, b_max, b_sum):
    """Return the attended values [rows, BLOCK_D] and the natural log of the denominator [rows].

    A row that has seen nothing gives zeros and -inf.
    """
    m_empty = b_sum == 0.0
    b_divisor = tl.where(m_empty, 1.0, b_sum)
    b_lse = tl.where(m_empty, float("-inf"), (b_max + tl.math.log2(b_divisor)) * LN2)
    return b_acc * (1.0 / b_divisor)[:, None], b_lse


def fit_tiles(
    block_m: int,
    block_n: int,
    num_stages: int,
    *,
    num_warps: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_itemsize: int | None = None,
    target: Target,
) -> tuple[int, int]:
    """Return keys per tile and stages, fewer of them where a program would have too little shared memory.

    Args:
        num_stages: lowered to 2 before the keys are halved; 1 is the last resort.
        kv_itemsize: bytes of a number in the cache, dtype's by default.
    """
    row, itemsize = next_power_of_2(head_dim), dtype.itemsize
    mma_sync = dtype == torch.float32 or target.arch // 10 in (8, 12)

    def fits(block_n: int, num_stages: int) -> bool:
        # Where products read their operands from shared memory, a tile is free for the next one a stage later.
        num_tiles = 2 * (num_stages - mma_sync)
        total = row * (block_m * itemsize + num_tiles * block_n * (kv_itemsize or itemsize))
        if mma_sync and block_m < 16 * num_warps:  # warps share rows, and hand each other their weights
            total += block_m * block_n * itemsize
        return total + 1056 <= target.shared_bytes  # sums of rows, scales, barriers

    candidates = [(n, s) for n in (128, 64, 32, 16) if n <= block_n for s in range(num_stages, 1, -1)]
    return next((found for found in candidates if fits(*found)), (16, 1))


def check_supported(q: Tensor, k_cache: Tensor, out: Tensor | None) -> None:
    """Check what the kernels cannot do and the reference can; the rest is `check_attention`'s.

    Raises:
        ValueError: names the argument, what it is and what is allowed.
    """
    if q.dtype not in _DTYPES:
        raise ValueError(f"q is {q.dtype}; the triton backend takes float32, float16 and bfloat16")
    if k_cache.dtype not in (q.dtype, torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"k_cache is {k_cache.dtype}; the triton backend takes a cache of q's dtype, int8 or e4m3")
    block_size, head_dim = k_cache.shape[2:]
    if block_size not in TRITON_BLOCK_SIZES:
        raise ValueError(
            f"block_size is {block_size}; the triton backend takes {', '.join(map(str, TRITON_BLOCK_SIZES))}"
        )
    if k_cache.dtype != q.dtype and head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; the triton backend takes a quantised cache of an even one")
    if not _MIN_HEAD_DIM <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; the triton backend takes {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM}")
    for name, x in (("q", q), ("out", out)):
        # Only rows may lie apart, as in a view into a fused projection.
        if x is not None and x.numel() and (x.stride(2) != 1 or (x.stride(1) != head_dim and x.shape[1] > 1)):
            raise ValueError(f"{name} has strides {x.stride()}; the triton backend needs contiguous rows")
