# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds decode attention to the keys that several sequences have in common: read once, for all their rows.
It does not know which sequences share, nor how partial results are merged.

Sequences that begin with the same blocks have the same keys there, and their query rows, which lie behind, see all of
them. So one tile holds rows of many sequences, and no score is masked. Only whole splits are shared, and each row's
result goes where its own sequence would have put it: whoever merges sees no difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_shape
from ..common.launch import Target, next_power_of_2, target
from .gather import SPLIT_TOKENS
from .quantised_triton import (
    attend_pairs,
    cache_pairs,
    join_pairs,
    layer_scale,
    no_pairs,
    score_pairs,
    split_queries,
)
from .tile_triton import LOG2E, capped, fit_tiles, key_rows, load_rows, softmax_step

if TYPE_CHECKING:
    from . import SharedPrefixes
    from .plan_triton import DecodePlan

__all__ = [
    "BLOCK_M",
    "CascadeConfig",
    "SharedWork",
    "attend_shared",
    "cascade_kernel",
    "config",
    "plan_shared",
    "shares_split",
]

BLOCK_M: Final = 64
"""Rows of a tile: the least that sm_90's wide matrix instruction takes."""


@dataclass(frozen=True, eq=False, slots=True)
class SharedWork:
    """What of a step's decode attention is done for several sequences at once, on the device."""

    num_splits: Tensor
    """[num_seqs] int32: how many leading splits a sequence shares."""
    members: Tensor
    """[num_members] int32: the sequences that share any, those of a group one after another."""
    items: Tensor
    """[num_items, 3] int32: a split; the first row and the end of those that attend to it: `max_query_len *
    group_size` rows per KV head of each member, in their order, at most BLOCK_M of one group."""


@dataclass(frozen=True, slots=True)
class CascadeConfig:
    """How the kernel is launched."""

    block_n: int
    """Keys of a tile; divides SPLIT_TOKENS."""
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """None: as many as let two programs run on a multiprocessor, if need be by spilling."""


def config(*, head_dim: int, dtype: torch.dtype, target: Target) -> CascadeConfig:
    """Choose the largest tiles that spill no registers."""
    if dtype == torch.float32:  # exact products use no tensor cores and hold their operands in registers
        block_n, num_stages = fit_tiles(BLOCK_M, 16, 2, num_warps=8, head_dim=head_dim, dtype=dtype, target=target)
        return CascadeConfig(block_n, num_warps=8, num_stages=num_stages)
    if head_dim > 128:
        return CascadeConfig(block_n=32 if target.arch == 90 else 16, num_warps=8, num_stages=2)
    if target.arch == 90:
        return CascadeConfig(block_n=64, num_warps=4, num_stages=3)
    return CascadeConfig(block_n=64, num_warps=8, num_stages=3, max_registers=255 if target.arch == 80 else None)


def plan_shared(shared: SharedPrefixes, *, rows_per_seq: int, num_seqs: int, device: torch.device) -> SharedWork | None:
    """List a step's shared work, on the host, which knows the groups; None: nothing is shared.

    Args:
        rows_per_seq: rows of one KV head that a sequence may have.
    """
    check_shape("shared.leaders", shared.leaders, (num_seqs,))
    check_shape("shared.num_splits", shared.num_splits, (num_seqs,))
    members = torch.nonzero(shared.num_splits)[:, 0]
    members = members[torch.argsort(shared.leaders[members], stable=True)]
    if not len(members):
        return None
    leaders, num_members = torch.unique_consecutive(shared.leaders[members].long(), return_counts=True)
    num_splits = shared.num_splits[leaders].long()
    assert torch.equal(num_splits.repeat_interleave(num_members), shared.num_splits[members].long()), (
        "members of a group share different numbers of splits"
    )
    row_end = num_members.cumsum(0) * rows_per_seq  # [num_groups]
    first_row = row_end - num_members * rows_per_seq
    num_tiles = (row_end - first_row + BLOCK_M - 1) // BLOCK_M
    # Tiles that read the same keys are neighbours: the second-level cache has them still.
    num_items = num_splits * num_tiles
    group = torch.arange(len(leaders)).repeat_interleave(num_items)  # [num_items]
    which = torch.arange(len(group)) - (num_items.cumsum(0) - num_items)[group]
    first = first_row[group] + which % num_tiles[group] * BLOCK_M
    end = torch.minimum(first + BLOCK_M, row_end[group])
    items = torch.stack((which // num_tiles[group], first, end), 1)
    return SharedWork(*(_uploaded(x.int(), device) for x in (shared.num_splits, members, items)))


def _uploaded(x: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor from the host, which goes on at once: out of pageable memory it would wait for all that runs."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@triton.jit
def shares_split(i_split, num_splits, seq_len, query_len, window, SPLIT_TOKENS: tl.constexpr):
    """Return whether a split is attended to with others' rows: every row of the sequence must see every key of it.

    Args:
        num_splits: how many leading splits hold what others have, too. The last of these may hold this step's tokens
            nonetheless, and the first ones may be out of a row's window.
    """
    is_shared = i_split < tl.minimum(num_splits, (seq_len - query_len) // SPLIT_TOKENS)
    if window is not None:
        is_shared &= seq_len - window <= i_split * SPLIT_TOKENS
    return is_shared


@triton.jit
def _attend(
    b_q,
    p_keys,
    p_values,
    k_scale,
    v_scale,
    p_blocks,
    i_low,
    scale,
    soft_cap,
    SLOT_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Return the softmax's state over the split from key i_low: values [BLOCK_M, BLOCK_D], maximum and sum [BLOCK_M].

    Args:
        b_q: [BLOCK_M, BLOCK_D].  k_scale, v_scale: None; int8: where slot 0's is; e4m3: the layer's.
        SLOT_STRIDE: slots from a block to the next.
    """
    BLOCK_M: tl.constexpr = b_q.shape[0]
    BLOCK_D: tl.constexpr = b_q.shape[1]
    WIDE: tl.constexpr = b_q.dtype == tl.float32
    QUANTISED: tl.constexpr = p_keys.dtype.element_ty.is_int()
    factor = scale * LOG2E
    if soft_cap is not None:
        factor = 1.0
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    if QUANTISED:
        b_q = split_queries(b_q)
        b_acc = no_pairs(BLOCK_M, BLOCK_D)
        o_dim = tl.arange(0, BLOCK_D // 2)  # [BLOCK_D / 2], pairs
    else:
        b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        o_dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    ROW: tl.constexpr = HEAD_DIM // 2 if QUANTISED else HEAD_DIM
    for i_key in tl.range(i_low, i_low + SPLIT_TOKENS, BLOCK_N, num_stages=NUM_STAGES):
        o_slot = key_rows(p_blocks, i_key + tl.arange(0, BLOCK_N), SLOT_STRIDE, BLOCK_SIZE, 1)  # [BLOCK_N]
        b_keys = load_rows(p_keys, o_slot * ROW, None, o_dim, ROW)  # [BLOCK_N, BLOCK_D], or pairs
        b_values = load_rows(p_values, o_slot * ROW, None, o_dim, ROW)  # [BLOCK_N, BLOCK_D], or pairs
        if QUANTISED:
            b_scores = score_pairs(b_q, b_keys, k_scale, o_slot)  # [BLOCK_M, BLOCK_N]
        else:
            b_scores = tl.dot(b_q, b_keys.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if soft_cap is not None:
            b_scores = capped(b_scores, scale / soft_cap, soft_cap)
        b_weights, b_rescale, b_max, b_sum = softmax_step(b_scores, b_max, b_sum, factor, False)
        if QUANTISED:
            b_acc = attend_pairs(b_weights, b_values, b_acc, b_rescale, v_scale, o_slot, WIDE)
        else:
            b_acc = tl.dot(b_weights.to(b_values.dtype), b_values, b_acc * b_rescale[:, None], input_precision="ieee")
    if QUANTISED:
        b_acc = join_pairs(b_acc, v_scale, p_keys.dtype.element_ty == tl.int16, WIDE)
    return b_acc, b_max, b_sum


@triton.jit(
    do_not_specialize=[
        "p_cu_seqlens_q", "p_seq_lens", "p_block_table", "k_scale", "v_scale", "window", "max_parts", "max_query_len",
        "table_stride",
    ]
)  # fmt: skip
def cascade_kernel(
    p_q,
    p_k_cache,
    p_v_cache,
    k_scale,
    v_scale,
    p_partial,
    p_partial_max,
    p_partial_sum,
    p_cu_parts,
    p_num_splits,
    p_members,
    p_items,
    p_cu_seqlens_q,
    p_seq_lens,
    p_block_table,
    scale,
    soft_cap,
    window,
    max_parts,
    max_query_len,
    q_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """partial[parts of (s, i)] = the softmax's state of s's rows over split i, for the sequences s that share it.

    One program handles one KV head of one item: at most BLOCK_M rows (member, query token, head) and all keys of a
    split. Grid: (num_items, NUM_KV_HEADS).
    """
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP_SIZE
    p_item = p_items + tl.program_id(0) * 3
    i_split = tl.load(p_item)
    i_kv_head = tl.program_id(1)
    o_row = tl.load(p_item + 1) + tl.arange(0, BLOCK_M)  # [BLOCK_M] of one KV head's rows of all members
    m_row = o_row < tl.load(p_item + 2)
    rows_per_seq = max_query_len * GROUP_SIZE
    o_row_token = o_row % rows_per_seq // GROUP_SIZE  # [BLOCK_M] from the sequence's first query token
    o_head = i_kv_head * GROUP_SIZE + o_row % GROUP_SIZE  # [BLOCK_M]

    o_seq = tl.load(p_members + o_row // rows_per_seq, mask=m_row, other=0)  # [BLOCK_M]
    o_start = tl.load(p_cu_seqlens_q + o_seq).to(tl.int32)  # [BLOCK_M]
    b_query_len = tl.load(p_cu_seqlens_q + o_seq + 1).to(tl.int32) - o_start  # [BLOCK_M]
    b_seq_len = tl.load(p_seq_lens + o_seq).to(tl.int32)  # [BLOCK_M]
    o_place = tl.load(p_cu_parts + o_seq) + i_split * b_query_len + o_row_token  # [BLOCK_M] in the scratch
    m_row &= shares_split(i_split, tl.load(p_num_splits + o_seq), b_seq_len, b_query_len, window, SPLIT_TOKENS)
    m_row &= o_row_token < b_query_len
    m_row &= o_place < max_parts  # the scratch ends there, and has no room for 2**31 rows
    o_part = o_place * NUM_Q_HEADS + o_head  # [BLOCK_M] int32
    # The blocks as a row knows them that sees the split: another's window may have left them.
    i_seq = tl.max(tl.where(m_row, o_seq, -1), 0)
    if i_seq >= 0:
        o_q = (o_start + o_row_token).to(tl.int64) * q_stride + o_head * HEAD_DIM  # [BLOCK_M]
        o_dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        b_q = load_rows(p_q, o_q, m_row, o_dim, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
        ROW: tl.constexpr = HEAD_DIM // 2 if p_k_cache.dtype.element_ty.is_int() else HEAD_DIM  # or pairs
        if p_k_cache.dtype.element_ty == tl.int16:
            k_scale += i_kv_head * BLOCK_SIZE
            v_scale += i_kv_head * BLOCK_SIZE
        elif p_k_cache.dtype.element_ty == tl.uint16:
            k_scale, v_scale = layer_scale(k_scale), layer_scale(v_scale)
        b_acc, b_max, b_sum = _attend(
            b_q, p_k_cache + i_kv_head * (BLOCK_SIZE * ROW), p_v_cache + i_kv_head * (BLOCK_SIZE * ROW), k_scale,
            v_scale, p_block_table + i_seq.to(tl.int64) * table_stride, i_split * SPLIT_TOKENS, scale, soft_cap,
            NUM_KV_HEADS * BLOCK_SIZE, BLOCK_SIZE, HEAD_DIM, SPLIT_TOKENS, BLOCK_N, NUM_STAGES,
        )  # fmt: skip
        p_part = p_partial + o_part.to(tl.int64)[:, None] * HEAD_DIM + o_dim[None, :]
        tl.store(p_part, b_acc, mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :])
        tl.store(p_partial_max + o_part, b_max, mask=m_row)
        tl.store(p_partial_sum + o_part, b_sum, mask=m_row)


def attend_shared(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: DecodePlan,
    work: SharedWork,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    k_scale: Tensor | float | None,
    v_scale: Tensor | float | None,
) -> None:
    """Write the partial results of a step's shared splits, from arguments that decode has checked."""
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    settings = config(head_dim=head_dim, dtype=q.dtype, target=target(q.device))
    cascade_kernel[len(work.items), num_kv_heads](
        q, cache_pairs(k_cache), cache_pairs(v_cache), k_scale, v_scale, plan.partial, plan.partial_max,
        plan.partial_sum, plan.cu_parts, work.num_splits, work.members, work.items, cu_seqlens_q, seq_lens, block_table,
        scale, soft_cap, window, len(plan.partial), plan.max_query_len, q.stride(0), block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP_SIZE=q.shape[1] // num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        SPLIT_TOKENS=SPLIT_TOKENS, BLOCK_M=BLOCK_M, BLOCK_N=settings.block_n, BLOCK_D=next_power_of_2(head_dim),
        NUM_STAGES=settings.num_stages, num_warps=settings.num_warps, maxnreg=settings.max_registers,
        enable_fp_fusion=True,
    )  # fmt: skip
