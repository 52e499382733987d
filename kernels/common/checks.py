"""This module holds the argument checks of the ops. It does not know what the ops compute.

They read only shapes, dtypes and devices, never a tensor's contents: nothing here waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "CACHE_DTYPES",
    "FLOAT_DTYPES",
    "check_attention",
    "check_choice",
    "check_draft_mask",
    "check_dtype",
    "check_float",
    "check_index",
    "check_kernel_float",
    "check_out",
    "check_positive",
    "check_shape",
    "check_side_by_side",
    "check_write_kv",
]

FLOAT_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
CACHE_DTYPES = FLOAT_DTYPES | {torch.int8, torch.float8_e4m3fn}
INDEX_DTYPES = frozenset({torch.int32, torch.int64})


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `x` has exactly this shape."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def check_positive(name: str, value: float | None) -> None:
    """Raise ValueError unless `value` is above 0 and finite, or None."""
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be above 0 and finite, or None")


def _check_window(window: int | None) -> None:
    if window is not None and (type(window) is not int or window < 1):  # a float or a bool would be compared, silently
        raise ValueError(f"window is {window!r}; it must be an int above 0, or None")


def check_side_by_side(**tensors: Tensor | None) -> None:
    """Raise ValueError where elements of a last axis lie apart: a kernel that is told no such stride misreads them."""
    for name, x in tensors.items():
        if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} has strides {x.stride()}; the last one must be 1")


def check_float(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` holds floating-point numbers an op computes with."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: float32, float16, bfloat16, float64")


def check_kernel_float(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` holds floating-point numbers a kernel computes with: float32 is its widest."""
    if x.dtype not in FLOAT_DTYPES - {torch.float64}:
        raise ValueError(f"{name} has dtype {x.dtype}; the triton backend takes float32, float16, bfloat16")


def check_out(out: Tensor | None, shape: tuple[int, ...] | torch.Size, like: Tensor) -> None:
    """Raise ValueError unless `out` is None or can take a result of this shape, with `like`'s dtype and device."""
    if out is not None and (out.shape != shape or out.dtype != like.dtype or out.device != like.device):
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; "
            f"expected {tuple(shape)} {like.dtype} on {like.device}"
        )


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless `x` has this dtype."""
    if x.dtype != dtype:
        raise ValueError(f"{name} has dtype {x.dtype}; expected {dtype}")


def check_index(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` holds integers of 32 or 64 bits."""
    if x.dtype not in INDEX_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: int32, int64")


def _check_caches(k_cache: Tensor, v_cache: Tensor, num_kv_heads: int | None, head_dim: int) -> None:
    if k_cache.dim() != 4:
        raise ValueError(f"k_cache has shape {tuple(k_cache.shape)}; expected 4 axes")
    expected = (
        k_cache.shape[0],
        k_cache.shape[1] if num_kv_heads is None else num_kv_heads,
        k_cache.shape[2],
        head_dim,
    )
    check_shape("k_cache", k_cache, expected)
    check_shape("v_cache", v_cache, expected)
    if k_cache.dtype not in CACHE_DTYPES or v_cache.dtype != k_cache.dtype:
        raise ValueError(f"k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}; they must be one supported dtype")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous")


def _check_scales(k_cache: Tensor, k_scale: Tensor | float | None, v_scale: Tensor | float | None) -> None:
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale must be given together")
    if k_cache.dtype not in FLOAT_DTYPES and k_scale is None:
        raise ValueError(f"a {k_cache.dtype} cache needs k_scale and v_scale")
    if k_cache.dtype in FLOAT_DTYPES and k_scale is not None:
        raise ValueError(f"a {k_cache.dtype} cache takes no k_scale and v_scale")
    if k_cache.dtype == torch.int8:
        for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                raise ValueError(f"{name} of an int8 cache must be a float32 tensor")
            check_shape(name, value, tuple(k_cache.shape[:3]))
            if not value.is_contiguous():
                raise ValueError(f"{name} has strides {value.stride()}; it must be contiguous")
    else:
        for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; this cache takes one number per layer")


def check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    k_scale: Tensor | float | None,
    v_scale: Tensor | float | None,
    out: Tensor | None,
) -> None:
    """Check what prefill and decode attention share.

    Raises:
        ValueError: names the argument, what it is and what is allowed.
    """
    if q.dim() != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [num_tokens, num_q_heads, head_dim]")
    check_float("q", q)
    _check_caches(k_cache, v_cache, None, q.shape[2])
    if k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1] != 0:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k_cache.shape[1]} KV heads evenly")
    num_seqs = seq_lens.shape[0]
    check_shape("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,))
    if block_table.dim() != 2 or block_table.shape[0] != num_seqs:
        raise ValueError(f"block_table has shape {tuple(block_table.shape)}; expected ({num_seqs}, max_blocks_per_seq)")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("seq_lens", seq_lens), ("block_table", block_table)):
        check_index(name, x)
    _check_window(window)
    check_positive("soft_cap", soft_cap)
    if sinks is not None:
        check_shape("sinks", sinks, (q.shape[1],))
    _check_scales(k_cache, k_scale, v_scale)
    check_out(out, q.shape, q)


def check_draft_mask(draft_mask: Tensor | None, num_tokens: int) -> None:
    """Raise ValueError unless `draft_mask` is None or a row of bits for every query token."""
    if draft_mask is not None:
        check_dtype("draft_mask", draft_mask, torch.int64)
        check_shape("draft_mask", draft_mask, (num_tokens,))


def check_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    positions: Tensor,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_scale: Tensor | float | None,
    v_scale: Tensor | float | None,
) -> None:
    """Check the arguments of `write_kv`.

    Raises:
        ValueError: names the argument, what it is and what is allowed.
    """
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}; expected [num_tokens, heads, head_dim]")
    check_float("q", q)
    num_tokens, num_kv_heads, head_dim = k.shape
    check_shape("q", q, (num_tokens, q.shape[1], head_dim))
    check_shape("v", v, (num_tokens, num_kv_heads, head_dim))
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must be one dtype")
    _check_caches(k_cache, v_cache, num_kv_heads, head_dim)
    check_shape("slot_mapping", slot_mapping, (num_tokens,))
    check_shape("positions", positions, (num_tokens,))
    check_index("slot_mapping", slot_mapping)
    check_index("positions", positions)
    if cos_sin is not None and (cos_sin.dim() != 2 or cos_sin.shape[1] % 2 or cos_sin.shape[1] > head_dim):
        raise ValueError(
            f"cos_sin has shape {tuple(cos_sin.shape)}; expected [max_position, rotary_dim], "
            f"rotary_dim even and at most {head_dim}"
        )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_shape(name, weight, (head_dim,))
    _check_scales(k_cache, k_scale, v_scale)
