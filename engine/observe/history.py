"""This module holds the events put together again: who had which row when, and what it ran. It does not know words.

A sequence waits, has a row, waits again if it was preempted, and ends. The time with a row is a `Stay`; `StepTable`
says what a stay ran in each step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import EventKind, Moment, RequestEvent, StepEvent, WaitReason

__all__ = ["HeadWaits", "Life", "Runs", "Stay", "StepTable", "Wait", "lives"]

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Wait(NamedTuple):
    """A time in the queue."""

    start_s: float
    end_s: float | None
    """None: it still waits."""


class Stay(NamedTuple):
    """A time with a row: steps [first_step, end_step)."""

    admitted: RequestEvent
    left: RequestEvent | None
    """PREEMPTED or FINISHED; None: it is still there."""

    @property
    def first_step(self) -> int:
        """The first step it runs in."""
        return self.admitted.step

    @property
    def end_step(self) -> int | None:
        """The first step it does not run in any more."""
        if self.left is None:
            return None
        return self.left.step + (self.left.kind == EventKind.FINISHED)


class Life(NamedTuple):
    """What is known of one sequence."""

    request_id: str
    choice: int
    arrived: RequestEvent | None
    """None: its beginning has left the ring."""
    waits: list[Wait]
    stays: list[Stay]
    finished: RequestEvent | None


def lives(events: Iterable[RequestEvent]) -> list[Life]:
    """Put events together by sequence, in the order of their first events.

    Args:
        events: in order, of one request or of many. An id may have been used again after its end: that is a new life.
    """
    open_lives: dict[tuple[str, int], list[RequestEvent]] = {}
    histories: list[list[RequestEvent]] = []
    for event in events:
        key = (event.request_id, event.choice)
        history = open_lives.get(key)
        if history is None or event.kind == EventKind.ARRIVED:
            history = open_lives[key] = []
            histories.append(history)
        history.append(event)
    return [_life(history) for history in histories]


def _life(history: list[RequestEvent]) -> Life:
    first = history[0]
    waits: list[Wait] = []
    stays: list[Stay] = []
    since: float | None = None
    """Since when it waits."""
    admitted: RequestEvent | None = None
    for event in history:
        if event.kind in (EventKind.ARRIVED, EventKind.WAITS):
            since = event.time_s if since is None else since
            continue
        if since is not None:
            waits.append(Wait(since, event.time_s))
            since = None
        if event.kind == EventKind.ADMITTED:
            admitted = event
            continue
        if admitted is not None:
            stays.append(Stay(admitted, event))
            admitted = None
        if event.kind == EventKind.PREEMPTED:
            since = event.time_s
    if since is not None:
        waits.append(Wait(since, None))
    if admitted is not None:
        stays.append(Stay(admitted, None))
    arrived = first if first.kind == EventKind.ARRIVED else None
    finished = history[-1] if history[-1].kind == EventKind.FINISHED else None
    return Life(first.request_id, first.choice, arrived, waits, stays, finished)


class HeadWait(NamedTuple):
    """A time in which the head of the queue could not be admitted, and so nobody."""

    event: RequestEvent
    end_s: float | None
    """None: it goes on."""


class HeadWaits:
    """What the queue stood still for, in the order of time.

    Args:
        events: of all requests, in order.
    """

    def __init__(self, events: Iterable[RequestEvent]) -> None:
        self.waits: list[HeadWait] = []
        head: RequestEvent | None = None
        for event in events:
            is_over = event.kind in (EventKind.WAITS, EventKind.ADMITTED)
            if head is not None and (is_over or _is_end_of(event, head)):
                self.waits.append(HeadWait(head, event.time_s))
                head = None
            if event.kind == EventKind.WAITS:
                head = event
        if head is not None:
            self.waits.append(HeadWait(head, None))

    def between(self, start_s: float, end_s: float) -> dict[WaitReason, float]:
        """Return for what a sequence in the queue waited between two moments: seconds by reason, the longest first.

        Only the head is ever held up by anything; all others wait because it does.
        """
        seconds: dict[WaitReason, float] = {}
        first = bisect_right(self.waits, start_s, key=lambda wait: wait.event.time_s) - 1
        for wait in islice(self.waits, max(0, first), None):
            if wait.event.time_s >= end_s:
                break
            until = end_s if wait.end_s is None else min(wait.end_s, end_s)
            overlap = until - max(wait.event.time_s, start_s)
            if overlap > 0:
                reason = WaitReason(wait.event.detail)
                seconds[reason] = seconds.get(reason, 0.0) + overlap
        rest = end_s - start_s - sum(seconds.values())
        if rest > 1e-6 or not seconds:
            seconds[WaitReason.NEXT_STEP] = max(0.0, rest)
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _is_end_of(event: RequestEvent, head: RequestEvent) -> bool:
    ended = event.kind == EventKind.FINISHED
    return ended and (event.request_id, event.choice) == (head.request_id, head.choice)


class Runs(NamedTuple):
    """What one stay ran; arrays in the order of steps."""

    places: IntArray
    """[n] which of the table's steps."""
    num_tokens: IntArray
    """[n] tokens run."""
    sampled: BoolArray
    """[n] whether a token came of it."""
    is_chunk: BoolArray
    """[n] whether it ran tokens that were known at its admission: a prompt, or what preemption took."""
    is_complete: bool
    """Whether all of its steps are in the table."""
    start_s: FloatArray
    """[n] when the device was free to begin; never after the row was left, as the next."""
    end_s: FloatArray
    """[n] when the news of it was ready."""


class StepTable:
    """What ran in some steps, by row: numpy throughout, since a long ring holds a million entries.

    Args:
        steps: in order, without gaps.
    """

    def __init__(self, steps: Iterable[StepEvent]) -> None:
        self.steps = list(steps)
        self.first_step = self.steps[0].step if self.steps else 0
        lengths = np.array([len(event.rows) for event in self.steps], dtype=np.int64)
        offsets = np.cumsum(lengths) - lengths
        rows = _concatenate([event.rows for event in self.steps])
        sampled = np.zeros(len(rows), dtype=np.bool_)
        sampled[_concatenate([event.sampled + at for event, at in zip(self.steps, offsets, strict=True)])] = True
        # Sixteen bits are sorted by counting: a tenth of the time.
        order = np.argsort(rows.astype(np.uint16) if len(rows) and rows.max() < 1 << 16 else rows, kind="stable")
        self._rows = rows[order]
        self._places = np.repeat(np.arange(len(self.steps)), lengths)[order]
        self._num_tokens = _concatenate([event.num_scheduled_tokens for event in self.steps])[order]
        self._sampled = sampled[order]
        self.end_s: FloatArray = np.array([event.end_s for event in self.steps])
        self.run_s: FloatArray = np.array([event.execute_s for event in self.steps])
        """When the runner got a step, or, where steps overlap, the one before it was over."""
        np.maximum(self.run_s[1:], self.end_s[:-1], out=self.run_s[1:])

    def runs_of(self, stay: Stay) -> Runs:
        """Return what a sequence ran while it had a row."""
        row, admitted = stay.admitted.row, stay.admitted
        low, high = (int(np.searchsorted(self._rows, row, side)) for side in ("left", "right"))
        places = self._places[low:high]
        first = low + int(np.searchsorted(places, stay.first_step - self.first_step))
        end = high if stay.end_step is None else low + int(np.searchsorted(places, stay.end_step - self.first_step))
        num_tokens = self._num_tokens[first:end]
        is_complete = not self.steps or stay.first_step >= self.first_step
        if is_complete:
            done = np.cumsum(num_tokens) - num_tokens
            is_chunk = done < admitted.num_tokens - admitted.num_cached_tokens
        else:
            is_chunk = num_tokens > 1
        places, left = places[first - low : end - low], stay.left
        # Who ends in the update of a step was there until its end; others may leave while a step is out.
        until_s = np.inf if left is None or left.moment == Moment.UPDATE else left.time_s
        start_s, end_s = (np.minimum(times[places], until_s) for times in (self.run_s, self.end_s))
        return Runs(places, num_tokens, self._sampled[first:end], is_chunk, is_complete, start_s, end_s)


def _concatenate(arrays: Sequence[npt.NDArray[np.integer]]) -> IntArray:
    return np.concatenate(arrays, dtype=np.int64, casting="safe") if arrays else np.empty(0, dtype=np.int64)
