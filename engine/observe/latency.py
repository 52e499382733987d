"""This module holds when each sequence got its tokens, as events come in. It does not know what the times are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import EventKind, RequestEvent, StepEvent

__all__ = ["Latencies", "Progress", "TokenTimes"]

FloatArray = npt.NDArray[np.float64]
NAN = float("nan")


class Latencies(NamedTuple):
    """What the tokens of one step had taken, in seconds."""

    first_s: FloatArray
    """[num_first] from arrival to first token."""
    gaps_s: FloatArray
    """[num_others] since the sequence's last token, time in the queue after preemption included."""


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
    """Follows every sequence that has not ended; a step costs a few numpy calls, however many rows it had."""

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

    def on_step(self, event: StepEvent, now_s: float) -> Latencies:
        """Take a step and return what its tokens had taken; of a sequence that began unseen, only its later tokens.

        Args:
            event: the step.
            now_s: when its tokens were there, to the user.
        """
        rows = event.rows[event.sampled]
        if len(rows) == 0:
            return Latencies(np.empty(0), np.empty(0))
        self._make_room(int(rows.max()))
        last_s = self._last_s[rows]
        is_first = np.isnan(last_s)
        self._last_s[rows] = now_s
        first_rows = rows[is_first]
        self._first_s[first_rows] = now_s
        first_s = now_s - self._arrived_s[first_rows]
        return Latencies(first_s[~np.isnan(first_s)], now_s - last_s[~is_first])

    def _make_room(self, row: int) -> None:
        if row >= len(self._last_s):
            grown = [np.full(2 * row + 64, NAN) for _ in range(3)]
            for new, old in zip(grown, (self._arrived_s, self._first_s, self._last_s), strict=True):
                new[: len(old)] = old
            self._arrived_s, self._first_s, self._last_s = grown
