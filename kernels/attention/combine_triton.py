# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds how the partial results of a sequence's splits become one. It does not know how they were made.

A partial result is the state of a softmax over one split: maximum, sum and weighted values. States are merged in
ascending order, `MERGE` splits at absolute places at a time; where one split alone has seen anything, the merged state
is that split's, to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_triton import LARGEST, LOG2E, finish

__all__ = ["MERGE", "combine_kernel", "live_splits", "merge_splits", "store_rows"]

MERGE = tl.constexpr(16)


@triton.jit
def live_splits(seq_len, query_len, window, SPLIT_TOKENS: tl.constexpr):
    """Return the first key that some row sees, the first split that holds such a key, and the number of splits."""
    i_oldest = 0
    if window is not None:
        i_oldest = tl.maximum(seq_len - query_len - window + 1, 0)
    return i_oldest, i_oldest // SPLIT_TOKENS, tl.cdiv(seq_len, SPLIT_TOKENS)


@triton.jit
def merge_splits(
    p_partial,
    p_partial_max,
    p_partial_sum,
    i_row,
    num_rows,
    i_first_split,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return one row's state over splits i_first_split to num_splits: values [1, BLOCK_D], maximum [1], sum [1].

    Args:
        i_row: int64, where the row's part of split 0 is; that of the next one is num_rows further on.
    """
    o_split = tl.arange(0, MERGE)  # [MERGE]
    o_dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b_max = tl.full((1,), float("-inf"), tl.float32)
    b_sum = tl.zeros((1,), tl.float32)
    b_acc = tl.zeros((1, BLOCK_D), tl.float32)
    for i_split in range(i_first_split // MERGE * MERGE, num_splits, MERGE):
        m_split = (i_split + o_split >= i_first_split) & (i_split + o_split < num_splits)
        o_part = i_row + (i_split + o_split).to(tl.int64) * num_rows  # [MERGE]
        m_part = m_split[:, None] & (o_dim < HEAD_DIM)[None, :]
        # Past the first-level cache, where other multiprocessors' writes do not show.
        b_part_max = tl.load(p_partial_max + o_part, mask=m_split, other=float("-inf"), cache_modifier=".cg")
        b_part_sum = tl.load(p_partial_sum + o_part, mask=m_split, other=0.0, cache_modifier=".cg")
        p_part = p_partial + o_part[:, None] * HEAD_DIM + o_dim[None, :]
        b_part = tl.load(p_part, mask=m_part, other=0.0, cache_modifier=".cg")  # [MERGE, BLOCK_D]

        b_new_max = tl.maximum(b_max, tl.max(b_part_max, 0))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_weight = tl.math.exp2(b_part_max - b_shift)  # [MERGE]
        b_rescale = tl.math.exp2(b_max - b_shift)  # [1]
        b_sum = b_sum * b_rescale + tl.sum(b_part_sum * b_weight, 0)
        b_acc = b_acc * b_rescale[:, None] + tl.sum(b_part * b_weight[:, None], 0)[None, :]
        b_max = b_new_max
    return b_acc, b_max, b_sum


@triton.jit
def store_rows(
    p_out,
    p_lse,
    p_sinks,
    b_acc,
    b_max,
    b_sum,
    o_token,
    o_head,
    m_row,
    out_stride,
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Give the softmax its sink, once, and write what the rows' final states come to.

    Args:
        b_acc: [rows, BLOCK_D].  b_max, b_sum, o_token, o_head, m_row: [rows].
    """
    if p_sinks is not None:
        b_sink = tl.load(p_sinks + o_head, mask=m_row, other=0.0).to(tl.float32) * LOG2E
        # Finite, as inf - inf is NaN: a sum that is 0 or infinite then says that the row is empty, or all its sink's.
        b_new_max = tl.minimum(tl.maximum(tl.maximum(b_max, b_sink), -LARGEST), LARGEST)
        b_rescale = tl.math.exp2(b_max - b_new_max)
        b_sum = b_sum * b_rescale + tl.math.exp2(b_sink - b_new_max)
        b_acc = b_acc * b_rescale[:, None]
        b_max = b_new_max
    b_out, b_lse = finish(b_acc, b_max, b_sum)
    o_dim = tl.arange(0, b_acc.shape[1])
    p_rows = p_out + o_token.to(tl.int64)[:, None] * out_stride + o_head[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dim < HEAD_DIM)[None, :])
    if p_lse is not None:
        tl.store(p_lse + o_token * NUM_Q_HEADS + o_head, b_lse, mask=m_row)


@triton.jit(do_not_specialize=["p_cu_seqlens_q", "p_seq_lens", "max_query_len", "max_parts", "window"])
def combine_kernel(
    p_partial,
    p_partial_max,
    p_partial_sum,
    p_out,
    p_lse,
    p_cu_parts,
    p_cu_seqlens_q,
    p_seq_lens,
    p_sinks,
    max_query_len,
    max_parts,
    window,
    out_stride,
    NUM_Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
):
    """out = Σ 2^(max_i - max) · values_i / Σ 2^(max_i - max) · sum_i over the splits i that the row's sequence sees.

    One program handles one query token and head, and has nothing to do where the sequence has one such split.
    Grid: (num_seqs * max_query_len, num_q_heads).
    """
    i_seq = tl.program_id(0) // max_query_len
    i_token = tl.program_id(0) % max_query_len
    i_head = tl.program_id(1)
    i_start = tl.load(p_cu_seqlens_q + i_seq).to(tl.int32)
    query_len = tl.load(p_cu_seqlens_q + i_seq + 1).to(tl.int32) - i_start
    seq_len = tl.load(p_seq_lens + i_seq).to(tl.int32)
    _, i_first_split, num_splits = live_splits(seq_len, query_len, window, SPLIT_TOKENS)
    if (i_token < query_len) & (num_splits - i_first_split > 1):
        i_part = tl.load(p_cu_parts + i_seq)
        # A caller who promised fewer parts loses results, but nothing is read past the scratch.
        num_splits = tl.minimum(num_splits, (max_parts - i_part) // query_len)
        i_row = (i_part + i_token).to(tl.int64) * NUM_Q_HEADS + i_head
        b_acc, b_max, b_sum = merge_splits(
            p_partial, p_partial_max, p_partial_sum, i_row, query_len * NUM_Q_HEADS, i_first_split, num_splits,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        o_row = tl.arange(0, 1)  # [1]
        store_rows(
            p_out, p_lse, p_sinks, b_acc, b_max, b_sum, o_row + i_start + i_token, o_row + i_head, o_row == 0,
            out_stride, NUM_Q_HEADS, HEAD_DIM,
        )  # fmt: skip
