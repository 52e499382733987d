"""This module holds the KV-cache writes in plain torch. It does not know Triton."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.checks import check_choice, check_shape, check_write_kv
from ..rope.reference import RopeStyle, rotate, rotation_factors

__all__ = ["copy_blocks", "quantise_e4m3", "quantise_int8", "write_kv"]

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
    """Return x normalised and rotated, computed in float32 at least; x itself, changed, where it is in that dtype."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None:
        inverse = y.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        y.mul_(inverse).mul_(norm.to(y.dtype))
    if factors is not None:
        rotate(y, *factors, style)
    return y


def write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    positions: Tensor,
    cos_sin: Tensor | None = None,
    rope_style: RopeStyle = "neox",
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
) -> None:
    """See `octavo.kernels.write_kv`."""
    check_write_kv(
        q,
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        positions=positions,
        cos_sin=cos_sin,
        q_norm=q_norm,
        k_norm=k_norm,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    check_choice("rope_style", rope_style, ("neox", "interleaved"))
    if q_norm is not None or k_norm is not None or cos_sin is not None:
        factors = None
        if cos_sin is not None:
            rows = cos_sin.index_select(0, positions).to(torch.promote_types(q.dtype, torch.float32))
            factors = rotation_factors(rows, rope_style)
        rotated = _norm_and_rotate(q, q_norm, eps, factors, rope_style)
        if rotated is not q:
            q.copy_(rotated)
        k = _norm_and_rotate(k.clone(), k_norm, eps, factors, rope_style).to(k.dtype)

    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    if (slot_mapping < 0).any():
        written = slot_mapping >= 0
        k, v, slot_mapping = k[written], v[written], slot_mapping[written]
    # A slot's rows in the cache seen as [num_blocks * num_kv_heads * block_size, head_dim], one per head.
    first = slot_mapping + slot_mapping // block_size * ((num_kv_heads - 1) * block_size)
    rows = (first[:, None] + _head_offsets(num_kv_heads, block_size, first.device)).flatten()
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


@functools.cache
def _head_offsets(num_kv_heads: int, block_size: int, device: torch.device) -> Tensor:
    return torch.arange(0, num_kv_heads * block_size, block_size, device=device)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """See `octavo.kernels.copy_blocks`."""
    check_shape("dst", dst, tuple(src.shape))
    for cache in (k_cache, v_cache):
        cache[dst] = cache[src]
