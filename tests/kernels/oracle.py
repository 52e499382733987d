"""This module holds every op once more, in plain loops over tokens and heads. It does not know the ops' own code.

The default is float64. In float32, `plain_attention` is the yardstick of what plain torch loses to rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _dense(inputs: dict[str, Any], name: str, s: int, seq_len: int, dtype: torch.dtype) -> Tensor:
    """Return the (dequantised) keys or values of one sequence, slot by slot: [num_kv_heads, seq_len, head_dim]."""
    cache, scale = inputs[f"{name}_cache"], inputs.get(f"{name}_scale")
    _, num_kv_heads, block_size, head_dim = cache.shape
    dense = torch.zeros(num_kv_heads, seq_len, head_dim, dtype=dtype)
    for p in range(seq_len):
        block, offset = int(inputs["block_table"][s, p // block_size]), p % block_size
        for head in range(num_kv_heads):
            factor = 1.0
            if scale is not None:
                factor = float(scale[block, head, offset] if scale.dim() == 3 else scale)
            dense[head, p] = cache[block, head, offset].to(dtype) * factor
    return dense


def _sees(inputs: dict[str, Any], row: int, position: int, key: int, first: int) -> bool:
    """Whether a query row sees a key; `first` is the position of its sequence's first query row."""
    window, draft = inputs.get("window"), inputs.get("draft_mask")
    if key > position or (window is not None and position - key >= window):
        return False
    return draft is None or key < first or bool(int(draft[row]) >> (key - first) & 1)


def attention(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return out [num_tokens, num_q_heads, head_dim] and lse [num_tokens, num_q_heads] of one attention call."""
    q = inputs["q"].to(dtype)
    group_size = q.shape[1] // inputs["k_cache"].shape[1]
    sinks, cap = inputs.get("sinks"), inputs.get("soft_cap")
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -math.inf, dtype=dtype)
    starts = inputs["cu_seqlens_q"].tolist()
    for s, seq_len in enumerate(inputs["seq_lens"].tolist()):
        keys, values = _dense(inputs, "k", s, seq_len, dtype), _dense(inputs, "v", s, seq_len, dtype)
        first = seq_len - (starts[s + 1] - starts[s])
        for row in range(starts[s], starts[s + 1]):
            position = first + row - starts[s]
            seen = [p for p in range(seq_len) if _sees(inputs, row, position, p, first)]
            if not seen and sinks is None:
                continue
            for h in range(q.shape[1]):
                k, v = keys[h // group_size, seen], values[h // group_size, seen]
                scores = (k @ q[row, h]) * inputs["scale"]
                if cap is not None:
                    scores = torch.tanh(scores / cap) * cap
                logits = scores if sinks is None else torch.cat((scores, sinks[h : h + 1].to(dtype)))
                top = logits.max()
                total = torch.exp(logits - top).sum()
                out[row, h] = (torch.exp(scores - top) @ v) / total
                lse[row, h] = top + torch.log(total)
    return out, lse


def plain_attention(inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what `attention` does, by dense matrix products over all rows of a sequence and one masked softmax."""
    q = inputs["q"].to(dtype)
    group_size = q.shape[1] // inputs["k_cache"].shape[1]
    sinks, cap = inputs.get("sinks"), inputs.get("soft_cap")
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=dtype)
    starts = inputs["cu_seqlens_q"].tolist()
    for s, seq_len in enumerate(inputs["seq_lens"].tolist()):
        rows = range(starts[s], starts[s + 1])
        if not rows or not seq_len:
            continue
        keys, values = (_dense(inputs, n, s, seq_len, dtype).repeat_interleave(group_size, 0) for n in ("k", "v"))
        scores = q[rows.start : rows.stop].transpose(0, 1) @ keys.transpose(1, 2) * inputs["scale"]
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        first = seq_len - len(rows)
        hidden = [[not _sees(inputs, row, first + i, p, first) for p in range(seq_len)] for i, row in enumerate(rows)]
        scores[:, torch.tensor(hidden)] = -math.inf
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(-1, len(rows), 1)), dim=-1)
        out[rows.start : rows.stop] = (torch.softmax(scores, dim=-1)[..., :seq_len] @ values).transpose(0, 1)
        lse[rows.start : rows.stop] = torch.logsumexp(scores, dim=-1).T
    return out, lse


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for i, row in enumerate(x.double()):
        size = math.sqrt(sum(value * value for value in row.tolist()) / len(row) + eps)
        out[i] = row / size * (weight.double() + weight_offset)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for i, row in enumerate(x.double()):
        mean = sum(row.tolist()) / len(row)
        variance = sum((value - mean) ** 2 for value in row.tolist()) / len(row)
        out[i] = (row - mean) / math.sqrt(variance + eps) * weight.double()
        if bias is not None:
            out[i] += bias.double()
    return out


def activate(x: float, kind: str) -> float:
    if kind == "silu":
        return x / (1 + math.exp(-x))
    if kind == "gelu":
        return x * 0.5 * math.erfc(-x / math.sqrt(2))
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def activation(x: Tensor, kind: str) -> Tensor:
    flat = [activate(value, kind) for value in x.double().flatten().tolist()]
    return torch.tensor(flat, dtype=torch.float64).view(x.shape)


def rotate(head: Tensor, cos_sin_row: Tensor, style: str) -> Tensor:
    """Return one head [head_dim] rotated by one row of the table, in float64."""
    out = head.double().clone()
    half = len(cos_sin_row) // 2
    for i in range(half):
        cos, sin = float(cos_sin_row[i]), float(cos_sin_row[half + i])
        a, b = (i, i + half) if style == "neox" else (2 * i, 2 * i + 1)
        x, y = float(head[a]), float(head[b])
        out[a], out[b] = x * cos - y * sin, y * cos + x * sin
    return out


def prepare(
    heads: Tensor, norm: Tensor | None, eps: float, table: Tensor | None, positions: Tensor, style: str
) -> Tensor:
    """Return [num_tokens, heads, head_dim] normalised per head and rotated, in float64."""
    out = heads.double().clone()
    for t in range(heads.shape[0]):
        if norm is not None:
            out[t] = rms_norm(out[t], norm, eps)
        if table is not None:
            for h in range(heads.shape[1]):
                out[t, h] = rotate(out[t, h], table[positions[t]], style)
    return out


def expand_rows(inputs: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the results of `expand_rows` by name, as lists."""
    block_size, starts = inputs["block_size"], inputs["cu_seqlens_q"].tolist()
    given = inputs["token_ids"].tolist()
    names = ("token_ids", "positions", "slot_mapping", "seq_lens", "block_table")
    found: dict[str, list[Any]] = {name: [] for name in names}
    for s, row in enumerate(inputs["rows"].tolist()):
        own = inputs["block_tables"][row].tolist() if row >= 0 else []
        first = int(inputs["num_computed_tokens"][s]) if row >= 0 else 0
        for i, token_id in enumerate(given[starts[s] : starts[s + 1]]):
            if row >= 0 and token_id == -1:
                token_id = int(inputs["last_token_ids"][row])
            position = first + i
            found["token_ids"].append(token_id if row >= 0 else 0)
            found["positions"].append(position)
            block = own[position // block_size] if own else 0
            found["slot_mapping"].append(block * block_size + position % block_size if own else -1)
        seq_len = first + starts[s + 1] - starts[s]
        num_blocks = -(-seq_len // block_size) if row >= 0 else 0
        found["seq_lens"].append(seq_len)
        found["block_table"].append([own[c] if c < num_blocks else 0 for c in range(inputs["num_columns"])])
    return found
