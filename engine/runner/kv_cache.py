"""This module holds the storage of keys and values. It does not know who owns which block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..config import ModelConfig
from ..footprint import CacheDTypeName
from ..layers.attention import LayerCache

__all__ = ["allocate_kv_cache", "allocate_like", "storage_dtype"]


def storage_dtype(name: CacheDTypeName) -> torch.dtype:
    """Return what torch calls a dtype of keys and values."""
    dtype: torch.dtype = getattr(torch, "float8_e4m3fn" if name == "fp8" else name)
    return dtype


def allocate_kv_cache(
    config: ModelConfig,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    scales: Sequence[tuple[float, float]] | None = None,
) -> list[LayerCache]:
    """Allocate the cache of every layer.

    Args:
        num_blocks: blocks that can be handed out; block 0, the null block, comes on top of them.
        dtype: of keys and values: floating point, int8 or float8_e4m3fn.
        scales: of float8_e4m3fn, those of k and v by layer; None: all are 1.

    Returns:
        Per layer two zeroed [num_blocks + 1, num_kv_heads, block_size, head_dim] tensors, and their scales: of int8 two
        zeroed [num_blocks + 1, num_kv_heads, block_size] float32 tensors. On a CPU the pages of blocks never written
        take no memory.
    """
    slots = (num_blocks + 1, config.num_kv_heads, block_size)

    def layer(index: int) -> LayerCache:
        k, v = (_zeros((*slots, config.head_dim), dtype, device) for _ in range(2))
        if dtype == torch.int8:
            return LayerCache(k, v, _zeros(slots, torch.float32, device), _zeros(slots, torch.float32, device))
        if dtype == torch.float8_e4m3fn:
            return LayerCache(k, v, *(scales[index] if scales else (1.0, 1.0)))
        return LayerCache(k, v)

    return [layer(index) for index in range(config.num_layers)]


def allocate_like(
    cache: Sequence[LayerCache], config: ModelConfig, *, num_blocks: int, block_size: int
) -> list[LayerCache]:
    """Allocate a cache of other blocks that stores keys and values as a given one does."""
    scales = [(each.k_scale, each.v_scale) for each in cache]
    return allocate_kv_cache(
        config,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=cache[0].k.dtype,
        device=cache[0].k.device,
        scales=[(k, v) for k, v in scales if isinstance(k, float) and isinstance(v, float)],
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device).view(dtype).view(shape)
    # torch.zeros writes every page; numpy asks the kernel for pages that are zero when they are first touched.
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
