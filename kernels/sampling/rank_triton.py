# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds what the sampling kernels share: a total order of tokens, the k-th of a row, the noise. It does not
know what is done with a token.

A token's rank is one int64: its value as an integer of the same order, then its id counted down. So every maximum takes
the lowest id among equal values, no two ranks of a row are equal, and all that precedes a token is one comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_kernel_float
from ..common.launch import cdiv, next_power_of_2

__all__ = ["LOG2E", "LOWEST", "Config", "best_rank", "check_logits", "config", "is_bad", "kth_rank", "load_logits"]
__all__ += ["race", "rank", "ranked_id", "ranked_value", "row_key", "uniform"]

MAX_BLOCK = 4096
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-(1 << 63))
"""Below every rank."""

_ID_BITS = tl.constexpr(31)
_MAX_ID = tl.constexpr((1 << 31) - 1)
_INFINITY = tl.constexpr(0x7F800000)
# The lowest digit, of eight bits, in which the keys of two logits of a dtype can differ.
_LAST_SHIFT = {torch.float32: 0, torch.float16: 8, torch.bfloat16: 16}


@dataclass(frozen=True, slots=True)
class Config:
    """How the kernels of one call are launched; a row's bits depend on it, so the number of rows does not enter."""

    block: int
    """Logits of a tile, and of the chunk that one program scans."""
    num_chunks: int
    scan_warps: int
    row_warps: int
    """Of programs that walk a whole row."""
    last_shift: int


def config(*, num_ids: int, dtype: torch.dtype) -> Config:
    """Return the launch settings of one vocabulary: 16 bytes of logits per thread at least."""
    block = min(max(next_power_of_2(num_ids), 64), MAX_BLOCK)
    warps = max(block // 256, 1)
    return Config(block, cdiv(num_ids, block), max(warps // 2, 1), warps, _LAST_SHIFT[dtype])


def check_logits(logits: Tensor) -> Tensor:
    """Return the logits with elements side by side.

    Raises:
        ValueError: names the argument, what it is and what is allowed.
    """
    check_kernel_float("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [n, vocab_size]")
    return logits if logits.stride(1) == 1 else logits.contiguous()


@triton.jit
def load_logits(p_row, o_id, i_start, NUM_IDS: tl.constexpr, BLOCK: tl.constexpr):
    """Return a row's logits at ids i_start .. i_start + BLOCK - 1 in float32, -inf from NUM_IDS on, +inf for NaN."""
    if i_start + BLOCK <= NUM_IDS:  # a mask that ends anywhere would split the vectors of every tile
        b_x = tl.load(p_row + o_id)
    else:
        b_x = tl.load(p_row + o_id, mask=o_id < NUM_IDS, other=float("-inf"))
    b_x = b_x.to(tl.float32)
    return tl.where(b_x < float("inf"), b_x, float("inf"))


@triton.jit
def _order(b_x):
    """Return int32 that compare as float32 without NaN do: both zeros are equal."""
    b_bits = (b_x + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is +0
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def rank(b_x, o_id):
    """Return the rank of value x and id, int64: of two tokens, the higher one comes first."""
    return (_order(b_x).to(tl.int64) << _ID_BITS) | (o_id ^ _MAX_ID).to(tl.int64)


@triton.jit
def ranked_id(b_rank):
    """Return the id in a rank, int32."""
    return ((b_rank & _MAX_ID) ^ _MAX_ID).to(tl.int32)


@triton.jit
def ranked_value(b_rank):
    """Return the value in a rank, float32."""
    b_order = (b_rank >> _ID_BITS).to(tl.int32)
    return (b_order ^ ((b_order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_rank(b_x, o_id):
    """Return the highest rank of a tile without making each: the largest value, then the lowest id that has it."""
    top = tl.max(b_x, 0)
    return rank(top, tl.min(tl.where(b_x == top, o_id, _MAX_ID), 0))


@triton.jit
def is_bad(b_rank):
    """Whether the value in a rank is +inf, as which NaN is loaded."""
    return (b_rank >> _ID_BITS) >= _INFINITY


@triton.jit
def kth_rank(
    p_row,
    k,
    NUM_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST_SHIFT: tl.constexpr,
):
    """Return a bound that exactly k of the row's ranks reach, 1 ≤ k ≤ NUM_IDS, by radix selection.

    Each round counts the next eight bits of the keys that have matched so far; the last one, where the k-th value is
    tied, counts ids. All counts are integers, so their order is free; lanes past the last id rank after every id.
    """
    o_tile = tl.arange(0, BLOCK)
    o_digit = tl.arange(0, 256)
    prefix = (k * 0).to(tl.uint32)
    wanted = k
    num_equal = k + 1
    shift = 24
    while (shift >= LAST_SHIFT) & (num_equal != wanted):
        b_counts = tl.zeros((256,), tl.int32)
        for i_start in range(0, NUM_IDS, BLOCK):
            o_id = i_start + o_tile  # [BLOCK]
            b_x = load_logits(p_row, o_id, i_start, NUM_IDS, BLOCK)
            b_key = _order(b_x).to(tl.uint32, bitcast=True) ^ 0x80000000
            m_equal = ((b_key ^ prefix) >> shift >> 8) == 0
            b_counts += tl.histogram(((b_key >> shift) & 0xFF).to(tl.int32), 256, mask=m_equal)
        b_above = tl.cumsum(b_counts, 0, reverse=True) - b_counts  # [256]
        m_digit = (b_above < wanted) & (wanted <= b_above + b_counts)
        prefix |= tl.sum(tl.where(m_digit, o_digit, 0), 0).to(tl.uint32) << shift
        num_equal = tl.sum(tl.where(m_digit, b_counts, 0), 0)
        wanted -= tl.sum(tl.where(m_digit, b_above, 0), 0)
        shift -= 8
    bound = (prefix ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.int64) << _ID_BITS
    if num_equal != wanted:
        num_before = k * 0
        for i_start in range(0, NUM_IDS, BLOCK):
            o_id = i_start + o_tile  # [BLOCK]
            b_x = load_logits(p_row, o_id, i_start, NUM_IDS, BLOCK)
            b_key = _order(b_x).to(tl.uint32, bitcast=True) ^ 0x80000000
            m_equal = ((b_key ^ prefix) >> LAST_SHIFT) == 0
            b_nth = num_before + tl.cumsum(m_equal.to(tl.int32), 0)  # [BLOCK]
            m_last = m_equal & (b_nth == wanted)
            bound = tl.maximum(bound, tl.max(tl.where(m_last, rank(b_x, o_id), LOWEST), 0))
            num_before += tl.sum(m_equal.to(tl.int32), 0)
    return bound


@triton.jit
def _absorb(h, word):
    h ^= word
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def row_key(p_seed, p_choice, p_position, i_row, START: tl.constexpr):
    """Return one of a row's two keys, as `noise.row_keys`: uint32."""
    seed = tl.load(p_seed + i_row)
    h = _absorb(seed.to(tl.uint32) * 0 + START, seed.to(tl.uint32))
    h = _absorb(h, (seed >> 32).to(tl.uint32))
    h = _absorb(h, tl.load(p_choice + i_row).to(tl.uint32))
    return _absorb(h, tl.load(p_position + i_row).to(tl.uint32))


@triton.jit
def uniform(key0, key1, o_id):
    """Return the bits of `noise.uniform`: float32."""
    h = o_id.to(tl.uint32) * 0x9E3779B1 + key0
    h = (h ^ (h >> 16)) * 0x85EBCA6B + key1
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h ^= h >> 16
    return ((h >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - (1.0 - 2.0**-24)


@triton.jit
def race(b_z, key0, key1, o_id):
    """Return exp(z) / -log u, whose order is that of z plus Gumbel noise at the price of one logarithm: float32.

    Where z is so low that it underflows, the token of z = 0 wins whatever the noise, which spans 19.4.
    """
    return tl.math.exp2(b_z * LOG2E) / -tl.log(uniform(key0, key1, o_id))
