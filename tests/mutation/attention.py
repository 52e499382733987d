"""This module holds a paged online-softmax attention with named bugs to switch on. It does not know the tests.

It stands in for a kernel: key tiles in a loop, a running maximum, a running sum, splits that are merged by their lse.
Without a bug it passes every check; each bug is one that a kernel has had, and must be caught by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

TILE: Final = 16
"""Keys per tile."""
SPLIT: Final = 48
"""Keys per split: three tiles, at absolute boundaries."""

BUGS: Final = {
    "drop_last_block": "the last block of a sequence of several is not read",
    "floor_blocks": "the number of blocks is rounded down",
    "causal_strict": "a row does not see itself (< for <=)",
    "future_token": "a row sees one token ahead",
    "no_causal_mask": "a row sees everything its sequence has",
    "chunk_offset": "a chunk's rows count positions from 0",
    "scale_2_percent": "scores are 2 % too large",
    "scale_1_over_d": "scores are divided by head_dim, not by its root",
    "soft_cap_missing": "the soft cap is not applied",
    "soft_cap_no_division": "the soft cap forgets to divide by the cap first",
    "window_plus_one": "the window is one token too long",
    "window_minus_one": "the window is one token too short",
    "window_missing": "the window is not applied",
    "gqa_modulo": "query head h reads KV head h % num_kv_heads",
    "head_stride": "every head reads KV head 0",
    "previous_row": "the block table's previous row is used",
    "stale_entry": "one table entry beyond the last block is read as the last block",
    "block_address_wraps": "a block's offset is computed in few bits",
    "v_slot_plus_one": "values are read one slot further on",
    "l_not_rescaled": "the running sum is not rescaled when the maximum grows",
    "acc_not_rescaled": "the accumulator is not rescaled when the maximum grows",
    "max_starts_at_zero": "the running maximum starts at 0",
    "masked_tile_nan": "a tile without a visible key gives NaN",
    "merge_ignores_lse": "splits are averaged as if they weighed the same",
    "last_split_dropped": "the last split of several is not merged",
    "tail_unmasked": "lanes past the length are not masked",
    "last_tile_skipped": "the last tile is skipped when the length divides evenly",
    "exp2_without_log2e": "2**x is taken where e**x is meant",
    "accumulator_bf16": "the accumulator is kept in bfloat16",
    "p_bf16": "probabilities are rounded to bfloat16 in a float32 call",
    "output_998": "the output is 0.2 % too small",
    "context_1024": "the context is cut at 1024 tokens",
    "values_masked_by_product": "values past the length are multiplied by a zero probability",
    "sink_missing": "the sink is not in the denominator",
    "sink_next_head": "a head takes its neighbour's sink",
    "sink_per_split": "the sink is counted once per split",
    "scales_swapped": "keys take the values' scales and values the keys'",
    "draft_mask_missing": "the draft mask is not applied",
    "draft_mask_next_row": "a row takes the next row's draft mask",
    "lse_base_2": "the lse is given to base 2",
    "padding_written": "rows beyond the last sequence are zeroed",
    "neighbour_shares_tile": "a row's probabilities are multiplied with another sequence's values, at a weight of zero",
    "empty_row_unwritten": "a row that sees nothing is not written",
}


@dataclass
class _State:
    """One split's running softmax of one head."""

    top: float
    total: Tensor
    acc: Tensor


def _blocks(call: dict[str, Any], s: int, seq_len: int, bug: str | None) -> list[int]:
    """Return the physical blocks of a sequence, as many as will be read."""
    block_size = call["k_cache"].shape[2]
    count = -(-seq_len // block_size)
    if bug == "floor_blocks":
        count = seq_len // block_size
    if bug == "drop_last_block" and count > 1:
        count -= 1
    row = call["block_table"][s - 1 if bug == "previous_row" else s].tolist()
    ids = row[:count]
    if bug == "stale_entry" and count:
        ids[-1] = row[count]
    if bug == "block_address_wraps":
        ids = [block % 8 for block in ids]
    return ids


def _head(
    call: dict[str, Any], name: str, blocks: list[int], head: int, seq_len: int, dtype: torch.dtype, bug: str | None
) -> Tensor:
    """Return one KV head of a sequence, whole blocks: [len(blocks) * block_size, head_dim]."""
    cache, scale = call[f"{name}_cache"], call.get(f"{name}_scale")
    if bug == "scales_swapped":
        scale = call.get("v_scale" if name == "k" else "k_scale")
    if not blocks:
        return torch.zeros(0, cache.shape[3], dtype=dtype)
    dense = torch.cat([cache[block, head].to(dtype) for block in blocks])
    if scale is not None:
        if scale.dim() == 3:
            dense = dense * torch.cat([scale[block, head] for block in blocks])[:, None].to(dtype)
        else:
            dense = dense * float(scale)
    if name == "v":
        if bug == "v_slot_plus_one":
            dense = dense.roll(-1, 0)
        if bug != "values_masked_by_product":
            dense[seq_len:] = 0
    return dense


def _update(state: _State, scores: Tensor, values: Tensor, visible: Tensor, bug: str | None) -> None:
    """Take one tile of keys into a split's state."""
    if not visible.any() and bug != "masked_tile_nan":
        return
    scores = scores.masked_fill(~visible, -math.inf)
    # Not Python's max, which drops a NaN that comes second.
    top = float(torch.clamp(scores.max(), min=state.top))
    exp: Callable[[Tensor], Tensor] = torch.exp2 if bug == "exp2_without_log2e" else torch.exp
    p = exp(scores - top)
    if bug != "values_masked_by_product":
        values = torch.where(visible[:, None], values, 0.0)
    if bug == "p_bf16":
        p = p.bfloat16().to(p.dtype)
    rescale = exp(torch.tensor(state.top - top, dtype=scores.dtype)) if state.top != -math.inf else torch.zeros(())
    if not visible.any():
        rescale = torch.tensor(math.nan)
    state.total = state.total * (1.0 if bug == "l_not_rescaled" else rescale) + p.sum()
    state.acc = state.acc * (1.0 if bug == "acc_not_rescaled" else rescale) + p @ values
    if bug == "accumulator_bf16":
        state.acc = state.acc.bfloat16().to(scores.dtype)
    state.top = top


def _merge(states: list[_State], sink: float | None, bug: str | None) -> tuple[Tensor, float]:
    """Return the output row and its lse from the splits in ascending order."""
    if bug == "last_split_dropped" and len(states) > 1:
        states = states[:-1]
    if bug == "sink_per_split" and sink is not None:
        for state in states:
            state.total = state.total + torch.tensor(sink - state.top, dtype=state.total.dtype).exp()
        sink = None
    if bug == "merge_ignores_lse" and len(states) > 1:
        mean = torch.stack([state.acc / state.total for state in states]).mean(0)
        return mean, states[-1].top + float(states[-1].total.log())
    if sink == math.inf:  # inf - inf is NaN
        return torch.zeros_like(states[0].acc), math.inf
    top = max([state.top for state in states] + ([] if sink is None else [sink]))
    total, acc = torch.zeros_like(states[0].total), torch.zeros_like(states[0].acc)
    for state in states:
        weight = math.exp(state.top - top)
        total, acc = total + weight * state.total, acc + weight * state.acc
    if sink is not None:
        total = total + math.exp(sink - top)
    return acc / total, top + float(total.log())


def _scores(call: dict[str, Any], q: Tensor, keys: Tensor, bug: str | None) -> Tensor:
    scale, cap = call["scale"], call.get("soft_cap")
    if bug == "scale_2_percent":
        scale *= 1.02
    if bug == "scale_1_over_d":
        scale = 1 / q.shape[0]
    scores = keys @ q * scale
    if cap is not None and bug != "soft_cap_missing":
        scores = torch.tanh(scores if bug == "soft_cap_no_division" else scores / cap) * cap
    return scores


def _visible(
    call: dict[str, Any], row: int, position: int, first: int, seq_len: int, end: int, bug: str | None
) -> Tensor:
    """Return which of the first `end` keys a row sees: [end] bool."""
    o_key = torch.arange(end)
    window = call.get("window")
    limit = {"causal_strict": position - 1, "future_token": position + 1, "no_causal_mask": seq_len}.get(
        bug or "", position
    )
    visible = o_key <= limit
    if bug != "tail_unmasked":
        visible &= o_key < seq_len
    else:
        visible |= o_key >= seq_len
    if window is not None and bug != "window_missing":
        window += {"window_plus_one": 1, "window_minus_one": -1}.get(bug or "", 0)
        visible &= o_key > position - window
    draft = call.get("draft_mask")
    if draft is not None and bug != "draft_mask_missing":
        mask = int(draft[min(row + 1, len(draft) - 1) if bug == "draft_mask_next_row" else row])
        visible &= torch.tensor([p < first or bool(mask >> (p - first) & 1) for p in range(end)], dtype=torch.bool)
    if bug == "context_1024":
        visible &= o_key < 1024
    if bug == "last_tile_skipped" and (position + 1) % TILE == 0:
        visible &= o_key < position + 1 - TILE
    return visible


def _row(
    call: dict[str, Any], q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, sink: float | None, bug: str | None
) -> tuple[Tensor, float]:
    """Return one head of one row [head_dim], and its lse."""
    scores = _scores(call, q, keys, bug)
    start = 0.0 if bug == "max_starts_at_zero" else -math.inf
    states = []
    for split in range(0, len(keys), SPLIT):
        state = _State(start, torch.zeros((), dtype=q.dtype), torch.zeros_like(q))
        for i in range(split, min(split + SPLIT, len(keys)), TILE):
            tile = slice(i, min(i + TILE, split + SPLIT))
            _update(state, scores[tile], values[tile], visible[tile], bug)
        if state.top != -math.inf:
            states.append(state)
    if not states:
        return torch.zeros_like(q), -math.inf if sink is None else sink
    return _merge(states, sink, bug)


def attend(bug: str | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> Any:
    """Compute either attention op, with `bug` (a key of BUGS) switched on."""
    call = {"k_cache": k_cache, "v_cache": v_cache, **options}
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_kv_heads, group_size = k_cache.shape[1], q.shape[1] // k_cache.shape[1]
    out = options.get("out")
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[:2], dtype=dtype)
    starts, sinks = options["cu_seqlens_q"].tolist(), options.get("sinks")
    if bug == "padding_written":
        out[starts[-1] :] = 0
    spill = torch.zeros(k_cache.shape[3], dtype=dtype)
    for s, seq_len in enumerate(options["seq_lens"].tolist()):
        query_len = starts[s + 1] - starts[s]
        if not query_len:
            continue
        blocks = _blocks(call, s, seq_len, bug)
        heads = [0 if bug == "head_stride" else head for head in range(num_kv_heads)]
        keys = [_head(call, "k", blocks, head, seq_len, dtype, bug) for head in heads]
        values = [_head(call, "v", blocks, head, seq_len, dtype, bug) for head in heads]
        first = 0 if bug == "chunk_offset" else seq_len - query_len
        for row in range(starts[s], starts[s + 1]):
            position = first + row - starts[s]
            visible = _visible(call, row, position, seq_len - query_len, seq_len, len(keys[0]), bug)
            for h in range(q.shape[1]):
                head = h % num_kv_heads if bug == "gqa_modulo" else h // group_size
                sink = None
                if sinks is not None and bug != "sink_missing":
                    sink = float(sinks[(h + 1) % len(sinks) if bug == "sink_next_head" else h])
                y, log = _row(call, q[row, h].to(dtype), keys[head], values[head], visible, sink, bug)
                if log == -math.inf and bug == "empty_row_unwritten":
                    continue
                if bug == "neighbour_shares_tile":
                    y = y + 0.0 * spill
                out[row, h] = (y * 0.998 if bug == "output_998" else y).to(q.dtype)
                lse[row, h] = log / math.log(2) if bug == "lse_base_2" else log
        spill = values[-1][:seq_len].sum(0)
    return (out, lse) if options.get("return_lse") else out
