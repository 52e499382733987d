"""This package holds the ops that write the paged KV cache. It does not know who owns a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import active
from ..rope import RopeStyle

__all__ = ["copy_blocks", "plan_write_kv", "write_kv"]


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
    plan: Any = None,
) -> None:
    """Normalise (RMSNorm per head) and rotate q and k, q in place, and write k and v to their slots.

    Args:
        q, k, v: [num_tokens, num_q_heads or num_kv_heads, head_dim] float; k and v are not changed.
        k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim] float, int8 or float8_e4m3fn.
        slot_mapping: [num_tokens] int64, block * block_size + offset; -1 writes nothing.
        positions: [num_tokens] int64, rows of cos_sin.
        cos_sin: [max_position, rotary_dim] float32, all cos then all sin; None: no rotation.
        q_norm, k_norm: [head_dim] weights, or None for no norm.
        k_scale, v_scale: int8 cache: [num_blocks, num_kv_heads, block_size] float32, written here (amax / 127 of each
            token and head); e4m3 cache: one number to divide by.
        plan: from `plan_write_kv`, for the same slots and positions; None: it plans for itself.
    """
    active["write_kv"](
        q, k, v, k_cache, v_cache, slot_mapping, positions=positions, cos_sin=cos_sin, rope_style=rope_style,
        q_norm=q_norm, k_norm=k_norm, eps=eps, k_scale=k_scale, v_scale=v_scale, plan=plan,
    )  # fmt: skip


def plan_write_kv(
    slot_mapping: Tensor,
    *,
    positions: Tensor,
    cos_sin: Tensor | None,
    rope_style: RopeStyle,
    block_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
) -> Any:
    """Prepare `write_kv` for all layers of a step that share their rotation; pass the result as `plan`.

    Args:
        slot_mapping, positions, cos_sin, rope_style: as `write_kv` takes them.
        dtype: of q and k.

    Returns:
        What the backend in force wants to know; opaque to callers.
    """
    return active["plan_write_kv"](
        slot_mapping, positions=positions, cos_sin=cos_sin, rope_style=rope_style, block_size=block_size,
        num_kv_heads=num_kv_heads, dtype=dtype,
    )  # fmt: skip


def copy_blocks(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy block src[i] to block dst[i] in both caches, as if every block were read before any is written.

    Args:
        k_cache, v_cache: [num_blocks, ...]; int8 scales are copied by a second call on `k_scale` and `v_scale`.
        src, dst: [num_copies] int64; no block may appear twice in dst.
    """
    active["copy_blocks"](k_cache, v_cache, src, dst)
