# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds the list of prefill attention's work, made on the device. It does not know how the work is done.

The host does not know query lengths: the list has room for all that the shapes allow, and says where there is no work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import cdiv

__all__ = ["Worklist", "heads_per_tile", "list_work", "plan_prefill", "tokens_per_item"]

_BLOCK: Final = 64
"""Items, and sequences, that a program of the listing kernel ranks at a time."""


def heads_per_tile(block_m: int, group_size: int) -> int:
    """Return how many of the query heads of one KV head share the rows of a tile: all, or equal parts of them."""
    return cdiv(group_size, cdiv(group_size, block_m))


def tokens_per_item(head_dim: int, group_size: int) -> int:
    """Return the query tokens of one work item: of the geometry alone, so that all layers and dtypes share a list."""
    block_m = 128 if head_dim <= 128 else 64
    return block_m // heads_per_tile(block_m, group_size)


@dataclass(frozen=True, slots=True)
class Worklist:
    """The work items of one step, those that see the most keys first: what starts last should be short.

    Args:
        items: [cdiv(num_tokens, item_tokens) + num_seqs, 2] int32: sequence, which of its items; sequence -1: none.
        item_tokens: successive query tokens of an item.
        num_seqs: sequences of the step.
    """

    items: Tensor
    item_tokens: int
    num_seqs: int


@triton.jit
def _num_longer(first, end, length, ITEM_TOKENS: tl.constexpr):
    """Return how many items of a sequence see more than `length` keys; its rows are at positions first .. end - 1.

    The arguments are broadcast against each other. Item i sees min(first + (i + 1) · ITEM_TOKENS, end) keys.
    """
    num_items = (end - first + ITEM_TOKENS - 1) // ITEM_TOKENS
    shorter = tl.maximum(length - first, 0) // ITEM_TOKENS
    return tl.where((num_items > 0) & (end > length), num_items - shorter, 0)


@triton.jit(do_not_specialize=["p_cu_seqlens_q", "p_seq_lens", "num_seqs", "max_items"])
def _list_work(
    p_items, p_cu_seqlens_q, p_seq_lens, num_seqs, max_items, ITEM_TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """items[rank of (s, i)] = (s, i), ranked by the keys that item i of sequence s sees, then by s.

    One program handles one sequence: it counts, in every sequence, the items that come before each of its own. Grid:
    (num_seqs,).
    """
    i_seq = tl.program_id(0)
    query_len = tl.load(p_cu_seqlens_q + i_seq + 1).to(tl.int32) - tl.load(p_cu_seqlens_q + i_seq).to(tl.int32)
    end = tl.load(p_seq_lens + i_seq).to(tl.int32)
    num_items = (query_len + ITEM_TOKENS - 1) // ITEM_TOKENS
    for i_item in range(0, num_items, BLOCK):
        o_item = i_item + tl.arange(0, BLOCK)
        o_length = tl.minimum(end - query_len + (o_item + 1) * ITEM_TOKENS, end)  # [BLOCK]
        b_rank = tl.zeros((BLOCK,), tl.int32)
        for i_other in range(0, num_seqs, BLOCK):
            o_other = i_other + tl.arange(0, BLOCK)
            m_other = o_other < num_seqs
            b_start = tl.load(p_cu_seqlens_q + o_other, mask=m_other, other=0).to(tl.int32)  # [BLOCK]
            b_stop = tl.load(p_cu_seqlens_q + o_other + 1, mask=m_other, other=0).to(tl.int32)
            b_end = tl.load(p_seq_lens + o_other, mask=m_other, other=0).to(tl.int32)
            # An earlier sequence also comes first with an item as long.
            o_beyond = o_length[:, None] - (o_other < i_seq)[None, :].to(tl.int32)  # [BLOCK, BLOCK]
            b_rank += tl.sum(_num_longer((b_end - b_stop + b_start)[None, :], b_end[None, :], o_beyond, ITEM_TOKENS), 1)
        # A caller who promised fewer tokens loses results, but nothing is written past the list.
        m_item = (o_item < num_items) & (b_rank < max_items)
        tl.store(p_items + 2 * b_rank, i_seq, mask=m_item)
        tl.store(p_items + 2 * b_rank + 1, o_item, mask=m_item)


def list_work(cu_seqlens_q: Tensor, seq_lens: Tensor, *, num_tokens: int, item_tokens: int) -> Worklist:
    """List the work of one step.

    Args:
        num_tokens: query rows of all sequences, or more.
    """
    num_seqs = len(seq_lens)
    max_items = cdiv(num_tokens, item_tokens) + num_seqs
    items = torch.full((max_items, 2), -1, dtype=torch.int32, device=seq_lens.device)
    if num_seqs:
        _list_work[(num_seqs,)](
            items, cu_seqlens_q, seq_lens, num_seqs, max_items, ITEM_TOKENS=item_tokens, BLOCK=_BLOCK, num_warps=4
        )
    return Worklist(items, item_tokens, num_seqs)


def plan_prefill(
    cu_seqlens_q: Tensor, seq_lens: Tensor, *, num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int
) -> Worklist:
    """Return the worklist of a step for attention of this geometry, with any window, cap, sinks and dtype."""
    item_tokens = tokens_per_item(head_dim, num_q_heads // num_kv_heads)
    return list_work(cu_seqlens_q, seq_lens, num_tokens=num_tokens, item_tokens=item_tokens)
