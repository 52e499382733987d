"""This module holds the running rows in service order, and the batch they make as long as all of them decode. It does
not know blocks or budgets.
"""

from __future__ import annotations

from bisect import bisect

import numpy as np
import numpy.typing as npt

from ..request import RowTable
from .batch import Steady, steady_batch

__all__ = ["RunningOrder"]

Int32Array = npt.NDArray[np.int32]
IndexArray = npt.NDArray[np.intp]


class RunningOrder:
    """Rows by the `order` of their requests. Released rows stay in it until `drop_released`.

    Args:
        table: the scheduler's.
        max_num_seqs: number of rows.
    """

    def __init__(self, table: RowTable, max_num_seqs: int) -> None:
        self.rows: IndexArray = np.empty(0, dtype=np.intp)
        self.is_running: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=np.bool_)
        self._table = table
        self._any_released = False
        self._steady: Steady | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def enter(self, row: int) -> None:
        """Note that a row runs; `join` says where it stands."""
        self.is_running[row] = True

    def release(self, row: int) -> None:
        """Note that a row runs no more."""
        self.is_running[row] = False
        self._any_released = True

    def drop_released(self) -> None:
        """Take out the rows that were released."""
        if self._any_released:
            self.rows = self.rows[self.is_running[self.rows]]
            self._any_released = False
            self._steady = None

    def living(self) -> list[int]:
        """Return the rows that run, in order."""
        return self.rows[self.is_running[self.rows]].tolist()  # type: ignore[no-any-return]

    def join(self, admitted: list[tuple[int, int]], counts: Int32Array) -> Int32Array:
        """Put admitted (row, count) pairs where they belong, and return the counts of the new order."""
        order, table = self.rows, self._table
        new_rows = np.array([row for row, _ in admitted], dtype=np.intp)
        new_counts = np.array([count for _, count in admitted], dtype=np.int32)
        self._steady = None
        first = table.request(admitted[0][0])
        if len(order) == 0 or table.request(int(order[-1])).order < first.order:
            self.rows = np.concatenate((order, new_rows))
            return np.concatenate((counts, new_counts))
        keys = [table.request(row).order for row, _ in admitted]
        places = [bisect(order, key, key=lambda row: table.request(int(row)).order) for key in keys]
        self.rows = np.insert(order, places, new_rows)
        return np.insert(counts, places, new_counts)

    def steady(self, step: int) -> Steady:
        """Return the batch in which every row decodes one token; each is one token behind.

        Args:
            step: the number of the step it is for.
        """
        if self._steady is None:
            table, rows = self._table, self.rows
            # A row samples its last token where it runs the one before.
            num_left = table.max_num_tokens[rows] - 1 - table.num_ahead[rows]
            self._steady = steady_batch(rows, step + int(num_left.min(initial=np.iinfo(np.int32).max)))
        return self._steady

    def unsteady(self) -> None:
        """Note that a step runs some rows otherwise."""
        self._steady = None
