"""This package holds attention over the paged KV cache. It does not know how blocks are handed out.

A sequence of `seq_lens[s]` tokens, this step's included, has `query_len = cu_seqlens_q[s+1] - cu_seqlens_q[s]` query
rows; row i is at position `seq_lens[s] - query_len + i` and sees the keys at its own and earlier positions, with a
window only the last `window` of them (its own counts). A row that sees nothing gives zeros and an lse of -inf. Nothing
outside what a sequence sees is relied on: not the slots past its length, not the table entries past its last block,
not the blocks its window has left. Query rows from `cu_seqlens_q[-1]` on belong to nobody and are not written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor

from ..dispatch import active
from .gather import SPLIT_TOKENS

__all__ = [
    "SPLIT_TOKENS",
    "AttentionOp",
    "SharedPrefixes",
    "paged_attention_decode",
    "paged_attention_prefill",
    "plan_paged_attention",
]

AttentionOp = Literal["prefill", "decode"]


@dataclass(frozen=True, eq=False, slots=True)
class SharedPrefixes:
    """Which sequences of a step begin with the same keys, in whole splits of `SPLIT_TOKENS`; on the host.

    A split is shared as far as it lies before all query rows of a sequence; what is not can be claimed and is not used.
    """

    leaders: Tensor
    """[num_seqs] int32, CPU: a sequence of the same group, the same for all its members; any number outside of groups.
    The blocks of shared splits are alike in every member's row of the block table."""
    num_splits: Tensor
    """[num_seqs] int32, CPU: how many leading splits the members of a sequence's group share; 0: it is in no group."""


def plan_paged_attention(
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    op: AttentionOp,
    num_tokens: int,
    max_query_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_splits: int | None = None,
    max_parts: int | None = None,
    invariant: bool = False,
    shared: SharedPrefixes | None = None,
) -> Any:
    """Prepare one attention call for all layers of a step; pass the result as `plan` (decode) or `worklist` (prefill).

    Args:
        cu_seqlens_q: [num_seqs + 1] int32.  seq_lens: [num_seqs] int32, each at least its query length.
        block_table: [num_seqs, max_blocks_per_seq] int32.
        op: which of the two ops the plan is for.
        num_tokens: query rows of all sequences, or more: known to the caller, so that no device is asked.
        max_query_len: no sequence has more query rows.
        max_splits: how many splits of `SPLIT_TOKENS` the sequences have together at most; bounds the scratch. None:
            what the shapes allow.
        max_parts: how many partial results there are at most: splits times query rows, of the sequences of more than
            one split together; bounds the scratch. None: as if all sequences had `max_query_len` rows.
        invariant: a row's bits shall depend on its own prefix alone, not on neighbours, chunks or cache hits.
        shared: what decode may read once for several sequences. A backend may ignore it, and does if `invariant`: rows
            with shared keys are computed by other tiles.

    Returns:
        What the backend in force wants to know; opaque to callers.
    """
    return active["plan_paged_attention"](
        cu_seqlens_q, seq_lens, block_table, op=op, num_tokens=num_tokens, max_query_len=max_query_len,
        num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size,
        max_splits=max_splits, max_parts=max_parts, invariant=invariant, shared=shared,
    )  # fmt: skip


@overload
def paged_attention_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor,
    scale: float, window: int | None = ..., soft_cap: float | None = ..., sinks: Tensor | None = ...,
    k_scale: Tensor | float | None = ..., v_scale: Tensor | float | None = ..., worklist: Any = ...,
    out: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def paged_attention_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor,
    scale: float, window: int | None = ..., soft_cap: float | None = ..., sinks: Tensor | None = ...,
    k_scale: Tensor | float | None = ..., v_scale: Tensor | float | None = ..., worklist: Any = ...,
    out: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def paged_attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    worklist: Any = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from any number of query rows per sequence (a prompt, or a chunk of one over its cached prefix).

    Args:
        q: [num_tokens, num_q_heads, head_dim] float, already rotated.
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim], this step's tokens already written.
        cu_seqlens_q: [num_seqs + 1] int32.  seq_lens: [num_seqs] int32.
        block_table: [num_seqs, max_blocks_per_seq] int32.
        soft_cap: scores become soft_cap · tanh(score / soft_cap), after `scale`.
        sinks: [num_q_heads]: per head, a logit that takes part in the softmax and has no value.
        k_scale, v_scale: int8: [num_blocks, num_kv_heads, block_size] float32; e4m3: one number.
        worklist: what a backend has planned for this step; None: it plans for itself.

    Returns:
        [num_tokens, num_q_heads, head_dim] in q's dtype (`out`, where given); with return_lse also the natural log of
        the softmax's denominator, sink included, [num_tokens, num_q_heads] float32 (float64 for a float64 q).
    """
    result: Tensor | tuple[Tensor, Tensor] = active["paged_attention_prefill"](
        q, k_cache, v_cache, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_table=block_table, scale=scale,
        window=window, soft_cap=soft_cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale, worklist=worklist, out=out,
        return_lse=return_lse,
    )  # fmt: skip
    return result


@overload
def paged_attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor,
    scale: float, window: int | None = ..., soft_cap: float | None = ..., sinks: Tensor | None = ...,
    draft_mask: Tensor | None = ..., k_scale: Tensor | float | None = ..., v_scale: Tensor | float | None = ...,
    plan: Any = ..., out: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def paged_attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor,
    scale: float, window: int | None = ..., soft_cap: float | None = ..., sinks: Tensor | None = ...,
    draft_mask: Tensor | None = ..., k_scale: Tensor | float | None = ..., v_scale: Tensor | float | None = ...,
    plan: Any = ..., out: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    draft_mask: Tensor | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    plan: Any = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from at most 16 query rows per sequence: one that decodes, several that verify a draft.

    The arguments are those of `paged_attention_prefill`, and:

    Args:
        draft_mask: [num_tokens] int64: bit j of a row is set where the row may see its sequence's j-th query token. It
            only takes away from what the row would see, and says nothing of the keys before this step's.
        plan: what a backend has planned for this step; None: it plans for itself.
    """
    result: Tensor | tuple[Tensor, Tensor] = active["paged_attention_decode"](
        q, k_cache, v_cache, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_table=block_table, scale=scale,
        window=window, soft_cap=soft_cap, sinks=sinks, draft_mask=draft_mask, k_scale=k_scale, v_scale=v_scale,
        plan=plan, out=out, return_lse=return_lse,
    )  # fmt: skip
    return result
