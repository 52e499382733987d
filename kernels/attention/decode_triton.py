# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds decode attention as a Triton kernel: few query rows per sequence over a long paged cache. It does
not know how work items are made, nor how partial results are merged.

Bound by reading the cache, so every key and value is fetched once, into tiles of `block_n` keys that all rows of one KV
head share, and a sequence's splits are spread over the multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_attention, check_draft_mask, check_positive, check_side_by_side
from ..common.launch import Target, cdiv, next_power_of_2, target
from ..common.tuned import tuned
from .cascade_triton import attend_shared, shares_split
from .combine_triton import combine_kernel, live_splits, merge_splits, store_rows
from .gather import SPLIT_TOKENS
from .invariant_triton import InvariantPlan, attend_invariant
from .plan_triton import DecodePlan, plan_decode
from .quantised_triton import attend_pairs, cache_pairs, join_pairs, layer_scale, no_pairs, score_pairs, split_queries
from .reference import MAX_DECODE_QUERY_LEN
from .tile_triton import LOG2E, capped, check_supported, key_rows, load_rows, softmax_step

__all__ = ["DecodeConfig", "config", "decode_kernel", "paged_attention_decode"]

_MAX_REGISTERS: Final = {4: 128, 3: 168, 2: 255, 1: 255}
"""Programs of 128 threads that a multiprocessor shall hold -> registers that leave each thread its share."""
_NATIVE = False
"""Off until all pairs of bytes have been compared on a GPU; then quantised decode issues a third fewer instructions."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the decode kernel is launched."""

    block_h: int
    """Rows of a tile: query tokens times the query heads of one KV head."""
    block_n: int
    """Keys of a tile; divides SPLIT_TOKENS."""
    num_tiles: int
    """Row tiles per sequence and KV head; each reads the keys anew, from the second-level cache."""
    num_programs: int
    """Programs per row tile and KV head, which share the items: as many as run at once."""
    max_registers: int
    num_warps: int
    num_stages: int
    native: bool
    """Whether the machine's own instructions convert e4m3."""


def config(
    *,
    group_size: int,
    max_query_len: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    draft: bool,
    quantised: bool,
    target: Target,
) -> DecodeConfig:
    """Choose how decode is launched, as measured or else by rule; a row's bits do not depend on the batch's part in it.

    Tiles of 16 and of 32 rows lay their scores out alike over the warps, and so sum them in the same order, as long as
    there are more keys than rows. 64 rows would not (another matrix instruction on sm_90), nor would a float32 product.
    """
    num_rows = max(group_size * max_query_len, 1)
    exact, wide = dtype == torch.float32, head_dim > 128
    block_h = 16 if exact or wide or num_rows <= 16 else 32
    num_tiles = cdiv(num_rows, block_h)
    # The most programs that spill no registers; each has one tile of keys and values on its way.
    elements = block_h * next_power_of_2(head_dim)
    programs_per_sm = 2 if exact or draft or elements > 2048 else 3 if elements > 1024 else 4
    # Both halves of keys and values in float32 take registers.
    block_n, num_warps = (16, 8 if wide else 4) if exact and quantised else (32 if wide else 64, 4)
    measured = {} if exact else tuned("decode", target.arch, head_dim=head_dim, dtype=dtype, quantised=quantised)
    num_warps = measured.get("num_warps", num_warps)
    if block_h == 16 and not draft:  # others hold more registers
        programs_per_sm = measured.get("programs_per_sm", programs_per_sm)
    return DecodeConfig(
        block_h,
        block_n=measured.get("block_n", block_n),
        num_tiles=num_tiles,
        num_programs=max(1, target.num_sms * programs_per_sm * 4 // (num_warps * num_kv_heads * num_tiles)),
        max_registers=_MAX_REGISTERS[programs_per_sm],
        num_warps=num_warps,
        num_stages=measured.get("num_stages", 3),
        native=_NATIVE and not exact and target.arch >= 89,
    )


@triton.jit
def _attend_split(
    b_q,
    p_keys,
    p_values,
    k_scale,
    v_scale,
    p_blocks,
    b_draft,
    o_position,
    i_first,
    i_low,
    i_high,
    scale,
    soft_cap,
    window,
    SLOT_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATIVE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Return the softmax's state over keys i_low to i_high: values [BLOCK_H, BLOCK_D], maximum and sum [BLOCK_H].

    Args:
        b_q: [BLOCK_H, BLOCK_D].  k_scale, v_scale: None; int8: where slot 0's is; e4m3: the layer's.
        b_draft, o_position: [BLOCK_H], each row's draft mask, or None, and position.
        i_first: position of the sequence's first query token.  SLOT_STRIDE: slots from a block to the next.
    """
    BLOCK_H: tl.constexpr = b_q.shape[0]
    BLOCK_D: tl.constexpr = b_q.shape[1]
    WIDE: tl.constexpr = b_q.dtype == tl.float32
    QUANTISED: tl.constexpr = p_keys.dtype.element_ty.is_int()
    factor = scale * LOG2E
    if soft_cap is not None:
        factor = 1.0
    b_max = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_H,), tl.float32)
    ROW: tl.constexpr = HEAD_DIM // 2 if QUANTISED else HEAD_DIM
    o_dim = tl.arange(0, BLOCK_D // 2 if QUANTISED else BLOCK_D)  # pairs, or elements
    if QUANTISED:
        b_q = split_queries(b_q)
        b_acc = no_pairs(BLOCK_H, BLOCK_D)
    else:
        b_acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for i_key in tl.range(i_low // BLOCK_N * BLOCK_N, i_high, BLOCK_N, num_stages=NUM_STAGES):
        o_key = i_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        # Lanes beyond either end repeat a key that is seen: their weight is 0, and 0 times a real value is 0.
        o_seen = tl.minimum(tl.maximum(o_key, i_low), i_high - 1)  # [BLOCK_N]
        o_slot = key_rows(p_blocks, o_seen, SLOT_STRIDE, BLOCK_SIZE, 1)  # [BLOCK_N]
        b_keys = load_rows(p_keys, o_slot * ROW, None, o_dim, ROW)  # [BLOCK_N, BLOCK_D], or half of it
        b_values = load_rows(p_values, o_slot * ROW, None, o_dim, ROW)  # [BLOCK_N, BLOCK_D], or half of it
        if QUANTISED:
            b_scores = score_pairs(b_q, b_keys, k_scale, o_slot, NATIVE)  # [BLOCK_H, BLOCK_N]
        else:
            b_scores = tl.dot(b_q, b_keys.T, input_precision="ieee")  # [BLOCK_H, BLOCK_N]
        if soft_cap is not None:
            b_scores = capped(b_scores, scale / soft_cap, soft_cap)
        m_seen = o_key[None, :] <= o_position[:, None]  # no tile crosses a split's end, no position a length's
        if window is not None:
            m_seen &= o_key[None, :] > o_position[:, None] - window
        if b_draft is not None:
            o_draft = o_key - i_first  # [BLOCK_N] from the sequence's first query token
            m_draft = (b_draft[:, None] >> tl.minimum(tl.maximum(o_draft, 0), 31)[None, :]) & 1
            m_seen &= (o_draft < 0)[None, :] | (m_draft == 1)
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
        b_weights, b_rescale, b_max, b_sum = softmax_step(b_scores, b_max, b_sum, factor, True)
        if QUANTISED:
            b_acc = attend_pairs(b_weights, b_values, b_acc, b_rescale, v_scale, o_slot, WIDE, NATIVE)
        else:
            b_acc = tl.dot(b_weights.to(b_values.dtype), b_values, b_acc * b_rescale[:, None], input_precision="ieee")
    if QUANTISED:
        b_acc = join_pairs(b_acc, v_scale, p_keys.dtype.element_ty == tl.int16, WIDE, NATIVE)
    return b_acc, b_max, b_sum


@triton.jit(
    do_not_specialize=[
        "p_num_shared", "p_cu_seqlens_q", "p_seq_lens", "p_block_table", "p_draft_mask", "k_scale", "v_scale", "window",
        "num_seqs", "max_parts", "table_stride",
    ]
)  # fmt: skip
def decode_kernel(
    p_q,
    p_k_cache,
    p_v_cache,
    k_scale,
    v_scale,
    p_out,
    p_lse,
    p_partial,
    p_partial_max,
    p_partial_sum,
    p_counters,
    p_cu_splits,
    p_cu_parts,
    p_item_seqs,
    p_num_shared,
    p_cu_seqlens_q,
    p_seq_lens,
    p_block_table,
    p_sinks,
    p_draft_mask,
    scale,
    soft_cap,
    window,
    num_seqs,
    max_parts,
    q_stride,
    out_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NATIVE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out = softmax(q · Kᵀ · scale) · V over a split of a sequence's keys; the softmax's state where it has several.

    One program handles BLOCK_H rows (query token, head) of one KV head, for every num_programs-th item of the plan.
    Grid: (num_programs, NUM_KV_HEADS * num_tiles).
    """
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP_SIZE
    i_kv_head = tl.program_id(1) % NUM_KV_HEADS
    i_tile_row = tl.program_id(1) // NUM_KV_HEADS * BLOCK_H
    o_row = i_tile_row + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    o_row_token = o_row // GROUP_SIZE  # [BLOCK_H] from the sequence's first query token
    o_head = i_kv_head * GROUP_SIZE + o_row % GROUP_SIZE  # [BLOCK_H]
    o_dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    ROW: tl.constexpr = HEAD_DIM // 2 if p_k_cache.dtype.element_ty.is_int() else HEAD_DIM  # a quantised one is pairs
    p_keys = p_k_cache + i_kv_head * (BLOCK_SIZE * ROW)
    p_values = p_v_cache + i_kv_head * (BLOCK_SIZE * ROW)
    if p_k_cache.dtype.element_ty == tl.int16:
        k_scale += i_kv_head * BLOCK_SIZE
        v_scale += i_kv_head * BLOCK_SIZE
    elif p_k_cache.dtype.element_ty == tl.uint16:
        k_scale, v_scale = layer_scale(k_scale), layer_scale(v_scale)
    for i_item in tl.range(tl.program_id(0), tl.load(p_cu_splits + num_seqs), tl.num_programs(0), num_stages=1):
        i_seq = tl.load(p_item_seqs + i_item)
        i_split = i_item - tl.load(p_cu_splits + i_seq)
        i_start = tl.load(p_cu_seqlens_q + i_seq).to(tl.int32)
        query_len = tl.load(p_cu_seqlens_q + i_seq + 1).to(tl.int32) - i_start
        seq_len = tl.load(p_seq_lens + i_seq).to(tl.int32)
        i_oldest, i_first_split, num_splits = live_splits(seq_len, query_len, window, SPLIT_TOKENS)
        done = False
        if p_num_shared is not None:
            done = shares_split(i_split, tl.load(p_num_shared + i_seq), seq_len, query_len, window, SPLIT_TOKENS)
        if (not done) & (i_split >= i_first_split) & (i_tile_row < query_len * GROUP_SIZE):
            m_row = o_row_token < query_len  # [BLOCK_H]
            o_token = i_start + o_row_token  # [BLOCK_H]
            o_q = o_token.to(tl.int64) * q_stride + o_head * HEAD_DIM  # [BLOCK_H]
            b_q = load_rows(p_q, o_q, m_row, o_dim, HEAD_DIM)  # [BLOCK_H, BLOCK_D]
            b_draft = None
            if p_draft_mask is not None:
                b_draft = tl.load(p_draft_mask + o_token, mask=m_row, other=0).to(tl.int32)  # [BLOCK_H]
            i_first = seq_len - query_len
            i_low = tl.maximum(i_split * SPLIT_TOKENS, i_oldest)
            i_high = tl.minimum((i_split + 1) * SPLIT_TOKENS, seq_len)
            p_blocks = p_block_table + i_seq.to(tl.int64) * table_stride
            b_acc, b_max, b_sum = _attend_split(
                b_q, p_keys, p_values, k_scale, v_scale, p_blocks, b_draft, i_first + o_row_token, i_first, i_low,
                i_high, scale, soft_cap, window, NUM_KV_HEADS * BLOCK_SIZE, BLOCK_SIZE, HEAD_DIM, BLOCK_N, NATIVE,
                NUM_STAGES,
            )  # fmt: skip
            if num_splits - i_first_split <= 1:
                store_rows(
                    p_out, p_lse, p_sinks, b_acc, b_max, b_sum, o_token, o_head, m_row, out_stride,
                    NUM_Q_HEADS, HEAD_DIM,
                )  # fmt: skip
            else:
                i_part = tl.load(p_cu_parts + i_seq)
                o_place = i_part + i_split * query_len + o_row_token  # [BLOCK_H]
                m_row &= o_place < max_parts  # the scratch ends there
                o_part = o_place.to(tl.int64) * NUM_Q_HEADS + o_head  # [BLOCK_H]
                p_part = p_partial + o_part[:, None] * HEAD_DIM + o_dim[None, :]
                tl.store(p_part, b_acc, mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :])
                tl.store(p_partial_max + o_part, b_max, mask=m_row)
                tl.store(p_partial_sum + o_part, b_sum, mask=m_row)
                if p_counters is not None:
                    tl.debug_barrier()  # every thread's part is written before the count says so
                    p_counter = p_counters + i_seq * tl.num_programs(1) + tl.program_id(1)
                    num_done = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
                    if num_done == num_splits - i_first_split - 1:
                        tl.store(p_counter, 0)  # for the next layer
                        num_merged = tl.minimum(num_splits, (max_parts - i_part) // query_len)
                        i_row_end = tl.minimum(i_tile_row + BLOCK_H, query_len * GROUP_SIZE)
                        for i_row in range(i_tile_row, i_row_end):
                            i_token = i_row // GROUP_SIZE
                            i_head = i_kv_head * GROUP_SIZE + i_row % GROUP_SIZE
                            b_row, b_row_max, b_row_sum = merge_splits(
                                p_partial, p_partial_max, p_partial_sum,
                                (i_part + i_token).to(tl.int64) * NUM_Q_HEADS + i_head, query_len * NUM_Q_HEADS,
                                i_first_split, num_merged, HEAD_DIM, BLOCK_D,
                            )  # fmt: skip
                            o_one = tl.arange(0, 1)  # [1]
                            store_rows(
                                p_out, p_lse, p_sinks, b_row, b_row_max, b_row_sum, o_one + i_start + i_token,
                                o_one + i_head, o_one == 0, out_stride, NUM_Q_HEADS, HEAD_DIM,
                            )  # fmt: skip


def paged_attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor,
    scale: float, window: int | None = None, soft_cap: float | None = None, sinks: Tensor | None = None,
    draft_mask: Tensor | None = None, k_scale: Tensor | float | None = None, v_scale: Tensor | float | None = None,
    plan: Any = None, out: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See `octavo.kernels.paged_attention_decode`. `plan` is a `DecodePlan` or an `InvariantPlan`."""
    check_attention(
        q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, window=window, soft_cap=soft_cap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, out=out,
    )  # fmt: skip
    check_supported(q, k_cache, out)
    check_positive("scale", scale)
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group_size, num_seqs = num_q_heads // num_kv_heads, seq_lens.shape[0]
    check_draft_mask(draft_mask, num_tokens)
    check_side_by_side(cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_table=block_table)
    check_side_by_side(sinks=sinks, draft_mask=draft_mask)
    if isinstance(plan, InvariantPlan):
        return attend_invariant(
            q, k_cache, v_cache, plan, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_table=block_table,
            scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, draft_mask=draft_mask, out=out,
            return_lse=return_lse,
        )  # fmt: skip
    if plan is None:
        plan = plan_decode(
            cu_seqlens_q, seq_lens, block_table, max_query_len=min(num_tokens, MAX_DECODE_QUERY_LEN),
            num_q_heads=num_q_heads, head_dim=head_dim, block_size=block_size,
        )  # fmt: skip
    assert isinstance(plan, DecodePlan), "the plan is of another backend or op"
    assert plan.serves(num_seqs, num_q_heads, head_dim), "the plan is of another step or model"
    settings = config(
        group_size=group_size,
        max_query_len=plan.max_query_len,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=q.dtype,
        draft=draft_mask is not None,
        quantised=k_cache.dtype != q.dtype,
        target=target(q.device),
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = q.new_empty((num_tokens, num_q_heads), dtype=torch.float32) if return_lse else None
    if num_tokens and num_seqs:
        if plan.shared is not None:
            attend_shared(
                q, k_cache, v_cache, plan, plan.shared, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, scale=scale,
                block_table=block_table, window=window, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale,
            )  # fmt: skip
        decode_kernel[min(settings.num_programs, len(plan.item_seqs)), num_kv_heads * settings.num_tiles](
            q, cache_pairs(k_cache), cache_pairs(v_cache), k_scale, v_scale, out, lse, plan.partial, plan.partial_max,
            plan.partial_sum, plan.counters, plan.cu_splits, plan.cu_parts, plan.item_seqs,
            None if plan.shared is None else plan.shared.num_splits, cu_seqlens_q, seq_lens, block_table, sinks,
            draft_mask, scale, soft_cap, window, num_seqs, len(plan.partial), q.stride(0), out.stride(0),
            block_table.stride(0), NUM_KV_HEADS=num_kv_heads, GROUP_SIZE=group_size, HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size, SPLIT_TOKENS=SPLIT_TOKENS, BLOCK_H=settings.block_h, BLOCK_N=settings.block_n,
            BLOCK_D=next_power_of_2(head_dim), NATIVE=settings.native, NUM_STAGES=settings.num_stages,
            num_warps=settings.num_warps, maxnreg=settings.max_registers, enable_fp_fusion=True,
        )  # fmt: skip
        if plan.may_split and plan.counters is None:
            combine_kernel[num_seqs * plan.max_query_len, num_q_heads](
                plan.partial, plan.partial_max, plan.partial_sum, out, lse, plan.cu_parts, cu_seqlens_q, seq_lens,
                sinks, plan.max_query_len, len(plan.partial), window, out.stride(0), NUM_Q_HEADS=num_q_heads,
                HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim), SPLIT_TOKENS=SPLIT_TOKENS, num_warps=2,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out if lse is None else (out, lse)
