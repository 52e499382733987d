"""This module holds the ring as JSON: what the page shows live, what it opens from a file, and how a file is read back.
It does not know HTTP.

A step is a row of `STEP_FIELDS`, an event a row of `EVENT_FIELDS`; both lists are in every message, so that a reader
needs no other document. Three things are short because they repeat:

    rows                    null where they are those of the step before it in the same list
    num_scheduled_tokens    a number where every row ran so many
    sampled                 null where every row got a token

Version 2 holds all that the schedule depended on, so that it can be run again (`octavo.engine.tools.replay`), version 3
whether steps overlap and what was sampled in vain. Files of older versions are read with defaults for what they lack.

Blocks are runs [count, state, count, state, ...] over blocks 1 to num_blocks, states as in `BlockState`. Times are
seconds, rounded to microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from ..config import EngineConfig
from ..errors import ConfigError, describe
from ..events import OWES_LOGPROBS, BlockState, EventKind, KVSnapshot, Moment, RequestEvent, StepEvent, WaitReason
from ..step import FinishReason
from ..strict_json import parse_json
from .ring import EventRing

__all__ = [
    "EVENT_FIELDS",
    "STEP_FIELDS",
    "Recording",
    "dumps",
    "event_rows",
    "from_json",
    "loads",
    "schedule_facts",
    "snapshot_json",
    "step_rows",
    "to_json",
]

VERSION = 3
STEP_FIELDS = StepEvent._fields
EVENT_FIELDS = RequestEvent._fields
_NUM_FIELDS = {1: (12, 10), 2: (14, 14), VERSION: (len(STEP_FIELDS), len(EVENT_FIELDS))}
"""By version: how many fields of a step and of an event there are."""
_STEP_TIMES = ("start_s", "execute_s", "update_s", "end_s")
_DETAILS: dict[EventKind, tuple[str, ...]] = {
    EventKind.ARRIVED: ("", OWES_LOGPROBS),
    EventKind.WAITS: tuple(reason.value for reason in WaitReason),
    EventKind.FINISHED: tuple(reason.value for reason in FinishReason),
}
_MAX_ROW = 1 << 16
_MAX_TOKENS = 1 << 31
_MAX_BLOCKS = 1 << 24

Json = dict[str, Any]


class Recording(NamedTuple):
    """A recording that was read back."""

    facts: dict[str, str | int | float | bool | None]
    """Of the model and the engine, by name; "num_blocks" and "block_size" are among them."""
    ring: EventRing
    is_complete: bool
    """Whether the ring held the whole run when it was written."""
    version: int = VERSION
    """Of the form it was written in."""


def schedule_facts(config: EngineConfig, *, overlap: bool) -> Json:
    """Return the settings, beside sizes, that a schedule depends on, as facts of a recording.

    Args:
        config: the settings.
        overlap: see `ResolvedConfig`.
    """
    return {
        "prefix_caching": config.cache.prefix_caching,
        "policy": config.scheduler.policy,
        "preempt_every": config.faults.preempt_every,
        "miss_prefix_cache": config.faults.miss_prefix_cache,
        "overlap": overlap,
    }


def step_rows(steps: Iterable[StepEvent]) -> list[list[Any]]:
    """Return steps as rows of `STEP_FIELDS`."""
    rows: list[list[Any]] = []
    before: npt.NDArray[np.int32] | None = None
    for event in steps:
        counts, num_seqs = event.num_scheduled_tokens, len(event.rows)
        is_same = before is not None and (before is event.rows or np.array_equal(before, event.rows))
        is_uniform = num_seqs > 0 and bool((counts == counts[0]).all())
        rows.append(
            [
                event.step,
                *(round(getattr(event, name), 6) for name in _STEP_TIMES),
                None if is_same else event.rows.tolist(),
                int(counts[0]) if is_uniform else counts.tolist(),
                None if len(event.sampled) == num_seqs else event.sampled.tolist(),
                event.num_waiting,
                event.num_free_blocks,
                event.num_cached_blocks,
                event.failed,
                event.num_cache_resets,
                event.kin,
                event.num_wasted_tokens,
            ]
        )
        before = event.rows
    return rows


def event_rows(events: Iterable[RequestEvent]) -> list[list[Any]]:
    """Return what happened to sequences as rows of `EVENT_FIELDS`."""
    return [[event.kind.value, round(event.time_s, 6), *event[2:]] for event in events]


def block_runs(blocks: npt.NDArray[np.uint8]) -> list[int]:
    """Return block states as runs [count, state, ...]."""
    ends = np.append(np.flatnonzero(np.diff(blocks)), len(blocks) - 1)[: len(blocks)]
    return np.column_stack((np.diff(ends, prepend=-1), blocks[ends])).ravel().tolist()


def snapshot_json(snapshot: KVSnapshot) -> Json:
    """Return who holds what as JSON, for the live view."""
    counts = np.bincount(snapshot.blocks, minlength=len(BlockState)).tolist()
    return {
        "time_s": round(snapshot.time_s, 6),
        "blocks": block_runs(snapshot.blocks),
        "counts": {state.name.lower(): counts[state] for state in BlockState},
        "num_waiting": snapshot.num_waiting,
        "waiting": [sequence._asdict() for sequence in snapshot.waiting],
        "running": [sequence._asdict() for sequence in snapshot.running],
    }


def to_json(ring: EventRing, facts: Mapping[str, Any]) -> Json:
    """Return a ring with everything in it.

    Args:
        ring: what to keep; a copy, where another thread goes on filling it.
        facts: of the model and the engine: numbers, texts and truth values by name; others are left out.
    """
    plain = {name: value for name, value in facts.items() if value is None or isinstance(value, (str, int, float))}
    return {
        "octavo_recording": VERSION,
        "facts": plain,
        "is_complete": ring.is_complete,
        "step_fields": STEP_FIELDS,
        "steps": step_rows(ring.steps),
        "event_fields": EVENT_FIELDS,
        "events": event_rows(ring.events),
        "block_maps": [[round(time_s, 6), block_runs(blocks)] for time_s, blocks in ring.block_maps],
    }


def dumps(ring: EventRing, facts: Mapping[str, Any]) -> bytes:
    """Return `to_json` as compact UTF-8."""
    return json.dumps(to_json(ring, facts), separators=(",", ":"), allow_nan=False).encode()


def loads(data: bytes | str) -> Recording:
    """Read a recording back.

    Raises:
        ConfigError: it is not one, or is damaged; names the place.
    """
    try:
        document = parse_json(data.decode() if isinstance(data, bytes) else data)
    except ValueError as error:
        raise ConfigError(f"the recording is not JSON: {error}") from None
    return from_json(document)


def from_json(document: Any) -> Recording:
    """Read a recording that was parsed already.

    Raises:
        ConfigError: it is not one, or is damaged; names the place.
    """
    fields = {
        "octavo_recording",
        "facts",
        "is_complete",
        "step_fields",
        "steps",
        "event_fields",
        "events",
        "block_maps",
    }
    if not isinstance(document, dict) or document.keys() != fields:
        _refuse("", document, f"an object with {', '.join(sorted(fields))}")
    version = document["octavo_recording"]
    if type(version) is not int or version not in _NUM_FIELDS:
        _refuse("octavo_recording", version, ", ".join(map(str, _NUM_FIELDS)))
    step_fields, event_fields = STEP_FIELDS[: _NUM_FIELDS[version][0]], EVENT_FIELDS[: _NUM_FIELDS[version][1]]
    for name, expected in (("step_fields", step_fields), ("event_fields", event_fields)):
        if document[name] != list(expected):
            _refuse(name, document[name], ", ".join(expected))
    facts, is_complete = document["facts"], document["is_complete"]
    if not isinstance(facts, dict) or not all(v is None or isinstance(v, (str, int, float)) for v in facts.values()):
        _refuse("facts", facts, "an object of plain values")
    if not isinstance(is_complete, bool):
        _refuse("is_complete", is_complete, "true or false")
    steps, events = _list("steps", document["steps"]), _list("events", document["events"])
    maps = _list("block_maps", document["block_maps"])
    ring = EventRing(max(1, len(steps)), max(1, len(events)), max(1, len(maps)))
    for event in _steps(steps, step_fields):
        ring.on_step(event)
    for i, row in enumerate(events):
        ring.on_request(_event(f"events[{i}]", row, event_fields))
    for i, row in enumerate(maps):
        time_s, runs = _list(f"block_maps[{i}]", row, 2)
        blocks = _blocks(f"block_maps[{i}][1]", runs)
        ring.on_snapshot(KVSnapshot(_time(f"block_maps[{i}][0]", time_s), blocks, 0, [], []))
    return Recording(facts, ring, is_complete, version)


def _steps(rows: Sequence[Any], fields: Sequence[str]) -> Iterable[StepEvent]:
    before: StepEvent | None = None
    for i, row in enumerate(rows):
        where = f"steps[{i}]"
        values = dict(zip(fields, _list(where, row, len(fields)), strict=True))
        for name in _STEP_TIMES:
            values[name] = _time(f"{where}.{name}", values[name])
        if sorted(times := [values[name] for name in _STEP_TIMES]) != times:
            _refuse(where, times, "four times in order")
        for name in ("step", "num_waiting", "num_free_blocks", "num_cached_blocks"):
            _int(f"{where}.{name}", values[name], 0, _MAX_TOKENS)
        if before is not None and values["step"] != before.step + 1:
            _refuse(f"{where}.step", values["step"], f"{before.step + 1}, the one after the last")
        if values["rows"] is None and before is not None:
            values["rows"] = before.rows
        else:
            values["rows"] = _ints(f"{where}.rows", values["rows"], 0, _MAX_ROW)
        num_seqs, counts, sampled = len(values["rows"]), values["num_scheduled_tokens"], values["sampled"]
        counts = [counts] * num_seqs if type(counts) is int else counts
        sampled = list(range(num_seqs)) if sampled is None else sampled
        values["num_scheduled_tokens"] = _ints(f"{where}.num_scheduled_tokens", counts, 1, _MAX_TOKENS)
        values["sampled"] = _ints(f"{where}.sampled", sampled, 0, num_seqs)
        if len(counts) != num_seqs:
            _refuse(f"{where}.num_scheduled_tokens", counts, f"{num_seqs} numbers")
        _text(f"{where}.failed", values["failed"])
        _int(f"{where}.num_cache_resets", values.setdefault("num_cache_resets", 0), 0, _MAX_TOKENS)
        values["kin"] = _kin(f"{where}.kin", values.get("kin", []), 4)
        _int(f"{where}.num_wasted_tokens", values.setdefault("num_wasted_tokens", 0), 0, _MAX_TOKENS)
        before = StepEvent(**values)
        yield before


def _event(where: str, row: Any, fields: Sequence[str]) -> RequestEvent:
    values = dict(zip(fields, _list(where, row, len(fields)), strict=True))
    kinds = [kind.value for kind in EventKind]
    if values["kind"] not in kinds:
        _refuse(f"{where}.kind", values["kind"], ", ".join(kinds))
    values["kind"] = EventKind(values["kind"])
    values["time_s"] = _time(f"{where}.time_s", values["time_s"])
    for name, low, end in (("step", -1, _MAX_TOKENS), ("row", -1, _MAX_ROW)):
        _int(f"{where}.{name}", values[name], low, end)
    for name in ("choice", "num_tokens", "num_cached_tokens", "max_tokens"):
        _int(f"{where}.{name}", values[name], 0, _MAX_TOKENS)
    if values["kind"] in (EventKind.ADMITTED, EventKind.PREEMPTED) and values["row"] < 0:
        _refuse(f"{where}.row", values["row"], "its row")
    _text(f"{where}.request_id", values["request_id"])
    if values["detail"] not in _DETAILS.get(values["kind"], ("",)):
        _refuse(f"{where}.detail", values["detail"], "a reason of its kind")
    if values.get("moment", "") not in list(Moment):
        _refuse(f"{where}.moment", values["moment"], "'', flight, flights, update")
    values["moment"] = Moment(values.get("moment", ""))
    _int(f"{where}.serial", values.setdefault("serial", -1), -1, _MAX_TOKENS)
    _int(f"{where}.priority", values.setdefault("priority", 0), -(1 << 63), 1 << 63)
    values["kin"] = _kin(f"{where}.kin", values.get("kin", []), 3)
    return RequestEvent(**values)


def _kin(where: str, value: Any, length: int) -> tuple[int, ...]:
    numbers: list[int] = _ints(where, value, 0, _MAX_TOKENS).tolist()
    if len(numbers) % length or any(
        first >= end for first, end in zip(numbers[length - 2 :: length], numbers[length - 1 :: length], strict=True)
    ):
        _refuse(where, value, f"{length} numbers for each run of blocks")
    return tuple(numbers)


def _blocks(where: str, runs: Any) -> npt.NDArray[np.uint8]:
    pairs = _ints(where, runs, 0, _MAX_BLOCKS + 1)
    if len(pairs) % 2 or (pairs[1::2] >= len(BlockState)).any() or pairs[::2].sum() > _MAX_BLOCKS:
        _refuse(where, runs, "runs of a count and a state")
    return np.repeat(pairs[1::2].astype(np.uint8), pairs[::2])


def _list(where: str, value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        _refuse(where, value, "a list" if length is None else f"a list of {length}")
    return value


def _ints(where: str, value: Any, low: int, end: int) -> npt.NDArray[np.int32]:
    items = _list(where, value)
    if set(map(type, items)) - {int} or (items and not low <= min(items) <= max(items) < end):
        _refuse(where, value, f"integers from {low} to {end - 1}")
    return np.array(items, dtype=np.int32)


def _int(where: str, value: Any, low: int, end: int) -> None:
    if type(value) is not int or not low <= value < end:
        _refuse(where, value, f"an integer from {low} to {end - 1}")


def _time(where: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e12:
        _refuse(where, value, "seconds")
    return float(value)


def _text(where: str, value: Any) -> None:
    if not isinstance(value, str):
        _refuse(where, value, "a text")


def _refuse(where: str, value: Any, allowed: str) -> NoReturn:
    raise ConfigError(f"the recording{where and '.' + where} is {describe(value)}; allowed: {allowed}")
