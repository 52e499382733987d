"""This module holds attention over the paged KV cache in plain torch. It does not know Triton.

Plain calls (a float32 or float64 cache without scales; no cap, sinks, draft or lse) take the quick walk of `gather.py`.
What stands here computes all others: softmax and sums in float32 (float64 for a float64 q), both ops gathering whole
(block, head) tiles into one dense tensor, blanking the values of slots nobody may see (0 · NaN of a block's last owner
would reach its neighbour), and running batched products with the `group_size` query heads of one KV head as rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from ..common.checks import check_attention, check_draft_mask
from .gather import PagedPlan, attend, plan_blocks

__all__ = ["MAX_DECODE_QUERY_LEN", "paged_attention_decode", "paged_attention_prefill"]

MAX_DECODE_QUERY_LEN: Final = 16
_QUERY_TILE: Final = 128
"""Query tokens that prefill scores at once: bounds the scores held in memory and skips most of the causal triangle."""
_DENSE_ELEMENTS: Final = 1 << 20
"""Of the keys that decode gathers at once: bounds what is held in memory, and how much of it is padding."""


def _is_plain(
    q: Tensor,
    k_cache: Tensor,
    soft_cap: float | None,
    sinks: Tensor | None,
    k_scale: Tensor | float | None,
    return_lse: bool,
) -> bool:
    """Whether the quick walk of `gather.py` computes this call."""
    return (
        soft_cap is None
        and sinks is None
        and k_scale is None
        and not return_lse
        and q.dtype == k_cache.dtype
        and q.dtype in (torch.float32, torch.float64)
    )


def _check_query_len(cu_seqlens_q: Tensor) -> int:
    """Return the longest query, or raise ValueError where decode does not take it."""
    query_len = int(cu_seqlens_q.diff().max()) if len(cu_seqlens_q) > 1 else 0
    if query_len > MAX_DECODE_QUERY_LEN:
        raise ValueError(f"a sequence has {query_len} query tokens; decode takes at most {MAX_DECODE_QUERY_LEN}")
    return query_len


def _plan(cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor, k_cache: Tensor) -> PagedPlan | None:
    """Plan for one call; None where some sequence has query rows before its first key, which see nothing."""
    if (cu_seqlens_q.diff() > seq_lens).any():
        return None
    return plan_blocks(cu_seqlens_q, seq_lens, block_table, block_size=k_cache.shape[2], num_kv_heads=k_cache.shape[1])


def _gather(cache: Tensor, scale: Tensor | float | None, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (dequantised) blocks of each row of `blocks`: [num_seqs * num_kv_heads, L, head_dim].

    Args:
        blocks: [num_seqs, n] int64; L is n * block_size.
    """
    num_blocks, num_kv_heads, block_size, head_dim = cache.shape
    o_head = torch.arange(num_kv_heads, device=cache.device)
    tiles = (blocks[:, None, :] * num_kv_heads + o_head[None, :, None]).flatten()
    rows = cache.view(num_blocks * num_kv_heads, block_size * head_dim)
    if cache.dtype == torch.float8_e4m3fn:
        gathered = rows.view(torch.int8).index_select(0, tiles).view(cache.dtype)
    else:
        gathered = rows.index_select(0, tiles)
    dense = gathered.view(blocks.shape[0] * num_kv_heads, -1, head_dim).to(dtype)
    if isinstance(scale, Tensor) and scale.dim() == 3:
        factors = scale.view(num_blocks * num_kv_heads, block_size).index_select(0, tiles)
        return dense * factors.view(dense.shape[0], -1, 1)
    return dense if scale is None else dense * scale


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    *,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    may_see_nothing: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute softmax(q · keysᵀ · scale) · values, with sinks in the denominator.

    Args:
        q: [num_seqs, num_kv_heads, query_len, group_size, head_dim]
        keys, values: [num_seqs * num_kv_heads, L, head_dim]
        visible: [num_seqs or 1, query_len, L] bool
        may_see_nothing: whether some row of `visible` may be all False.

    Returns:
        Shaped as q, and [num_seqs, num_kv_heads, query_len, group_size].
    """
    num_seqs, num_kv_heads, query_len, group_size, head_dim = q.shape
    scores = torch.bmm(q.reshape(num_seqs * num_kv_heads, query_len * group_size, head_dim), keys.transpose(1, 2))
    scores *= scale
    if soft_cap is not None:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)
    scores = scores.view(num_seqs, num_kv_heads, query_len, group_size, -1)
    scores.masked_fill_(~visible[:, None, :, None, :], float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, num_kv_heads, 1, group_size, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    lse = torch.logsumexp(scores, dim=-1) if return_lse else None
    if sinks is not None:  # an infinite one would be NaN in a softmax; the largest number takes all weight, too
        scores[..., -1].clamp_(max=torch.finfo(scores.dtype).max)
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    if may_see_nothing:
        weights = weights.masked_fill(~visible.any(dim=-1)[:, None, :, None, None], 0.0)
    out = torch.bmm(weights.reshape(num_seqs * num_kv_heads, query_len * group_size, -1), values)
    return out.view(q.shape), lse


def paged_attention_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor,
    scale: float, window: int | None = None, soft_cap: float | None = None, sinks: Tensor | None = None,
    k_scale: Tensor | float | None = None, v_scale: Tensor | float | None = None, worklist: Any = None,
    out: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See `octavo.kernels.paged_attention_prefill`. `worklist` is a `PagedPlan`."""
    check_attention(
        q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, window=window, soft_cap=soft_cap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, out=out,
    )  # fmt: skip
    if _is_plain(q, k_cache, soft_cap, sinks, k_scale, return_lse):
        if worklist is None:
            worklist = _plan(cu_seqlens_q, seq_lens, block_table, k_cache)
        if worklist is not None:
            return attend(
                q, k_cache, v_cache, worklist, scale=scale, window=window,
                out=torch.empty_like(q) if out is None else out,
            )  # fmt: skip
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty((num_tokens, num_q_heads), dtype=dtype)
    starts, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    for s, seq_len in enumerate(lengths):
        start, end = starts[s], starts[s + 1]
        if start == end:
            continue
        first = seq_len - (end - start)  # position of the first query row
        oldest = 0 if window is None else max(0, first - window + 1)  # first position any row sees
        base = oldest // block_size * block_size
        blocks = block_table[s : s + 1, base // block_size : -(-seq_len // block_size)].long()
        keys = _gather(k_cache, k_scale, blocks, dtype)
        values = _gather(v_cache, v_scale, blocks, dtype)
        values[:, : oldest - base] = 0
        values[:, seq_len - base :] = 0
        o_key = torch.arange(base, base + keys.shape[1], device=q.device)
        queries = q[start:end].to(dtype).view(1, end - start, num_kv_heads, -1, head_dim).transpose(1, 2)
        for i in range(0, end - start, _QUERY_TILE):
            j = min(i + _QUERY_TILE, end - start)
            length = min(max(first + j - base, 0), keys.shape[1])  # keys the tile's last row sees
            o_query = torch.arange(first + i, first + j, device=q.device)[:, None]
            visible = o_key[:length] <= o_query
            if window is not None:
                visible &= o_key[:length] > o_query - window
            tile, tile_lse = _attend(
                queries[:, :, i:j], keys[:, :length], values[:, :length], visible[None], scale=scale, soft_cap=soft_cap,
                sinks=sinks, return_lse=return_lse, may_see_nothing=first < 0,
            )  # fmt: skip
            out[start + i : start + j] = tile[0].transpose(0, 1).reshape(j - i, num_q_heads, head_dim)
            if tile_lse is not None:
                lse[start + i : start + j] = tile_lse[0].transpose(0, 1).reshape(j - i, num_q_heads)
    return (out, lse) if return_lse else out


def paged_attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor,
    scale: float, window: int | None = None, soft_cap: float | None = None, sinks: Tensor | None = None,
    draft_mask: Tensor | None = None, k_scale: Tensor | float | None = None, v_scale: Tensor | float | None = None,
    plan: Any = None, out: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See `octavo.kernels.paged_attention_decode`. `plan` is a `PagedPlan`."""
    check_attention(
        q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, window=window, soft_cap=soft_cap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, out=out,
    )  # fmt: skip
    if _is_plain(q, k_cache, soft_cap, sinks, k_scale, return_lse) and draft_mask is None:
        if plan is None:
            _check_query_len(cu_seqlens_q)
            plan = _plan(cu_seqlens_q, seq_lens, block_table, k_cache)
        if plan is not None:
            return attend(
                q, k_cache, v_cache, plan, scale=scale, window=window, out=torch.empty_like(q) if out is None else out
            )
    num_tokens, num_q_heads, head_dim = q.shape
    check_draft_mask(draft_mask, num_tokens)
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty((num_tokens, num_q_heads), dtype=torch.promote_types(q.dtype, torch.float32))
    query_len = _check_query_len(cu_seqlens_q)
    for some in _groups(seq_lens, k_cache.shape[1] * head_dim) if query_len else ():
        _decode(
            q, k_cache, v_cache, cu_seqlens_q[:-1][some], cu_seqlens_q.diff()[some], seq_lens[some], block_table[some],
            query_len=query_len, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, draft_mask=draft_mask,
            k_scale=k_scale, v_scale=v_scale, out=out, lse=lse if return_lse else None,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _groups(seq_lens: Tensor, elements_per_key: int) -> Iterator[Tensor]:
    """Yield the sequences, those of similar length together, as many as may be gathered at once."""
    lengths, order = seq_lens.sort(descending=True)
    start = 0
    while start < len(lengths):
        size = max(1, _DENSE_ELEMENTS // (elements_per_key * max(1, int(lengths[start]))))
        yield order[start : start + size]
        start += size


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, query_lens: Tensor, seq_lens: Tensor,
    block_table: Tensor, *, query_len: int, scale: float, window: int | None, soft_cap: float | None,
    sinks: Tensor | None, draft_mask: Tensor | None, k_scale: Tensor | float | None, v_scale: Tensor | float | None,
    out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """Attend from the query rows of some sequences, which begin at `starts`, all of them padded to the longest."""
    num_q_heads, (num_kv_heads, block_size, head_dim) = q.shape[1], k_cache.shape[1:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    # Rows are laid out as [num_seqs, query_len]; a shorter sequence repeats a row, and its result is dropped below.
    o_row = torch.arange(query_len, device=q.device)
    m_row = o_row < query_lens[:, None]
    rows = torch.where(m_row, starts[:, None] + o_row, 0).long()
    queries = q[rows].to(dtype).view(*rows.shape, num_kv_heads, -1, head_dim).transpose(1, 2)

    first = (seq_lens - query_lens).long()[:, None]  # [num_seqs, 1]: position of the first query row
    o_query = (first + o_row)[:, :, None]  # [num_seqs, query_len, 1]
    num_keys = max(int(seq_lens.max()), 1)
    num_table_blocks = -(-num_keys // block_size)
    o_key = torch.arange(num_table_blocks * block_size, device=q.device)
    owned = o_key < seq_lens[:, None]  # [num_seqs, L]
    visible = o_key <= o_query
    visible &= owned[:, None]
    if window is not None:
        owned &= o_key > first - window
        visible &= o_key > o_query - window
    if draft_mask is not None:
        draft = o_key - first  # [num_seqs, L]: index among the sequence's query tokens, negative before them
        bit = (draft_mask[rows][:, :, None] >> draft.clamp(0, 63)[:, None]) & 1
        visible &= (draft[:, None] < 0) | (bit == 1)

    m_block = owned.view(len(seq_lens), num_table_blocks, block_size).any(dim=-1)
    blocks = torch.where(m_block, block_table[:, :num_table_blocks], 0).long()
    keys = _gather(k_cache, k_scale, blocks, dtype)
    values = _gather(v_cache, v_scale, blocks, dtype)
    values.view(len(seq_lens), num_kv_heads, -1, head_dim).masked_fill_(~owned[:, None, :, None], 0)
    tile, tile_lse = _attend(
        queries, keys, values, visible, scale=scale, soft_cap=soft_cap, sinks=sinks, return_lse=lse is not None,
        may_see_nothing=draft_mask is not None or bool((first < 0).any()),
    )  # fmt: skip
    written = rows[m_row]
    out[written] = tile.transpose(1, 2).reshape(*rows.shape, num_q_heads, head_dim)[m_row].to(out.dtype)
    if lse is not None and tile_lse is not None:
        lse[written] = tile_lse.transpose(1, 2).reshape(*rows.shape, num_q_heads)[m_row]
