"""This module holds the smaller ops once more, with named bugs to switch on. It does not know the tests."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

BUGS: Final[dict[str, dict[str, str]]] = {
    "write_kv": {
        "position_plus_one": "tokens are rotated for the next position",
        "interleaved_for_neox": "pairs are (2i, 2i + 1) where they should be (i, i + half), and the other way round",
        "turns_backwards": "the angle's sign is wrong",
        "first_half_overwritten": "the second half is computed from the rotated first half",
        "whole_head_rotated": "elements past rotary_dim are scaled by the first pair's cosine",
        "slot_minus_one": "padding writes to the last slot of the cache",
        "kv_swapped": "keys go to the value cache",
        "scales_swapped": "keys and values exchange their scales",
        "offset_plus_one": "the slot's offset in its block is one too many",
        "floor_block": "the block is that of the next slot",
        "head_zero": "every head's keys are head 0's",
        "q_not_in_place": "q is not changed",
        "k_in_place": "k is changed",
        "k_takes_q_norm": "k is normalised with q's weight",
        "norm_after_rope": "heads are normalised after they are rotated",
        "norm_without_eps": "eps is left out",
        "int8_truncates": "int8 rounds towards zero",
        "int8_token_scale": "int8 has one scale for all heads of a token",
        "e4m3_multiplies": "e4m3 multiplies by its scale",
        "e4m3_overflows": "e4m3 turns what is too large into NaN",
    },
    "copy_blocks": {
        "src_dst_swapped": "the copy goes the other way",
        "values_left": "only keys are copied",
        "writes_before_reads": "a block is read after it has been overwritten",
    },
    "rms_norm": {
        "padded_row": "the mean is over the next power of two",
        "eps_outside": "eps is added outside the root",
        "no_weight_offset": "weight_offset is left out",
        "residual_not_updated": "the residual keeps its value",
        "residual_ignored": "x is normalised without the residual",
        "narrow": "sums are kept in the input's dtype",
        "next_row": "a row is divided by the next row's size",
    },
    "layer_norm": {
        "no_bias": "the bias is left out",
        "no_mean": "the mean is not subtracted",
        "unbiased": "the variance is divided by n - 1",
    },
    "gated_activation": {
        "up_first": "up is taken for the gate",
        "exact_for_tanh": "gelu_tanh is the exact gelu",
        "quick_gelu": "gelu is x · sigmoid(1.702 x)",
    },
}


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotated(x: Tensor, row: Tensor, style: str, bug: str | None) -> Tensor:
    """Rotate the heads of one token, [heads, head_dim], by one row of the table."""
    half = len(row) // 2
    cos, sin = row[:half].to(x.dtype), row[half:].to(x.dtype)
    if bug == "turns_backwards":
        sin = -sin
    if bug == "interleaved_for_neox":
        style = "interleaved" if style == "neox" else "neox"
    first = slice(0, half) if style == "neox" else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if style == "neox" else slice(1, 2 * half, 2)
    a, b, out = x[:, first], x[:, second], x.clone()
    out[:, first] = a * cos - b * sin
    out[:, second] = b * cos + (out[:, first] if bug == "first_half_overwritten" else a) * sin
    if bug == "whole_head_rotated":
        out[:, 2 * half :] *= cos[-1]
    return out


def _prepared(x: Tensor, norm: Tensor | None, row: Tensor | None, call: dict[str, Any], bug: str | None) -> Tensor:
    """Normalise and rotate the heads of one token."""
    y, eps = x.to(torch.promote_types(x.dtype, torch.float32)), call.get("eps", 1e-6)
    eps = 0.0 if bug == "norm_without_eps" else eps
    style = call.get("rope_style", "neox")
    if bug == "norm_after_rope" and norm is not None and row is not None:
        return _rms(_rotated(y, row, style, bug), norm.to(y.dtype), eps).to(x.dtype)
    if norm is not None:
        y = _rms(y, norm.to(y.dtype), eps)
    if row is not None:
        y = _rotated(y, row, style, bug)
    return y.to(x.dtype)


def _store(x: Tensor, cache: Tensor, scale: Any, block: int, offset: int, bug: str | None) -> None:
    """Write the heads of one token, [num_kv_heads, head_dim], to one slot."""
    wide = x.float()
    if cache.dtype == torch.int8:
        size = wide.abs().amax(-1) / 127
        if bug == "int8_token_scale":
            size = size.max().expand_as(size)
        scale[block, :, offset] = size
        steps = wide / torch.where(size > 0, size, 1.0)[:, None]
        steps = steps.trunc() if bug == "int8_truncates" else steps.round()
        cache[block, :, offset] = steps.clamp(-127, 127).to(torch.int8)
    elif cache.dtype == torch.float8_e4m3fn:
        steps = wide * scale if bug == "e4m3_multiplies" else wide / scale
        clamped = steps.clamp(-448, 448)
        steps = torch.where(steps.abs() <= 448, steps, math.nan) if bug == "e4m3_overflows" else clamped
        cache.view(torch.uint8)[block, :, offset] = steps.to(cache.dtype).view(torch.uint8)
    else:
        cache[block, :, offset] = x.to(cache.dtype)


def write_kv(
    bug: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    positions: Tensor,
    **call: Any,
) -> None:
    """Do what `write_kv` does, one token after the other."""
    table, block_size = call.get("cos_sin"), k_cache.shape[2]
    k_scale, v_scale = call.get("k_scale"), call.get("v_scale")
    if bug == "scales_swapped":
        k_scale, v_scale = v_scale, k_scale
    if bug == "kv_swapped":
        k_cache, v_cache = v_cache, k_cache
    k_norm = call.get("q_norm") if bug == "k_takes_q_norm" else call.get("k_norm")
    for t, slot in enumerate(slot_mapping.tolist()):
        row = None
        if table is not None:
            row = table[(int(positions[t]) + (bug == "position_plus_one")) % len(table)]
        rotated = _prepared(q[t], call.get("q_norm"), row, call, bug)
        key = _prepared(k[t], k_norm, row, call, bug)
        if bug != "q_not_in_place":
            q[t] = rotated
        if bug == "k_in_place":
            k[t] = key
        if bug == "head_zero":
            key = key[:1].expand_as(key)
        if slot < 0 and bug != "slot_minus_one":
            continue
        block, offset = slot // block_size, slot % block_size
        if bug == "offset_plus_one":
            offset = (offset + 1) % block_size
        if bug == "floor_block":
            block = (slot + 1) // block_size % len(k_cache)
        _store(key, k_cache, k_scale, block, offset, bug)
        _store(v[t], v_cache, v_scale, block, offset, bug)


def copy_blocks(bug: str | None, k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Do what `copy_blocks` does, one block after the other."""
    if bug == "src_dst_swapped":
        src, dst = dst, src
    for cache in (k_cache,) if bug == "values_left" else (k_cache, v_cache):
        old = cache if bug == "writes_before_reads" else cache.clone()
        for a, b in zip(src.tolist(), dst.tolist(), strict=True):
            cache[b] = old[a]


def _summed(x: Tensor, residual: Tensor | None, bug: str | None) -> Tensor:
    if residual is None:
        return x
    total = residual + x
    if bug != "residual_not_updated":
        residual.copy_(total)
    return x if bug == "residual_ignored" else total


def rms_norm(
    bug: str | None,
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Do what `rms_norm` does."""
    x = _summed(x, residual, bug)
    wide = x if bug == "narrow" else x.to(torch.promote_types(x.dtype, torch.float32))
    size = wide.shape[-1]
    if bug == "padded_row":
        size = 1 << (size - 1).bit_length()
    mean = wide.square().sum(-1, keepdim=True) / size
    length = mean.sqrt() + eps if bug == "eps_outside" else (mean + eps).sqrt()
    if bug == "next_row":
        length = length.roll(-1, 0)
    gain = weight.to(wide.dtype) + (0.0 if bug == "no_weight_offset" else weight_offset)
    y = (wide / length * gain).to(x.dtype)
    return y if out is None else out.copy_(y)


def layer_norm(
    bug: str | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Do what `layer_norm` does."""
    x = _summed(x, residual, bug)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide if bug == "no_mean" else wide - wide.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(wide.shape[-1] - (bug == "unbiased"), 1)
    y = centred / (variance + eps).sqrt() * weight.to(wide.dtype)
    if bias is not None and bug != "no_bias":
        y = y + bias.to(wide.dtype)
    y = y.to(x.dtype)
    return y if out is None else out.copy_(y)


def gated_activation(bug: str | None, x: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """Do what `gated_activation` does."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=1)
    if bug == "up_first":
        gate, up = up, gate
    if bug == "exact_for_tanh" and kind == "gelu_tanh":
        kind = "gelu"
    if kind == "silu":
        y = gate * torch.sigmoid(gate)
    elif bug == "quick_gelu":
        y = gate * torch.sigmoid(1.702 * gate)
    elif kind == "gelu":
        y = 0.5 * gate * torch.erfc(-gate / math.sqrt(2))
    else:
        # 1 + tanh(z) as 2 · sigmoid(2z): the sum would cancel for z far below 0.
        y = gate * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    y = (y * up).to(x.dtype)
    return y if out is None else out.copy_(y)
