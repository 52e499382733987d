"""This module holds every op once more, in plain loops over tokens and heads. It does not know the ops' own code.

The default is float64. In float32, `plain_attention` is the yardstick of what plain torch loses to rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _dequantised(cache: Tensor, scale: Any, block: int, head: int, offset: int, dtype: torch.dtype) -> Tensor:
    x = cache[block, head, offset].to(dtype)
    if isinstance(scale, Tensor) and scale.dim() == 3:
        return x * float(scale[block, head, offset])
    return x if scale is None else x * float(scale)


def attention(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return out [num_tokens, num_q_heads, head_dim] and lse [num_tokens, num_q_heads] of one attention call."""
    q = inputs["q"].to(dtype)
    num_tokens, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = inputs["k_cache"].shape
    sinks, window, cap = inputs.get("sinks"), inputs.get("window"), inputs.get("soft_cap")
    draft = inputs.get("draft_mask")
    out = torch.zeros(num_tokens, num_q_heads, head_dim, dtype=dtype)
    lse = torch.full((num_tokens, num_q_heads), -math.inf, dtype=dtype)
    starts = inputs["cu_seqlens_q"].tolist()
    for s, seq_len in enumerate(inputs["seq_lens"].tolist()):
        query_len = starts[s + 1] - starts[s]
        for i in range(query_len):
            row, position = starts[s] + i, seq_len - query_len + i
            seen = [p for p in range(seq_len) if p <= position and (window is None or position - p < window)]
            if draft is not None:
                mask, first = int(draft[row]), seq_len - query_len
                seen = [p for p in seen if p < first or mask >> (p - first) & 1]
            for head in range(num_kv_heads):
                slots = [(int(inputs["block_table"][s, p // block_size]), p % block_size) for p in seen]
                if not slots and sinks is None:
                    continue
                keys = [_dequantised(inputs["k_cache"], inputs.get("k_scale"), b, head, o, dtype) for b, o in slots]
                values = [_dequantised(inputs["v_cache"], inputs.get("v_scale"), b, head, o, dtype) for b, o in slots]
                k = torch.stack(keys) if keys else q.new_zeros(0, head_dim)
                v = torch.stack(values) if values else q.new_zeros(0, head_dim)
                group_size = num_q_heads // num_kv_heads
                for h in range(head * group_size, (head + 1) * group_size):
                    scores = (k @ q[row, h]) * inputs["scale"]
                    if cap is not None:
                        scores = torch.tanh(scores / cap) * cap
                    logits = scores if sinks is None else torch.cat((scores, sinks[h : h + 1].to(dtype)))
                    top = logits.max()
                    weights = torch.exp(scores - top)
                    total = torch.exp(logits - top).sum()
                    out[row, h] = (weights @ v) / total
                    lse[row, h] = top + torch.log(total)
    return out, lse


def plain_attention(inputs: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what `attention` does, by dense matrix products over all rows of a sequence and one masked softmax."""
    q = inputs["q"].to(dtype)
    _, num_kv_heads, block_size, _ = inputs["k_cache"].shape
    group_size = q.shape[1] // num_kv_heads
    sinks, window, cap = inputs.get("sinks"), inputs.get("window"), inputs.get("soft_cap")
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=dtype)
    starts = inputs["cu_seqlens_q"].tolist()
    for s, seq_len in enumerate(inputs["seq_lens"].tolist()):
        rows = range(starts[s], starts[s + 1])
        if not rows or not seq_len:
            continue
        dense = {}
        for name in ("k", "v"):
            cache, scale = inputs[f"{name}_cache"], inputs.get(f"{name}_scale")
            dense[name] = torch.stack(
                [
                    torch.stack(
                        [
                            _dequantised(
                                cache, scale, int(inputs["block_table"][s, p // block_size]), h, p % block_size, dtype
                            )
                            for p in range(seq_len)
                        ]
                    )
                    for h in range(num_kv_heads)
                ]
            ).repeat_interleave(group_size, 0)  # [num_q_heads, seq_len, head_dim]
        scores = q[rows.start : rows.stop].transpose(0, 1) @ dense["k"].transpose(1, 2) * inputs["scale"]
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        for i, row in enumerate(rows):
            first = seq_len - len(rows)
            for p in range(seq_len):
                hidden = p > first + i or (window is not None and first + i - p >= window)
                if "draft_mask" in inputs and p >= first:
                    hidden |= not int(inputs["draft_mask"][row]) >> (p - first) & 1
                if hidden:
                    scores[:, i, p] = -math.inf
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(dtype)[:, None, None].expand(-1, len(rows), 1)), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :seq_len]
        out[rows.start : rows.stop] = (weights @ dense["v"]).transpose(0, 1)
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
