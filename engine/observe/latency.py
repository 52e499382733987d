"""This module holds when each sequence got its tokens, as events come in. It does not know what the times are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import EventKind, RequestEvent, StepEvent

__all__ = ["Latencies", "Progress", "TokenTimes"]

FloatArray = npt.NDArray[np.float64]
NAN = float("nan")


class Latencies(NamedTuple):
    """What the tokens of some steps had taken, in seconds; and when each was there."""

    first_s: FloatArray
    """[num_first] from arrival to first token."""
    first_at_s: FloatArray
    """[num_first]"""
    gaps_s: FloatArray
    """[num_others] since the sequence's last token, time in the queue after preemption included."""
    gaps_at_s: FloatArray
    """[num_others]"""


@dataclass(slots=True)
class Progress:
    """The times of one sequence, on one clock; NaN: not there yet."""

    arrived_s: float
    num_prompt_tokens: int
    max_tokens: int
    admitted_s: float = NAN
    first_token_s: float = NAN
    last_token_s: float = NAN
    num_admissions: int = 0


class TokenTimes:
    """Follows every sequence that has not ended; any number of steps and rows costs the same few numpy calls."""

    def __init__(self) -> None:
        self.alive: dict[tuple[str, int], Progress] = {}
        # By row, of the sequence that has it.
        self._arrived_s = self._first_s = self._last_s = np.empty(0)

    def on_request(self, event: RequestEvent, now_s: float) -> Progress | None:
        """Take what happened to a sequence; None where its beginning is not known.

        Args:
            event: what happened.
            now_s: when, to the user.
        """
        key = (event.request_id, event.choice)
        if event.kind == EventKind.ARRIVED:
            self.alive[key] = Progress(now_s, event.num_tokens, event.max_tokens)
        progress = self.alive.get(key)
        if progress is None:
            return None
        row = event.row
        if event.kind == EventKind.ADMITTED:
            self._make_room(row)
            progress.num_admissions += 1
            if progress.num_admissions == 1:
                progress.admitted_s = now_s
            self._arrived_s[row] = progress.arrived_s
            self._first_s[row], self._last_s[row] = progress.first_token_s, progress.last_token_s
        elif row >= 0:
            # Preempted or finished: the row will be somebody else's.
            progress.first_token_s, progress.last_token_s = float(self._first_s[row]), float(self._last_s[row])
        if event.kind == EventKind.FINISHED:
            del self.alive[key]
        return progress

    def on_steps(self, steps: Sequence[tuple[StepEvent, float]]) -> Latencies:
        """Take steps between which nothing happened to any sequence, and return what their tokens had taken.

        Of a sequence that began unseen only its later tokens count.

        Args:
            steps: in order, each with the time when its tokens were there, to the user.
        """
        rows = np.concatenate([event.rows[event.sampled] for event, _ in steps])
        if len(rows) == 0:
            return Latencies(*(np.empty(0) for _ in range(4)))
        self._make_room(int(rows.max()))
        at_s = np.repeat([now_s for _, now_s in steps], [len(event.sampled) for event, _ in steps])
        # Sixteen bits are sorted by counting.
        order = np.argsort(rows.astype(np.uint16) if len(self._last_s) <= 1 << 16 else rows, kind="stable")
        rows, at_s = rows[order], at_s[order]
        # Of each row the first of these tokens, and the last.
        is_new = np.concatenate(([True], rows[1:] != rows[:-1]))
        is_last = np.concatenate((is_new[1:], [True]))
        last_s = np.concatenate(([NAN], at_s[:-1]))
        last_s[is_new] = self._last_s[rows[is_new]]
        self._last_s[rows[is_last]] = at_s[is_last]
        is_first = np.isnan(last_s)
        first_rows, first_at_s = rows[is_first], at_s[is_first]
        self._first_s[first_rows] = first_at_s
        first_s = first_at_s - self._arrived_s[first_rows]
        is_known, at_s, last_s = ~np.isnan(first_s), at_s[~is_first], last_s[~is_first]
        return Latencies(first_s[is_known], first_at_s[is_known], at_s - last_s, at_s)

    def _make_room(self, row: int) -> None:
        if row >= len(self._last_s):
            grown = [np.full(2 * row + 64, NAN) for _ in range(3)]
            for new, old in zip(grown, (self._arrived_s, self._first_s, self._last_s), strict=True):
                new[: len(old)] = old
            self._arrived_s, self._first_s, self._last_s = grown
