"""This module holds the steps that were handed out and have not come back. It does not know what they compute.

A row may be released while steps with it are out, and be somebody else's before they are back. What they say of it then
means nothing: so each of them notes who has left it, and nobody ever asks whether a row of a step is running now.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..step import SchedulerOutput

__all__ = ["Flight", "Flights"]


@dataclass(frozen=True, slots=True)
class Flight:
    """One step that is out."""

    work: SchedulerOutput
    rows: npt.NDArray[np.intp]
    """`work.rows`, as an index."""
    ends: npt.NDArray[np.int32]
    """[num_seqs] tokens each row has computed once it is back."""
    left: list[int] = field(default_factory=list)
    """Rows that were released since."""

    def stayed(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Return which of some rows of the step nobody has left since."""
        return ~np.isin(rows, self.left)


class Flights:
    """Steps by the order in which they were handed out, in which they come back."""

    def __init__(self) -> None:
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def add(self, work: SchedulerOutput, rows: npt.NDArray[np.intp], ends: npt.NDArray[np.int32]) -> None:
        """Note a step that is handed out."""
        self._flights.append(Flight(work, rows, ends))

    def leave(self, row: int) -> None:
        """Note that a row is released."""
        for flight in self._flights:
            flight.left.append(row)

    def left(self, work: SchedulerOutput) -> list[int]:
        """Return who has left a step that is out."""
        return next(flight.left for flight in self._flights if flight.work is work)

    def land(self, work: SchedulerOutput) -> Flight:
        """Take out a step that is back."""
        assert self._flights, "update() without schedule()"
        flight = self._flights.popleft()
        assert flight.work is work, f"update() of step {work.step}; in flight is step {flight.work.step}"
        return flight

    def num_ahead(self, row: int) -> int:
        """Return how many tokens of a running row are out: for tests."""
        return sum(
            int(flight.work.num_scheduled_tokens[flight.rows == row].sum())
            for flight in self._flights
            if row not in flight.left
        )
