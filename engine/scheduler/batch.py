"""This module holds the arrays of one step: budget split, order in the batch. It does not know requests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..step import MAX_DECODE_QUERY_LEN

__all__ = ["NewBlocks", "Steady", "batch_order", "split_budget", "steady_batch", "to_int32"]

Int32Array = npt.NDArray[np.int32]
IndexArray = npt.NDArray[np.intp]

_NO_INT32 = np.empty(0, dtype=np.int32)


class Steady(NamedTuple):
    """A batch that stays the same from step to step as long as the same rows decode one token each."""

    rows: Int32Array
    counts: Int32Array
    sampled: Int32Array
    end_step: int
    """The first step that it is not for, as one of the rows samples its last token in the step before."""


class NewBlocks:
    """Blocks that join tables in this step, as lists by block."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.ids: list[int] = []

    def add(self, row: int, first_column: int, blocks: list[int]) -> None:
        """Note blocks that join a row's table from `first_column` on."""
        self.rows += [row] * len(blocks)
        self.columns += range(first_column, first_column + len(blocks))
        self.ids += blocks


def to_int32(values: list[int]) -> Int32Array:
    """Return a list as an array; the empty one is always the same."""
    return np.array(values, dtype=np.int32) if values else _NO_INT32


def steady_batch(order: IndexArray, end_step: int) -> Steady:
    """Return the batch in which every running row decodes one token."""
    num_seqs = len(order)
    ones = np.ones(num_seqs, dtype=np.int32)
    return Steady(order.astype(np.int32), ones, np.arange(num_seqs, dtype=np.int32), end_step)


def split_budget(todo: Int32Array, budget: int) -> Int32Array:
    """Split a token budget: rows that are one token behind first, the others in order with what is left.

    Args:
        todo: [num_running] tokens each row is behind; 0 where it is not.
        budget: tokens of the step; at least the number of rows.

    Returns:
        [num_running] int32 tokens to run, 0 where the budget did not reach.
    """
    counts = np.minimum(todo, 1)
    behind = np.flatnonzero(todo > 1)
    wanted = todo[behind]
    left = budget - (np.count_nonzero(counts) - len(behind))
    before = np.cumsum(wanted) - wanted
    counts[behind] = np.clip(left - before, 0, wanted)
    return counts


def batch_order(counts: Int32Array) -> tuple[IndexArray, int]:
    """Return the places of the rows that run in batch order, short ones first, and how many are short.

    Args:
        counts: [num_running] tokens each row runs, 0 for none.
    """
    is_long = counts > MAX_DECODE_QUERY_LEN
    short = np.flatnonzero((counts > 0) & ~is_long)
    return np.concatenate((short, np.flatnonzero(is_long))), len(short)
