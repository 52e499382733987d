# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds attention whose every row depends, to the bit, on its own prefix alone. It does not know whether a
row decodes, verifies a draft or is part of a prompt.

One kernel with one shape of tile computes them all, and sums in one order: tiles of keys at absolute positions from 0
on, splits of `SPLIT_TOKENS` each with a softmax of its own, merged in ascending order. Whatever else its tile makes a
row pass over, keys that it does not see and splits without any that it sees, changes none of its bits: a weight of 0
is added, or a sum multiplied with 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Target, cdiv, next_power_of_2, target
from .combine_triton import store_rows
from .gather import SPLIT_TOKENS
from .tile_triton import LOG2E, capped, fit_tiles, load_rows, slot_rows, softmax_step
from .worklist_triton import Worklist, heads_per_tile, list_work

__all__ = ["InvariantConfig", "InvariantPlan", "attend_invariant", "config", "plan_invariant"]

BLOCK_M: Final = 64
"""Rows of a tile: successive query tokens times the query heads of one KV head, or equal parts of them."""


@dataclass(frozen=True, slots=True)
class InvariantPlan:
    """The work of one step's attention by either op, for any window, cap, sinks, draft and dtype."""

    worklist: Worklist


@dataclass(frozen=True, slots=True)
class InvariantConfig:
    """How the kernel is launched. A row's bits depend on the first two, so nothing of the batch may choose them."""

    block_n: int
    """Keys of a tile; divides SPLIT_TOKENS."""
    num_warps: int
    num_stages: int


def config(*, head_dim: int, dtype: torch.dtype, draft: bool, target: Target) -> InvariantConfig:
    """Choose the largest tiles that spill no registers.

    Args:
        draft: whether there are draft masks, which leave no registers to look blocks up ahead of time.
    """
    if dtype == torch.float32:  # exact products use no tensor cores and hold their operands in registers
        block_n, num_stages = fit_tiles(BLOCK_M, 16, 2, num_warps=8, head_dim=head_dim, dtype=dtype, target=target)
        return InvariantConfig(block_n, num_warps=8, num_stages=num_stages)
    if head_dim > 128:
        return InvariantConfig(block_n=32 if target.arch == 90 else 16, num_warps=8, num_stages=2)
    return InvariantConfig(block_n=64, num_warps=4 if target.arch == 90 else 8, num_stages=2 if draft else 3)


def plan_invariant(cu_seqlens_q: Tensor, seq_lens: Tensor, *, num_tokens: int, group_size: int) -> InvariantPlan:
    """Plan a step of either op; see `octavo.kernels.plan_paged_attention`."""
    item_tokens = BLOCK_M // heads_per_tile(BLOCK_M, group_size)
    return InvariantPlan(list_work(cu_seqlens_q, seq_lens, num_tokens=num_tokens, item_tokens=item_tokens))


@triton.jit
def _attend_split(
    b_q,
    p_keys,
    p_values,
    p_blocks,
    b_draft,
    o_position,
    i_first,
    i_low,
    i_high,
    scale,
    window,
    soft_cap,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Return the softmax's state over keys i_low to i_high: values [BLOCK_M, BLOCK_D], maximum and sum [BLOCK_M].

    Every tile is masked: whether all rows of a tile see all keys of another depends on who shares the tile.

    Args:
        b_q: [BLOCK_M, BLOCK_D].  b_draft, o_position: [BLOCK_M], each row's draft mask, or None, and position.
        i_first: position of the sequence's first query token.
    """
    factor = scale * LOG2E
    if soft_cap is not None:
        factor = 1.0
    o_dim = tl.arange(0, b_q.shape[1])  # [BLOCK_D]
    b_max = tl.full((b_q.shape[0],), float("-inf"), tl.float32)
    b_sum = tl.zeros((b_q.shape[0],), tl.float32)
    b_acc = tl.zeros(b_q.shape, tl.float32)
    for i_key in tl.range(i_low // BLOCK_N * BLOCK_N, i_high, BLOCK_N, num_stages=NUM_STAGES):
        o_key = i_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        # Lanes beyond either end repeat a key that is seen: their weight is 0, and 0 times a real value is 0.
        o_seen = tl.minimum(tl.maximum(o_key, i_low), i_high - 1)  # [BLOCK_N]
        o_block = o_seen // BLOCK_SIZE
        if BLOCK_SIZE % BLOCK_N == 0:
            o_block = i_key // BLOCK_SIZE
        o_slot = slot_rows(tl.load(p_blocks + o_block), o_seen, BLOCK_STRIDE, BLOCK_SIZE, HEAD_DIM)  # [BLOCK_N]
        b_keys = load_rows(p_keys, o_slot, None, o_dim, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        b_values = load_rows(p_values, o_slot, None, o_dim, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
        b_scores = tl.dot(b_q, b_keys.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if soft_cap is not None:
            b_scores = capped(b_scores, scale / soft_cap, soft_cap)
        m_seen = o_key[None, :] <= o_position[:, None]
        if window is not None:
            m_seen &= o_key[None, :] > o_position[:, None] - window
        if b_draft is not None:
            o_draft = o_key - i_first  # [BLOCK_N] from the sequence's first query token
            m_draft = (b_draft[:, None] >> tl.minimum(tl.maximum(o_draft, 0), 31)[None, :]) & 1
            m_seen &= (o_draft < 0)[None, :] | (m_draft == 1)
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
        b_weights, b_rescale, b_max, b_sum = softmax_step(b_scores, b_max, b_sum, factor, True)
        b_acc = tl.dot(b_weights.to(b_values.dtype), b_values, b_acc * b_rescale[:, None], input_precision="ieee")
    return b_acc, b_max, b_sum


@triton.jit
def _merge(b_acc, b_max, b_sum, b_part, b_part_max, b_part_sum):
    """Return the state of a softmax over the keys of two states: values [BLOCK_M, BLOCK_D], maximum and sum [BLOCK_M].

    Which product of a sum is rounded is written out: two compiled variants of the kernel must not choose differently.
    """
    b_new_max = tl.maximum(b_max, b_part_max)
    b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # -inf - -inf is NaN
    b_rescale = tl.math.exp2(b_max - b_shift)
    b_weight = tl.math.exp2(b_part_max - b_shift)
    b_sum = tl.fma(b_part_sum, b_weight, b_sum * b_rescale)
    b_weight, b_part = tl.broadcast(b_weight[:, None], b_part)
    return tl.fma(b_part, b_weight, b_acc * b_rescale[:, None]), b_new_max, b_sum


# Metadata may be a slice from any row on: its alignment is no reason to compile again.
@triton.jit(
    do_not_specialize=["p_cu_seqlens_q", "p_seq_lens", "p_block_table", "p_draft_mask", "table_stride", "window"]
)
def invariant_kernel(
    p_q,
    p_k_cache,
    p_v_cache,
    p_out,
    p_lse,
    p_sinks,
    p_draft_mask,
    p_items,
    p_cu_seqlens_q,
    p_seq_lens,
    p_block_table,
    scale,
    window,
    soft_cap,
    table_stride,
    q_stride,
    out_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[t, h] = softmax over visible keys of (q[t, h] · k · scale) · v.

    One program handles BLOCK_Q = BLOCK_M // HEADS successive query tokens of one sequence, with HEADS heads of one KV
    head as neighbouring rows, and walks all of their keys. Grid: (work items, KV heads × HEAD_TILES).
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    HEAD_TILES: tl.constexpr = (GROUP_SIZE + HEADS - 1) // HEADS
    i_seq = tl.load(p_items + tl.program_id(0) * 2)
    if i_seq < 0:  # more programs than work: the host knows only a bound
        return
    i_token = tl.load(p_items + tl.program_id(0) * 2 + 1) * BLOCK_Q  # of the sequence's query tokens, as o_token
    i_kv_head = tl.program_id(1) // HEAD_TILES
    i_start = tl.load(p_cu_seqlens_q + i_seq).to(tl.int32)
    query_len = tl.load(p_cu_seqlens_q + i_seq + 1).to(tl.int32) - i_start
    seq_len = tl.load(p_seq_lens + i_seq).to(tl.int32)

    o_m = tl.arange(0, BLOCK_M)
    o_token = i_token + o_m // HEADS  # [BLOCK_M]
    o_group = tl.program_id(1) % HEAD_TILES * HEADS + o_m % HEADS  # [BLOCK_M]
    m_row = (o_token < query_len) & (o_m < BLOCK_Q * HEADS) & (o_group < GROUP_SIZE)
    o_head = i_kv_head * GROUP_SIZE + o_group
    o_row = (i_start + o_token).to(tl.int64)
    b_q = load_rows(p_q, o_row * q_stride + o_head * HEAD_DIM, m_row, tl.arange(0, BLOCK_D), HEAD_DIM)
    b_draft = None
    if p_draft_mask is not None:
        b_draft = tl.load(p_draft_mask + o_row, mask=m_row, other=0).to(tl.int32)  # [BLOCK_M]

    i_first = seq_len - query_len
    i_low = 0
    if window is not None:
        i_low = tl.maximum(i_first + i_token - window + 1, 0)
    i_high = tl.maximum(tl.minimum(i_first + i_token + BLOCK_Q, seq_len), 0)
    p_keys = p_k_cache + i_kv_head * (BLOCK_SIZE * HEAD_DIM)
    p_values = p_v_cache + i_kv_head * (BLOCK_SIZE * HEAD_DIM)
    p_blocks = p_block_table + i_seq.to(tl.int64) * table_stride
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i_split in tl.range(i_low // SPLIT_TOKENS * SPLIT_TOKENS, i_high, SPLIT_TOKENS, num_stages=1):
        b_part, b_part_max, b_part_sum = _attend_split(
            b_q, p_keys, p_values, p_blocks, b_draft, i_first + o_token, i_first, tl.maximum(i_split, i_low),
            tl.minimum(i_split + SPLIT_TOKENS, i_high), scale, window, soft_cap, NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM,
            BLOCK_SIZE, HEAD_DIM, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
        b_acc, b_max, b_sum = _merge(b_acc, b_max, b_sum, b_part, b_part_max, b_part_sum)
    store_rows(
        p_out, p_lse, p_sinks, b_acc, b_max, b_sum, o_row, o_head, m_row, out_stride, NUM_KV_HEADS * GROUP_SIZE,
        HEAD_DIM,
    )  # fmt: skip


def attend_invariant(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: InvariantPlan,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    draft_mask: Tensor | None = None,
    out: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute either op as planned, from arguments that it has checked.

    Raises:
        ValueError: the cache is quantised.
    """
    if k_cache.dtype != q.dtype:
        raise ValueError(f"k_cache is {k_cache.dtype}; an invariant plan takes a cache of q's dtype, {q.dtype}")
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group_size, items = num_q_heads // num_kv_heads, plan.worklist.items
    heads = heads_per_tile(BLOCK_M, group_size)
    assert plan.worklist.item_tokens == BLOCK_M // heads, "the plan is another model's"
    assert plan.worklist.num_seqs == len(seq_lens), "the plan is of another step"
    settings = config(
        head_dim=head_dim,
        dtype=q.dtype,
        draft=draft_mask is not None,
        target=target(q.device),
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = q.new_empty((num_tokens, num_q_heads), dtype=torch.float32) if return_lse else None
    if num_tokens and len(items):
        invariant_kernel[len(items), num_kv_heads * cdiv(group_size, heads)](
            q, k_cache, v_cache, out, lse, sinks, draft_mask, items, cu_seqlens_q, seq_lens, block_table, scale, window,
            soft_cap, block_table.stride(0), q.stride(0), out.stride(0), NUM_KV_HEADS=num_kv_heads,
            GROUP_SIZE=group_size, HEADS=heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, SPLIT_TOKENS=SPLIT_TOKENS,
            BLOCK_M=BLOCK_M, BLOCK_N=settings.block_n, BLOCK_D=next_power_of_2(head_dim),
            NUM_STAGES=settings.num_stages, num_warps=settings.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out if lse is None else (out, lse)
