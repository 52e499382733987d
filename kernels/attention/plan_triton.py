# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds the plan of a step's attention: which split of which sequence is which work item, and where partial
results go. It does not know how a split is attended to.

A split is `SPLIT_TOKENS` keys at absolute positions, so that neither neighbours nor the number of multiprocessors
decide where a row's sum is cut. Items are counted on the device, from the lengths as they are when the plan runs: the
host knows only how many there may be, and a captured plan serves every replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import cdiv
from .gather import SPLIT_TOKENS
from .reference import MAX_DECODE_QUERY_LEN

if TYPE_CHECKING:
    from . import AttentionOp, SharedPrefixes
    from .cascade_triton import SharedWork

__all__ = ["DecodePlan", "plan_decode", "plan_paged_attention"]

_BLOCK: Final = 256
"""Sequences counted at once, and items written at once."""


@dataclass(frozen=True, eq=False, slots=True)
class DecodePlan:
    """The work of one step's decode attention and its scratch, shared by the step's layers, which run in turn."""

    cu_splits: Tensor
    """[num_seqs + 1] int32: the first item of each sequence, then the number of items."""
    item_seqs: Tensor
    """[max_items] int32: the sequence of each item."""
    cu_parts: Tensor
    """[num_seqs] int32: where the partial results of a sequence of several splits begin: those of all its query tokens
    for its first split, then for the next."""
    partial: Tensor
    """[max_parts, num_q_heads, head_dim] float32: weighted values of one split for one token, not yet divided."""
    partial_max: Tensor
    partial_sum: Tensor
    """[max_parts, num_q_heads] float32: maximum (to base 2) and sum of the split's softmax.

    Not one lse: beside a score of -30,000 it would have no digits left for the sum.
    """
    counters: Tensor | None
    """[num_seqs, row tiles of all KV heads] int32 zeros: splits done, where the last one merges them all in the same
    launch; None: a second launch merges."""
    max_query_len: int
    may_split: bool
    """Whether the shapes let a sequence have several splits."""
    shared: SharedWork | None
    """What is done for several sequences at once; None: nothing."""

    def serves(self, num_seqs: int, num_q_heads: int, head_dim: int) -> bool:
        """Whether this plan was made for a batch of these shapes."""
        return len(self.cu_splits) == num_seqs + 1 and self.partial.shape[1:] == (num_q_heads, head_dim)


@triton.jit
def _num_items(p_cu_seqlens_q, p_seq_lens, o_seq, m_seq, SPLIT_TOKENS: tl.constexpr):
    """Return how many items, and partial results, sequences have: [BLOCK] each.

    Rows without keys are still written, no rows are no work, and what is not split leaves nothing to merge.
    """
    b_query_len = tl.load(p_cu_seqlens_q + o_seq + 1, mask=m_seq, other=0)
    b_query_len -= tl.load(p_cu_seqlens_q + o_seq, mask=m_seq, other=0)
    b_seq_len = tl.load(p_seq_lens + o_seq, mask=m_seq, other=0)
    b_items = tl.where(b_query_len > 0, tl.maximum(tl.cdiv(b_seq_len, SPLIT_TOKENS), 1), 0).to(tl.int32)
    return b_items, tl.where(b_items > 1, b_items * b_query_len, 0).to(tl.int32)


@triton.jit(do_not_specialize=["p_cu_seqlens_q", "p_seq_lens", "num_seqs", "max_items", "max_query_len"])
def plan_decode_kernel(
    p_cu_splits,
    p_item_seqs,
    p_cu_parts,
    p_cu_seqlens_q,
    p_seq_lens,
    num_seqs,
    max_items,
    max_query_len,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cu_splits, cu_parts = prefix sums of the sequences' items, parts; item_seqs[cu_splits[s] : cu_splits[s + 1]] = s.

    One program handles one sequence: it counts the items before its own and writes its own. Grid: (num_seqs,).
    """
    i_seq = tl.program_id(0)
    o_block = tl.arange(0, BLOCK)  # [BLOCK]
    b_before = tl.zeros((BLOCK,), tl.int32)
    b_parts_before = tl.zeros((BLOCK,), tl.int32)
    for i_other in range(0, i_seq, BLOCK):
        o_seq = i_other + o_block  # [BLOCK]
        b_items, b_parts = _num_items(p_cu_seqlens_q, p_seq_lens, o_seq, o_seq < i_seq, SPLIT_TOKENS)
        b_before += b_items
        b_parts_before += b_parts
    i_first = tl.sum(b_before, 0)
    num_own, _ = _num_items(p_cu_seqlens_q, p_seq_lens, i_seq, True, SPLIT_TOKENS)
    tl.device_assert(i_first + num_own <= max_items, "more splits than max_splits")
    query_len = tl.load(p_cu_seqlens_q + i_seq + 1) - tl.load(p_cu_seqlens_q + i_seq)
    tl.device_assert(query_len <= max_query_len, "more query tokens than max_query_len")

    # A caller who promised fewer splits loses results, but nothing is written past the scratch.
    i_end = tl.minimum(i_first + num_own, max_items)
    for i_item in range(i_first, i_end, BLOCK):
        o_item = i_item + o_block  # [BLOCK]
        tl.store(p_item_seqs + o_item, i_seq + tl.zeros((BLOCK,), tl.int32), mask=o_item < i_end)
    tl.store(p_cu_splits + i_seq, i_first)
    tl.store(p_cu_parts + i_seq, tl.sum(b_parts_before, 0))
    if i_seq == num_seqs - 1:
        tl.store(p_cu_splits + num_seqs, i_end)


def plan_decode(
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    max_query_len: int,
    num_q_heads: int,
    head_dim: int,
    block_size: int,
    max_splits: int | None = None,
    max_parts: int | None = None,
    fused: bool = False,
    shared: SharedWork | None = None,
) -> DecodePlan:
    """Plan a step's decode attention on the device; see `octavo.kernels.plan_paged_attention`.

    Args:
        fused: let the last of a sequence's splits merge them all, instead of a second launch.
        shared: what is done for several sequences at once: nobody counts it, so not together with `fused`.

    Raises:
        ValueError: decode does not take so many query tokens, or (on a CPU) a sequence has more than promised.
    """
    assert not (fused and shared is not None), "the last split would wait for shared ones"
    num_seqs = seq_lens.shape[0]
    longest = max_query_len
    if num_seqs and cu_seqlens_q.device.type == "cpu":  # no device to wait for, so what is there can be looked at
        longest = max(longest, int(cu_seqlens_q.diff().max()))
    if longest > MAX_DECODE_QUERY_LEN:
        raise ValueError(f"a sequence has {longest} query tokens; decode takes at most {MAX_DECODE_QUERY_LEN}")
    if longest > max_query_len:
        raise ValueError(f"a sequence has {longest} query tokens; max_query_len promises at most {max_query_len}")
    splits_per_seq = max(1, cdiv(block_table.shape[1] * block_size, SPLIT_TOKENS))
    max_items = num_seqs * splits_per_seq
    if max_splits is not None:
        max_items = min(max_items, num_seqs + max_splits)  # one item each where a sequence has no key
    if max_parts is None:
        max_parts = max_items * max_query_len if splits_per_seq > 1 else 0
    counts, parts = (partial(torch.empty, dtype=x, device=seq_lens.device) for x in (torch.int32, torch.float32))
    plan = DecodePlan(
        cu_splits=counts(num_seqs + 1),
        item_seqs=counts(max_items),
        cu_parts=counts(num_seqs),
        partial=parts((max_parts, num_q_heads, head_dim)),
        partial_max=parts((max_parts, num_q_heads)),
        partial_sum=parts((max_parts, num_q_heads)),
        counters=counts((num_seqs, max_query_len * num_q_heads)).zero_() if fused else None,
        max_query_len=max_query_len,
        may_split=splits_per_seq > 1,
        shared=shared,
    )
    if num_seqs:
        plan_decode_kernel[(num_seqs,)](
            plan.cu_splits, plan.item_seqs, plan.cu_parts, cu_seqlens_q, seq_lens, num_seqs, max_items, max_query_len,
            SPLIT_TOKENS=SPLIT_TOKENS, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return plan


def plan_paged_attention(
    cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor, *, op: AttentionOp, num_tokens: int,
    max_query_len: int, num_q_heads: int, num_kv_heads: int, head_dim: int, block_size: int,
    max_splits: int | None = None, max_parts: int | None = None, invariant: bool = False,
    shared: SharedPrefixes | None = None,
) -> Any:  # fmt: skip
    """See `octavo.kernels.plan_paged_attention`. Where nothing is shared, a decoded row's bits depend on its own prefix
    alone in any case, but are those of the same row in a prompt only if `invariant`.
    """
    if invariant:
        from .invariant_triton import plan_invariant

        group_size = num_q_heads // num_kv_heads
        return plan_invariant(cu_seqlens_q, seq_lens, num_tokens=num_tokens, group_size=group_size)
    if op == "prefill":
        from .worklist_triton import plan_prefill

        return plan_prefill(
            cu_seqlens_q, seq_lens, num_tokens=num_tokens, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )  # fmt: skip
    work = None
    if shared is not None:
        from .cascade_triton import plan_shared

        rows_per_seq = max_query_len * (num_q_heads // num_kv_heads)
        work = plan_shared(shared, rows_per_seq=rows_per_seq, num_seqs=len(seq_lens), device=seq_lens.device)
    return plan_decode(
        cu_seqlens_q, seq_lens, block_table, max_query_len=max_query_len, num_q_heads=num_q_heads, head_dim=head_dim,
        block_size=block_size, max_splits=max_splits, max_parts=max_parts, shared=work,
    )  # fmt: skip
