"""This module holds the KV-cache writes in plain torch. It does not know Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import check_choice, check_shape, check_write_kv
from ..rope.reference import RopeStyle, rotate

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
    x: Tensor, norm: Tensor | None, eps: float, cos_sin: Tensor | None, style: RopeStyle, *, in_place: bool
) -> Tensor:
    """Return x normalised and rotated, computed in float32 at least, in the dtype of x and rounded once.

    Args:
        cos_sin: [num_tokens, 1, rotary_dim], the table's rows for these tokens.
    """
    if norm is None and cos_sin is None:
        return x
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(compute_dtype, copy=not in_place)
    if norm is not None:
        inverse = y.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        y = y.mul_(inverse).mul_(norm.to(compute_dtype))
    if cos_sin is not None:
        half = cos_sin.shape[-1] // 2
        rotate(y, cos_sin[..., :half], cos_sin[..., half:], style)
    if in_place:
        return y if y is x else x.copy_(y)
    return y.to(x.dtype)


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
    rows = None
    if cos_sin is not None:
        rows = cos_sin.index_select(0, positions)[:, None].to(torch.promote_types(q.dtype, torch.float32))
    _norm_and_rotate(q, q_norm, eps, rows, rope_style, in_place=True)
    k = _norm_and_rotate(k, k_norm, eps, rows, rope_style, in_place=False)

    written = slot_mapping >= 0
    if not written.all():
        k, v, slot_mapping = k[written], v[written], slot_mapping[written]
    block_size = k_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if cache.dtype == torch.int8:
            assert isinstance(scale, Tensor)
            x, scale[block, :, offset] = quantise_int8(x)
        elif cache.dtype == torch.float8_e4m3fn:
            assert scale is not None
            x = quantise_e4m3(x, scale)
        cache[block, :, offset] = x.to(cache.dtype)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """See `octavo.kernels.copy_blocks`."""
    check_shape("dst", dst, tuple(src.shape))
    for cache in (k_cache, v_cache):
        cache[dst] = cache[src]
