"""This module holds the KV-cache writes in plain torch. It does not know Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_choice, check_shape, check_write_kv
from ..rope.reference import RopeStyle, rotate, rotation_factors

__all__ = ["WritePlan", "copy_blocks", "plan_write_kv", "quantise_e4m3", "quantise_int8", "write_kv"]

E4M3_MAX = 448.0


def quantise_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x / scale rounded half to even, scale = amax / 127) over the last axis; scale is float32, 0 for zeros."""
    wide = x.to(torch.float32)
    scale = wide.abs().amax(dim=-1) / 127.0
    divisor = torch.where(scale > 0, scale, 1.0)
    return torch.round(wide / divisor[..., None]).clamp_(-127, 127).to(torch.int8), scale


def quantise_e4m3(x: Tensor, scale: Tensor | float) -> Tensor:
    """Return x / scale in float8_e4m3fn, values beyond ±448 clamped to it."""
    return (x.to(torch.float32) / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _norm_and_rotate(
    x: Tensor, norm: Tensor | None, eps: float, factors: tuple[Tensor, Tensor] | None, style: RopeStyle
) -> Tensor:
    """Return x normalised and rotated, computed in float32 at least; a norm changes an x that is in that dtype."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None:
        inverse = y.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        y.mul_(inverse).mul_(norm.to(y.dtype))
    return y if factors is None else rotate(y, *factors, style)


class WritePlan(NamedTuple):
    """What `write_kv` needs of a step beside its tensors."""

    written: Tensor | None
    """[num_tokens] bool; None: all tokens are."""
    rows: Tensor
    """[num written tokens * num_kv_heads] int64, in the cache seen as [num_blocks * num_kv_heads * block_size, ...]."""
    factors: tuple[Tensor, Tensor] | None
    """Of the rotation; None: there is none."""


def plan_write_kv(
    slot_mapping: Tensor,
    *,
    positions: Tensor,
    cos_sin: Tensor | None,
    rope_style: RopeStyle,
    block_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
) -> WritePlan:
    """See `octavo.kernels.plan_write_kv`."""
    check_choice("rope_style", rope_style, ("neox", "interleaved"))
    factors = None
    if cos_sin is not None:
        rotations = cos_sin.index_select(0, positions).to(torch.promote_types(dtype, torch.float32))
        factors = rotation_factors(rotations, rope_style)
    written = None
    if (slot_mapping < 0).any():
        written = slot_mapping >= 0
        slot_mapping = slot_mapping[written]
    first = slot_mapping + slot_mapping // block_size * ((num_kv_heads - 1) * block_size)
    o_head = torch.arange(0, num_kv_heads * block_size, block_size, device=first.device)
    return WritePlan(written, (first[:, None] + o_head).flatten(), factors)


def _rotate_together(q: Tensor, k: Tensor, factors: tuple[Tensor, Tensor], style: RopeStyle) -> Tensor:
    """Rotate q in place and return k rotated; as one tensor where they lie side by side in a fused projection."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_heads = num_q_heads + k.shape[1]
    side_by_side = (
        q.stride() == k.stride()
        and q.stride()[1:] == (head_dim, 1)
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        and k.storage_offset() == q.storage_offset() + num_q_heads * head_dim
    )
    if not side_by_side:
        q.copy_(rotate(q, *factors, style))
        return rotate(k, *factors, style)
    both = rotate(q.as_strided((num_tokens, num_heads, head_dim), q.stride()), *factors, style)
    q.copy_(both[:, :num_q_heads])
    return both[:, num_q_heads:]


def write_kv(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, positions: Tensor,
    cos_sin: Tensor | None = None, rope_style: RopeStyle = "neox", q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6, k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None, plan: WritePlan | None = None,
) -> None:  # fmt: skip
    """See `octavo.kernels.write_kv`."""
    check_write_kv(
        q, k, v, k_cache, v_cache, slot_mapping, positions=positions, cos_sin=cos_sin, q_norm=q_norm, k_norm=k_norm,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    if plan is None:
        plan = plan_write_kv(
            slot_mapping,
            positions=positions,
            cos_sin=cos_sin,
            rope_style=rope_style,
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            dtype=q.dtype,
        )
    written, rows, factors = plan
    if q_norm is None and k_norm is None and q.dtype in (torch.float32, torch.float64):
        if factors is not None:
            k = _rotate_together(q, k, factors, rope_style)
    else:
        rotated = _norm_and_rotate(q, q_norm, eps, factors, rope_style)
        if rotated is not q:
            q.copy_(rotated)
        k = _norm_and_rotate(k.clone(), k_norm, eps, factors, rope_style).to(k.dtype)
    if written is not None:
        k, v = k[written], v[written]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if cache.dtype == torch.int8:
            assert isinstance(scale, Tensor)
            x, scales = quantise_int8(x)
            scale.view(-1).index_copy_(0, rows, scales.flatten())
        elif cache.dtype == torch.float8_e4m3fn:
            assert scale is not None
            # Indexed as bytes: torch has no such write for float8.
            x, cache = quantise_e4m3(x, scale).view(torch.int8), cache.view(torch.int8)
        cache.view(-1, head_dim).index_copy_(0, rows, x.reshape(-1, head_dim).to(cache.dtype))


def copy_blocks(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """See `octavo.kernels.copy_blocks`."""
    check_shape("dst", dst, tuple(src.shape))
    for cache in (k_cache, v_cache):
        cache[dst] = cache[src]
