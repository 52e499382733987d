"""This module holds which backend takes which case, and what the interpreter is quick at. It does not know the ops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from octavo.kernels.dispatch import TRITON_BLOCK_SIZES
from octavo.kernels.spec import Case

from .calls import INTERPRETER
from .paged import Shape

_REFUSED: Final = ("float64", torch.float64)
_TILE: Final = 64
MAX_TILES: Final = 20
"""Tiles of keys that one call of a check may walk in the small tier, of which a check makes up to ten."""


def _num_tiles(shape: Shape) -> int:
    """Return about how many tiles of keys one attention call walks."""
    return shape.num_kv_heads * sum(
        -(-query_len * shape.group_size // (2 * _TILE)) * -(-seq_len // _TILE) for query_len, seq_len in shape.seqs
    )


def _takes_case(case: Case) -> bool:
    return case.dtype not in _REFUSED and case.get("block_size", 16) in TRITON_BLOCK_SIZES


def takes(backend: str, values: Iterable[Any], *, small: bool = False) -> bool:
    """Whether a backend takes a test's parameters; Triton refuses by name what it does not.

    Args:
        small: whether to refuse also what takes the interpreter long.
    """
    if backend != "triton":
        return True
    for value in values:
        if isinstance(value, str | torch.dtype) and value in _REFUSED:
            return False
        if isinstance(value, Shape) and (value.dtype in _REFUSED or value.block_size not in TRITON_BLOCK_SIZES):
            return False
        if isinstance(value, Case) and not _takes_case(value):
            return False
        if small and INTERPRETER and isinstance(value, Shape) and _num_tiles(value) > MAX_TILES:
            return False
    return True
