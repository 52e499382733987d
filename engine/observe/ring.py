"""This module holds the latest events of a run, within bounds. It does not know what is made of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ..events import KVSnapshot, RequestEvent, StepEvent

__all__ = ["BlockMap", "EventRing"]

T = TypeVar("T")

EVENTS_PER_REQUEST = 4
"""What a sequence usually has: an arrival, a wait, an admission and an end."""


class BlockMap(NamedTuple):
    """The state of every block at one moment."""

    time_s: float
    blocks: npt.NDArray[np.uint8]
    """[num_blocks] as in `KVSnapshot`."""


class EventRing:
    """A recorder that keeps the latest steps and what happened to the latest sequences; appending is O(1).

    A run that is shorter than the ring is in it completely.

    Args:
        max_steps: steps to keep.
        max_requests: of about so many sequences what happened to them is kept: of fewer where much happened to each.
        max_block_maps: moments to keep of the live view's picture of the blocks.
    """

    def __init__(self, max_steps: int = 4096, max_requests: int = 16_384, max_block_maps: int = 64) -> None:
        self.max_steps = max_steps
        self.max_events = EVENTS_PER_REQUEST * max_requests
        self.steps: deque[StepEvent] = deque(maxlen=max_steps)
        self.events: deque[RequestEvent] = deque()
        self.block_maps: deque[BlockMap] = deque(maxlen=max_block_maps)
        self.num_steps = 0
        """Ever taken."""
        self.num_events = 0
        """Ever taken."""
        self._by_request: dict[str, list[RequestEvent]] | None = {}

    def on_request(self, event: RequestEvent) -> None:
        """Take what happened to a sequence."""
        by_request = self._index()
        if len(self.events) == self.max_events:
            oldest = self.events.popleft().request_id
            mine = by_request[oldest]
            del mine[0]
            if not mine:
                del by_request[oldest]
        self.events.append(event)
        self.num_events += 1
        by_request.setdefault(event.request_id, []).append(event)

    def on_step(self, event: StepEvent) -> None:
        """Take a step that has ended."""
        self.steps.append(event)
        self.num_steps += 1

    def on_snapshot(self, snapshot: KVSnapshot) -> None:
        """Take a picture of the blocks, if it differs from the last."""
        if not self.block_maps or not np.array_equal(self.block_maps[-1].blocks, snapshot.blocks):
            self.block_maps.append(BlockMap(snapshot.time_s, snapshot.blocks))

    @property
    def is_complete(self) -> bool:
        """Whether everything that was ever taken is still here."""
        return self.num_steps == len(self.steps) and self.num_events == len(self.events)

    def events_of(self, request_id: str) -> list[RequestEvent]:
        """Return what is still known of a request, in order; of all its choices."""
        return list(self._index().get(request_id, ()))

    def request_ids(self) -> Iterable[str]:
        """Return the ids of all requests something is known of, the latest first."""
        return reversed(self._index())

    def events_after(self, num_events: int) -> list[RequestEvent]:
        """Return the events that came after the first `num_events` ever taken, as far as they are still here."""
        return _last(self.events, self.num_events - num_events)

    def steps_after(self, num_steps: int) -> list[StepEvent]:
        """Return the steps that came after the first `num_steps` ever taken, as far as they are still here."""
        return _last(self.steps, self.num_steps - num_steps)

    def copy(self) -> EventRing:
        """Return a ring of its own with the same events, for a thread that takes its time with them."""
        other = EventRing(self.max_steps, self.max_events // EVENTS_PER_REQUEST, self.block_maps.maxlen or 0)
        other.steps, other.events, other.block_maps = self.steps.copy(), self.events.copy(), self.block_maps.copy()
        other.num_steps, other.num_events = self.num_steps, self.num_events
        other._by_request = None
        return other

    def _index(self) -> dict[str, list[RequestEvent]]:
        """Return the events by request; a copy makes its own when it is asked, in its own thread's time."""
        if self._by_request is None:
            self._by_request = {}
            for event in self.events:
                self._by_request.setdefault(event.request_id, []).append(event)
        return self._by_request


def _last(items: deque[T], count: int) -> list[T]:
    return list(islice(reversed(items), max(0, count)))[::-1]
