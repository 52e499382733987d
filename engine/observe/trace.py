"""This module holds a run as a Chrome trace, the JSON that Perfetto and chrome://tracing open. It does not know HTTP.

Three processes: the engine (its steps, with what scheduling, the model and the update took; counters), the rows (who
had each, and in it every chunk and every stretch of decoding), and the queue (why its head waited; everybody's waits).
Slices of one track must nest; so what a row runs begins when the runner gets the step, after the row changed hands.
Where steps overlap, every other one is on a track of its own, and what a row runs begins when the step before is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .history import HeadWaits, Life, Runs, Stay, StepTable, lives
from .ring import EventRing

__all__ = ["chrome_trace"]

ENGINE, ROWS, QUEUE = 1, 2, 3
STEPS, HEAD, WAITS, OTHER_STEPS, FIRST_ROW = 1, 2, 3, 4, 10
"""Threads: numbers of their own over all processes, and none of them 0, which viewers take for an idle CPU."""
Json = dict[str, Any]


def chrome_trace(ring: EventRing, *, num_blocks: int | None = None) -> Json:
    """Return everything in a ring as a Chrome trace.

    Args:
        ring: what is known; a copy, where another thread goes on filling it.
        num_blocks: of the KV pool, for the counter of its use.
    """
    table, known = StepTable(ring.steps), lives(ring.events)
    times = [event.start_s for event in table.steps[:1]] + [event.time_s for event in ring.events]
    start_s = min(times, default=0.0)
    end_s = max([event.end_s for event in table.steps[-1:]] + [event.time_s for event in ring.events], default=0.0)
    clock = _Clock(start_s, end_s)
    rows = sorted({stay.admitted.row for life in known for stay in life.stays})
    events = [
        *_names(rows),
        *_steps(table, clock, num_blocks),
        *(slice_ for life in known for slice_ in _residence(table, life, clock)),
        *_queue(HeadWaits(ring.events), known, clock),
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"is_complete": ring.is_complete}}


class _Clock:
    """Turns seconds into microseconds since the beginning, on a grid of nanoseconds: ends meet exactly."""

    def __init__(self, start_s: float, end_s: float) -> None:
        self._start_s = start_s
        self.end_s = end_s

    def __call__(self, time_s: float) -> float:
        return round(1e9 * (time_s - self._start_s)) / 1e3

    def slice(self, pid: int, tid: int, name: str, start_s: float, end_s: float, **args: Any) -> Json:
        start, end = self(start_s), self(end_s)
        return {
            "ph": "X",
            "pid": pid,
            "tid": tid,
            "name": name,
            "ts": start,
            "dur": round(end - start, 3),
            "args": args,
        }


def _names(rows: list[int]) -> Iterator[Json]:
    for pid, name in ((ENGINE, "engine"), (ROWS, "rows"), (QUEUE, "queue")):
        yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    threads = [(ENGINE, STEPS, "steps"), (ENGINE, OTHER_STEPS, "steps that overlap them")]
    threads += [(QUEUE, HEAD, "head of the queue"), (QUEUE, WAITS, "everybody's waits")]
    threads += [(ROWS, FIRST_ROW + row, f"row {row}") for row in rows]
    for pid, tid, name in threads:
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _steps(table: StepTable, clock: _Clock, num_blocks: int | None) -> Iterator[Json]:
    free_s = 0.0
    for event in table.steps:
        track = STEPS if event.start_s >= free_s else OTHER_STEPS
        free_s = event.end_s if track == STEPS else free_s
        counts = event.num_scheduled_tokens
        args: Json = {
            "rows": len(event.rows),
            "tokens": int(counts.sum()),
            "prefill_tokens": int(counts[counts > 1].sum()),
            "sampled": len(event.sampled),
        }
        if event.failed:
            args["failed"] = event.failed
        yield clock.slice(ENGINE, track, f"step {event.step}", event.start_s, event.end_s, **args)
        times = (event.start_s, event.execute_s, event.update_s, event.end_s)
        for name, start_s, end_s in zip(("schedule", "execute", "update"), times, times[1:], strict=False):
            yield clock.slice(ENGINE, track, name, start_s, end_s)
        counters: list[tuple[str, Json]] = [
            ("requests", {"running": len(event.rows), "waiting": event.num_waiting}),
            ("tokens in the step", {"prefill": args["prefill_tokens"], "decode": len(event.sampled)}),
            ("KV blocks", {"free": event.num_free_blocks, "cached": event.num_cached_blocks}),
        ]
        if num_blocks:
            counters.append(("KV usage %", {"used": round(100 * (1 - event.num_free_blocks / num_blocks), 3)}))
        for name, values in counters:
            yield {"ph": "C", "pid": ENGINE, "tid": STEPS, "name": name, "ts": clock(event.end_s), "args": values}


def _residence(table: StepTable, life: Life, clock: _Clock) -> Iterator[Json]:
    """Yield each time a sequence had a row, and what it ran there."""
    for stay in life.stays:
        runs, track = table.runs_of(stay), FIRST_ROW + stay.admitted.row
        name = life.request_id if life.choice == 0 else f"{life.request_id} [{life.choice}]"
        left_s = _end_s(stay, runs, clock)
        yield clock.slice(ROWS, track, name, stay.admitted.time_s, left_s, **_facts(life, stay))
        # Chunks one by one, decoding from one chunk to the next as a whole: a slice a token would be millions.
        breaks = np.flatnonzero(runs.is_chunk[1:] | runs.is_chunk[:-1]) + 1
        if len(runs.places):
            for part in np.split(np.arange(len(runs.places)), breaks):
                is_chunk = bool(runs.is_chunk[part[0]])
                what, counts = ("prefill", runs.num_tokens) if is_chunk else ("decode", runs.sampled)
                name, first_step = f"{what} {int(counts[part].sum())}", int(runs.places[part[0]]) + table.first_step
                start_s, end_s = float(runs.start_s[part[0]]), float(runs.end_s[part[-1]])
                yield clock.slice(ROWS, track, name, start_s, end_s, first_step=first_step, num_steps=len(part))


def _end_s(stay: Stay, runs: Runs, clock: _Clock) -> float:
    """Return when a row was left: if in the update of a step, at its end."""
    left_s = clock.end_s if stay.left is None else stay.left.time_s
    return max(left_s, float(runs.end_s[-1])) if len(runs.places) else left_s


def _facts(life: Life, stay: Stay) -> Json:
    facts = {
        "request_id": life.request_id,
        "choice": life.choice,
        "tokens": stay.admitted.num_tokens,
        "cached_tokens": stay.admitted.num_cached_tokens,
    }
    return facts | ({} if stay.left is None else {"left": stay.left.detail or stay.left.kind.value})


def _queue(queue: HeadWaits, known: list[Life], clock: _Clock) -> Iterator[Json]:
    for wait in queue.waits:
        end_s = clock.end_s if wait.end_s is None else wait.end_s
        who = {"request_id": wait.event.request_id, "choice": wait.event.choice}
        yield clock.slice(QUEUE, HEAD, wait.event.detail, wait.event.time_s, end_s, **who)
    number = 0
    for life in known:
        for pause in life.waits:
            number += 1
            # A plain "id" is one of the whole trace, and Perfetto then draws the waits outside the process they name.
            own_id = {"local": hex(number)}
            common = {"pid": QUEUE, "tid": WAITS, "cat": "queue", "id2": own_id, "name": life.request_id}
            end_s = clock.end_s if pause.end_s is None else pause.end_s
            yield common | {"ph": "b", "ts": clock(pause.start_s), "args": {"choice": life.choice}}
            yield common | {"ph": "e", "ts": clock(end_s)}
