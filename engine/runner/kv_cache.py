"""This module holds the storage of keys and values. It does not know who owns which block."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..config import ModelConfig
from ..models.decoder import LayerCache

__all__ = ["allocate_kv_cache"]


def allocate_kv_cache(
    config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """Allocate the cache of every layer.

    Args:
        num_blocks: blocks that can be handed out; block 0, the null block, comes on top of them.

    Returns:
        Per layer two zeroed [num_blocks + 1, num_kv_heads, block_size, head_dim] tensors. On a CPU the pages of
        blocks never written take no memory.
    """
    shape = (num_blocks + 1, config.num_kv_heads, block_size, config.head_dim)
    return [LayerCache(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(config.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page; numpy asks the kernel for pages that are zero when they are first touched.
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
