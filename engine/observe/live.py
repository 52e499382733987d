"""This module holds what one watcher of the live view is told each time: what is new. It does not know HTTP."""

from __future__ import annotations

from typing import Any

from ..events import KVSnapshot
from .metrics import Metrics
from .recording import EVENT_FIELDS, STEP_FIELDS, event_rows, snapshot_json, step_rows
from .ring import EventRing

__all__ = ["LiveFeed"]

HISTORY_STEPS = 256
"""What a new watcher is told of the past, and the most that is told at once: a late reader misses what is older."""
HISTORY_EVENTS = 1024


class LiveFeed:
    """The place of one watcher in the ring.

    Args:
        ring: where steps and events come from.
        metrics: where rates come from.
    """

    def __init__(self, ring: EventRing, metrics: Metrics) -> None:
        self._ring = ring
        self._metrics = metrics
        self._num_steps = self._num_events = 0

    def next(self, snapshot: KVSnapshot) -> dict[str, Any]:
        """Return what is new since the last time.

        Args:
            snapshot: of this moment; the ring keeps its blocks for recordings.

        Returns:
            {"step_fields", "steps", "event_fields", "requests", "kv", "rates"}; see `recording`.
        """
        ring = self._ring
        ring.on_snapshot(snapshot)
        steps = ring.steps_after(max(self._num_steps, ring.num_steps - HISTORY_STEPS))
        events = ring.events_after(max(self._num_events, ring.num_events - HISTORY_EVENTS))
        self._num_steps, self._num_events = ring.num_steps, ring.num_events
        return {
            "step_fields": STEP_FIELDS,
            "steps": step_rows(steps),
            "event_fields": EVENT_FIELDS,
            "requests": event_rows(events),
            "kv": snapshot_json(snapshot),
            "rates": self._metrics.rates(snapshot.time_s),
        }
