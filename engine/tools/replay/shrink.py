"""This module holds how a recording that replays to another schedule is made small: fewer requests and steps, the same
difference. It does not know why it differs.

What the old scheduler would have done with fewer requests, nobody can know. So a request is left out only where all
that is told of the others, up to the step that differs, is what they do without it, too: they never noticed it. In that
step itself only the new scheduler can be asked. So whoever was there then stays, and so does who had the blocks that
are found in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ...events import EventKind, RequestEvent, StepEvent
from ...observe.recording import to_json
from ...observe.ring import EventRing
from .difference import Difference
from .run import Outcome, StepLog, replay
from .script import Script

__all__ = ["Minimal", "shrink"]

MAX_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Minimal:
    """The smallest script found that shows a difference."""

    script: Script
    difference: Difference
    recording: dict[str, Any]
    """As JSON; a replay of it shows the difference again."""


def shrink(
    script: Script,
    difference: Difference,
    *,
    on_try: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Minimal:
    """Leave out what a difference does not need, of a run whose steps do not overlap.

    Delta debugging (Zeller and Hildebrandt 2002, https://doi.org/10.1109/32.988498) over requests.

    Args:
        script: what was replayed.
        difference: what came of it.
        on_try: called before each replay with how many there were and how many requests are left.
        should_stop: whether to take what there is.
    """
    script = script.until(difference.place).without((), difference.field)
    groups = groupby(script.arrivals.values(), lambda event: (event.request_id, event.serial - event.choice))
    needed, all_serials = _needed(script), [[event.serial for event in group] for _, group in groups]
    requests = [serials for serials in all_serials if needed.isdisjoint(serials)]
    num_kept = len(all_serials) - len(requests)
    best = (script, replay(script, keep_logs=True))
    num_tries, num_parts = 0, 2
    while len(requests) + num_kept > 1 and requests and num_tries < MAX_TRIES and not should_stop():
        size = -(-len(requests) // num_parts)
        for start in range(0, len(requests), size):
            if num_tries == MAX_TRIES or should_stop():
                break
            if on_try is not None:
                on_try(num_tries, len(requests) + num_kept)
            num_tries += 1
            rest = requests[:start] + requests[start + size :]
            found = _try(script, requests[start : start + size], difference) if rest or num_kept else None
            if found is not None:
                script, requests, best = found[0], rest, found
                num_parts = max(num_parts - 1, 2)
                break
        else:
            if size == 1:
                break
            num_parts = min(2 * num_parts, len(requests))
    script, outcome = best
    assert outcome.difference is not None, "the difference is gone"
    return Minimal(script, outcome.difference, _recording(script, outcome.logs))


def _needed(script: Script) -> set[int]:
    """Return who is there in the last step, and who was first to have the blocks that are found in it."""
    *before, last = script.steps
    coming = [event for step in script.steps for event in (*step.before, *step.flight)]
    there = {event.serial for event in coming if event.kind == EventKind.ARRIVED}
    left = [event for step in before for event in (*step.before, *step.flight, *step.ends)] + last.before
    there -= {event.serial for event in left if event.kind == EventKind.FINISHED}
    for serial, _, num_cached in last.facts["admitted"]:
        there |= {script.node(serial, block)[0] for block in range(num_cached // script.limits.block_size)}
    return there


def _try(script: Script, requests: Sequence[Collection[int]], difference: Difference) -> tuple[Script, Outcome] | None:
    """Leave requests out and replay; None where another difference shows, or none."""
    smaller = script.without({serial for serials in requests for serial in serials}, difference.field)
    outcome = replay(smaller, keep_logs=True)
    found = outcome.difference
    if found is None or found.place != len(smaller.steps) - 1 or not found.matches(difference):
        return None
    return smaller, outcome


def _recording(script: Script, logs: Sequence[StepLog]) -> dict[str, Any]:
    """Write a script down: its steps as they are replayed, the last as it was recorded."""
    *before, last = logs
    first = 0 if script.previous is None else script.previous.step + 1
    steps: list[StepEvent] = [] if script.previous is None else [script.previous]
    events: list[RequestEvent] = []
    rows: dict[int, int] = {}
    for log in before:
        events += [_own(script, event) for event in (*log.events, *log.ends)]
        rows |= {event.serial: event.row for event in log.events if event.kind == EventKind.ADMITTED}
        assert log.step is not None, "it ran as recorded"
        steps.append(log.step._replace(kin=()))
    final, number = script.steps[-1], first + len(before)
    # Rows are the replay's; who has none yet gets one that nobody had.
    for event in final.scheduled:
        if event.kind == EventKind.ADMITTED:
            rows[event.serial] = max(rows.values(), default=-1) + 1
    entering = [_own(script, event) for event in last.events if event.kind in (EventKind.ARRIVED, EventKind.FINISHED)]
    told = [
        event._replace(step=number, row=rows.get(event.serial, -1), kin=()) for event in (*final.scheduled, *final.ends)
    ]
    events += [*entering, *told[: len(final.scheduled)]]
    facts = final.facts
    serials = [serial for serial, _ in facts["rows"]]
    steps.append(
        final.event._replace(
            step=number,
            rows=np.array([rows[serial] for serial in serials], dtype=np.int32),
            num_scheduled_tokens=np.array([count for _, count in facts["rows"]], dtype=np.int32),
            sampled=np.array([serials.index(serial) for (serial,) in facts["sampled"]], dtype=np.int32),
            kin=(),
        )
    )
    # Where the replay did not get so far, it has not seen who came meanwhile.
    flight = final.flight if last.step is not None else ()
    flying = [event._replace(step=number) for event in flight if event.kind == EventKind.FINISHED]
    events += [*flying, *told[len(final.scheduled) :]]
    ring = EventRing(len(steps), max(1, len(events)))
    for step in steps:
        ring.on_step(step)
    for event in events:
        ring.on_request(event)
    # Of a script from the middle of a run, this says so.
    ring.num_steps += first
    return to_json(ring, script.facts)


def _own(script: Script, event: RequestEvent) -> RequestEvent:
    """Return an event of the replay with what the script knows of its sequence: all of its kin, told at once."""
    if event.kind != EventKind.ARRIVED:
        return event._replace(kin=(), serial=-1)
    kin = tuple(number for run in script.kin.get(event.serial, ()) for number in run)
    return event._replace(kin=kin)
