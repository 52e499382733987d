"""This module holds which backend takes which case, and what the interpreter is quick at. It does not know the ops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from octavo.kernels.spec import Case

from .calls import INTERPRETER
from .paged import Shape

TRITON_BLOCK_SIZES: Final = (16, 32, 64, 128)
_FLOAT64: Final = ("float64", torch.float64)
_TILE: Final = 64
MAX_TILES: Final = 10
"""Tiles of keys that one call of a check may walk in the small tier: the interpreter takes some 20 ms for each."""


def _num_tiles(shape: Shape) -> int:
    """Return about how many tiles of keys one attention call walks."""
    return shape.num_kv_heads * sum(
        -(-query_len * shape.group_size // (2 * _TILE)) * -(-seq_len // _TILE) for query_len, seq_len in shape.seqs
    )


def takes(backend: str, values: Iterable[Any], *, small: bool = False) -> bool:
    """Whether a backend takes a test's parameters; Triton refuses float64 and odd block sizes by name.

    Args:
        small: whether to refuse also what takes the interpreter long.
    """
    if backend != "triton":
        return True
    for value in values:
        if isinstance(value, Shape | Case):
            block_size = value.block_size if isinstance(value, Shape) else value.get("block_size", 16)
            if value.dtype in _FLOAT64 or block_size not in TRITON_BLOCK_SIZES:
                return False
        if isinstance(value, str | torch.dtype) and value in _FLOAT64:
            return False
        if small and INTERPRETER and isinstance(value, Shape) and _num_tiles(value) > MAX_TILES:
            return False
    return True
