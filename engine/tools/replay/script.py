"""This module holds what a recording says of a run, put so that the run can be repeated: by step what came from
outside, how sequences ended, and what the scheduler made of it. It does not know the scheduler's insides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

from ...config import FaultConfig
from ...errors import ConfigError, describe
from ...events import EventKind, Moment, RequestEvent, StepEvent
from ...observe.recording import Recording, from_json
from ...scheduler import SchedulerLimits
from ...strict_json import parse_json

__all__ = ["POOL_FIELDS", "SEQUENCE_FIELDS", "Facts", "Owners", "Script", "ScriptStep", "facts_of", "read_bundle"]

SEQUENCE_FIELDS = ("preempted", "admitted", "rows", "waits", "sampled", "finished")
"""What a step did to sequences: lists of tuples that begin with the sequence's serial."""
KNOWN_ALONE = tuple(name for name in SEQUENCE_FIELDS if name != "waits")
"""Those that a sequence has of its own."""
POOL_FIELDS = ("num_waiting", "num_free_blocks", "num_cached_blocks")
"""What was left when it was over."""
SHRUNK_TO = "shrunk_to"
"""The fact that says in what the last step of a recording that was made small differed: of others nothing is known."""
MAX_SLOTS = 1 << 31
"""Rows times longest sequence, or blocks times their size: what may be taken in address space, in tokens."""

_SCHEDULED = (EventKind.WAITS, EventKind.ADMITTED, EventKind.PREEMPTED)
_NUM_OUT = {Moment.BETWEEN: 0, Moment.FLIGHT: 1, Moment.FLIGHTS: 2}
"""Steps that were out."""

Facts = dict[str, Any]
Node = tuple[int, int]
"""A block by its content: who was first to have it, and which of that sequence's blocks it is."""


class Owners:
    """Who is behind a request id and a row, as events go by."""

    def __init__(self) -> None:
        self.alive: dict[tuple[str, int], int] = {}
        self.rows: dict[int, int] = {}

    def known(self, event: RequestEvent) -> RequestEvent | None:
        """Return an event with its sequence's serial, or None where the sequence's arrival has left the ring."""
        key = (event.request_id, event.choice)
        if event.kind == EventKind.ARRIVED:
            self.alive[key] = event.serial
        serial = self.alive.get(key)
        if serial is None:
            return None
        if event.kind == EventKind.ADMITTED:
            self.rows[event.row] = serial
        elif event.kind == EventKind.FINISHED:
            del self.alive[key]
        return event._replace(serial=serial)


def facts_of(
    event: StepEvent | None, scheduled: Iterable[RequestEvent], ends: Iterable[RequestEvent], owners: Owners
) -> Facts:
    """Return what a step did, by field, with sequences named by their serials."""
    facts: Facts = {name: [] for name in SEQUENCE_FIELDS}
    for each in scheduled:
        match each.kind:
            case EventKind.PREEMPTED:
                facts["preempted"].append((each.serial, each.num_tokens))
            case EventKind.ADMITTED:
                facts["admitted"].append((each.serial, each.num_tokens, each.num_cached_tokens))
            case _:
                facts["waits"].append((each.serial, each.detail))
    # Why, and with how many tokens, a front may have said otherwise: of a stop string in the last of them, say.
    facts["finished"] = [(each.serial,) for each in ends]
    if event is not None:
        serials = [owners.rows.get(row, -1) for row in event.rows.tolist()]
        facts["rows"] = list(zip(serials, event.num_scheduled_tokens.tolist(), strict=True))
        facts["sampled"] = [(serials[place],) for place in event.sampled.tolist()]
        facts |= {name: getattr(event, name) for name in POOL_FIELDS}
    return facts


@dataclass(frozen=True, slots=True)
class ScriptStep:
    """One step: what to feed the scheduler, and what it did when it was recorded."""

    event: StepEvent
    before: list[RequestEvent] = field(default_factory=list)
    """Arrivals and ends from outside since the step before."""
    scheduled: list[RequestEvent] = field(default_factory=list)
    flight: list[RequestEvent] = field(default_factory=list)
    """The same as `before`, while it was out, and nothing else or nothing else yet."""
    flights: list[RequestEvent] = field(default_factory=list)
    """The same, while the step after it was out as well."""
    ends: list[RequestEvent] = field(default_factory=list)
    facts: Facts = field(default_factory=dict)

    def without(self, serials: Collection[int], also: str = "") -> ScriptStep:
        """Leave out some sequences, and what cannot be known without them: the pool, and why others wait.

        Args:
            serials: of those to leave out.
            also: a field of the facts to keep all the same.
        """

        def kept(entries: list[Any], serial: Callable[[Any], int] = attrgetter("serial")) -> list[Any]:
            return [entry for entry in entries if serial(entry) not in serials]

        facts = {
            name: kept(self.facts[name], itemgetter(0)) for name in SEQUENCE_FIELDS if name in {*KNOWN_ALONE, also}
        }
        facts |= {name: self.facts[name] for name in POOL_FIELDS if name == also}
        return ScriptStep(
            self.event,
            kept(self.before),
            kept(self.scheduled),
            kept(self.flight),
            kept(self.flights),
            kept(self.ends),
            facts,
        )


@dataclass(frozen=True, slots=True)
class Script:
    """A recorded run from its beginning, or from a moment when nothing was under way."""

    limits: SchedulerLimits
    facts: Mapping[str, Any]
    """Of the recording."""
    steps: Sequence[ScriptStep]
    arrivals: Mapping[int, RequestEvent]
    """By serial."""
    kin: dict[int, list[tuple[int, int, int]]]
    """By serial: runs (owner, first, end) of its blocks that somebody else had before, each owner's own."""
    previous: StepEvent | None = None
    """The step before the first, where what was cached then must be guessed from what was found later, so that the
    number of cached blocks is not compared. None: there was none, and the cache was empty."""

    @classmethod
    def of(cls, recording: Recording) -> Script:
        """Read what a recording says.

        Raises:
            ConfigError: it does not say enough.
        """
        if recording.version < 2:
            raise ConfigError(
                "the recording is of version 1, which does not say which prompts share blocks; record again with this "
                "version of octavo"
            )
        steps, events = list(recording.ring.steps), list(recording.ring.events)
        if not steps:
            raise ConfigError("the recording has no steps; record while requests run, or after")
        limits = _limits(recording.facts)
        first_event, previous = 0, None
        if not recording.is_complete or steps[0].step != 0:
            first_event = _quiet_moment(steps, events)
            number = events[first_event].step
            previous = steps[number - steps[0].step - 1]
            steps = steps[number - steps[0].step :]
        return cls._put_together(limits, recording.facts, steps, events[first_event:], previous)

    @classmethod
    def _put_together(
        cls,
        limits: SchedulerLimits,
        facts: Mapping[str, Any],
        events_of_steps: list[StepEvent],
        events: list[RequestEvent],
        previous: StepEvent | None,
    ) -> Script:
        owners, start, kin = Owners(), events_of_steps[0].step, dict[int, list[tuple[int, int, int]]]()
        steps = [ScriptStep(event) for event in events_of_steps]
        script = cls(limits, facts, steps, {}, kin, previous)
        arrivals: dict[int, RequestEvent] = {}
        upcoming = iter(events)
        pending = next(upcoming, None)
        for step in steps:
            # Events stand before the step in which they show; ends of a step behind it, before anything of the next.
            while pending is not None and _shows_in(pending) <= step.event.step:
                event = owners.known(pending)
                if event is None:
                    raise _damaged(pending.step, f"{describe(pending.request_id)} never arrived")
                place = steps[max(0, _shows_in(pending) - start)]
                if event.kind == EventKind.ARRIVED:
                    arrivals[event.serial] = event
                script._add_kin(event.serial, event.kin)
                _list_for(place, event, _shows_in(pending) < start).append(event)
                pending = next(upcoming, None)
            step.facts.update(facts_of(step.event, step.scheduled, [], owners))
            if any(serial < 0 for serial, _ in step.facts["rows"]):
                raise _damaged(step.event.step, "a row runs that nobody was admitted to")
            for i in range(0, len(step.event.kin), 4):
                script._add_kin(step.event.kin[i], step.event.kin[i + 1 : i + 4])
        # Where steps overlap, the one after the last was scheduled before the last was over.
        for late in [] if pending is None else [pending, *upcoming]:
            event, shows_in = owners.known(late), _shows_in(late)
            if event is not None:
                script._add_kin(event.serial, event.kin)
            if event is not None and shows_in < start + len(steps):
                if event.kind == EventKind.ARRIVED:
                    arrivals[event.serial] = event
                _list_for(steps[max(0, shows_in - start)], event, shows_in < start).append(event)
        for step in steps:
            step.facts["finished"] = [(event.serial,) for event in step.ends]
            if previous is not None:
                del step.facts["num_cached_blocks"]
        if SHRUNK_TO in facts:
            steps[-1] = steps[-1].without((), str(facts[SHRUNK_TO]))
        return replace(script, arrivals=arrivals)

    def _add_kin(self, serial: int, numbers: Sequence[int]) -> None:
        """Note whose blocks a sequence has, each by who was first to have it."""
        runs = self.kin.setdefault(serial, [])
        for owner, first, end in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            at = first
            for other, other_first, other_end in tuple(self.kin.get(owner, ())):
                low, high = max(other_first, at), min(other_end, end)
                if low < high:
                    if at < low:
                        runs.append((owner, at, low))
                    runs.append((other, low, high))
                    at = high
            if at < end:
                runs.append((owner, at, end))

    def node(self, serial: int, block: int) -> Node:
        """Return what is in a block of a sequence once it is full."""
        for owner, first, end in reversed(self.kin.get(serial, ())):
            if first <= block < end:
                return owner, block
        return serial, block

    @property
    def num_requests(self) -> int:
        """How many requests arrive, each with its choices."""
        return sum(event.choice == 0 for event in self.arrivals.values())

    def name(self, serial: int) -> str:
        """Return what a sequence is called in reports."""
        event = self.arrivals.get(serial)
        if event is None:
            return "an unknown sequence"
        return event.request_id if event.choice == 0 else f"{event.request_id} [{event.choice}]"

    def until(self, place: int) -> Script:
        """Leave out the steps after the one at `place`, and who arrives later."""
        steps = self.steps[: place + 1]
        arrived = {
            event.serial
            for step in steps
            for event in (*step.before, *step.flight, *step.flights)
            if event.kind == EventKind.ARRIVED
        }
        arrivals = {serial: event for serial, event in self.arrivals.items() if serial in arrived}
        return replace(self, steps=steps, arrivals=arrivals)

    def without(self, serials: Collection[int], field: str) -> Script:
        """Leave out some sequences, and the steps in which nobody else ran.

        Args:
            serials: of those to leave out.
            field: of the facts of the last step, which stays, keep this one whatever it is.
        """
        steps: list[ScriptStep] = []
        carried: list[RequestEvent] = []
        num_resets = 0
        last = len(self.steps) - 1
        for place, full in enumerate(self.steps):
            step = full.without(serials, field if place == last else "")
            if step.facts["rows"] or place == last:
                event = step.event._replace(num_cache_resets=num_resets + step.event.num_cache_resets)
                steps.append(replace(step, event=event, before=carried + step.before))
                carried, num_resets = [], 0
            else:
                carried += [*step.before, *step.flight]
                num_resets += step.event.num_cache_resets
        arrivals = {serial: event for serial, event in self.arrivals.items() if serial not in serials}
        facts = dict(self.facts) | {SHRUNK_TO: field}
        return replace(self, steps=steps, arrivals=arrivals, facts=facts)


def read_bundle(path: Path) -> Recording:
    """Read a recording, or the recording in a crash bundle.

    Raises:
        ConfigError: it is neither, or is damaged.
    """
    try:
        document = parse_json(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no recording: it is not JSON: {error}") from None
    if isinstance(document, dict) and "octavo_crash" in document:
        document = document.get("recording")
    return from_json(document)


def _damaged(step: int, why: str) -> ConfigError:
    return ConfigError(f"the recording is damaged: in step {step:,} {why}")


def _shows_in(event: RequestEvent) -> int:
    """Return the step to which an event belongs: what came from outside, to the next to come back."""
    if event.kind not in (EventKind.ARRIVED, EventKind.FINISHED) or event.moment == Moment.UPDATE:
        return event.step
    return event.step + (event.kind == EventKind.FINISHED) - _NUM_OUT[event.moment]


def _list_for(step: ScriptStep, event: RequestEvent, is_early: bool) -> list[RequestEvent]:
    """Return where in its step an event belongs.

    Args:
        step: it.
        event: the event.
        is_early: a step from before the script was out, of which nothing came.
    """
    if event.kind not in (EventKind.ARRIVED, EventKind.FINISHED):
        return step.scheduled
    if event.moment == Moment.UPDATE:
        return step.ends
    return (step.before, step.flight, step.flights)[_NUM_OUT[event.moment] - is_early]


def _limits(facts: Mapping[str, Any]) -> SchedulerLimits:
    """Return the settings a schedule depends on."""

    def fact(name: str, kind: type) -> Any:
        value = facts.get(name)
        if type(value) is not kind:
            raise ConfigError(f"the recording's {name} is {describe(value)}; a replay needs {kind.__name__}")
        return value

    sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks", "block_size")
    numbers = {name: fact(name, int) for name in sizes}
    slots = numbers["max_num_seqs"] * numbers["max_model_len"], numbers["num_blocks"] * numbers["block_size"]
    if max(slots) > MAX_SLOTS or numbers["num_blocks"] > 1 << 24:
        raise ConfigError(
            f"the recording's engine has {numbers}; allowed: {MAX_SLOTS} tokens in rows or blocks, {1 << 24} blocks"
        )
    if (policy := fact("policy", str)) not in ("fcfs", "priority"):
        raise ConfigError(f"the recording's policy is {describe(policy)}; allowed: fcfs, priority")
    faults = FaultConfig(fact("preempt_every", int), fact("miss_prefix_cache", bool))
    # The vocabulary is the replay's own: its tokens are names of blocks.
    return SchedulerLimits(
        vocab_size=1,
        prefix_caching=fact("prefix_caching", bool),
        policy=policy,
        faults=faults,
        max_steps_in_flight=2 if facts.get("overlap", False) else 1,
        **numbers,
    )


def _quiet_moment(steps: Sequence[StepEvent], events: Sequence[RequestEvent]) -> int:
    """Return the place of the first event after a moment when nothing ran or waited.

    Raises:
        ConfigError: there is none.
    """
    owners, last_unknown = Owners(), -1
    candidates: list[int] = []
    for place, event in enumerate(events):
        if event.kind == EventKind.ARRIVED and not owners.alive and event.step > steps[0].step:
            candidates.append(place)
        if owners.known(event) is None:
            last_unknown = place
    for place in candidates:
        number = events[place].step
        if place > last_unknown and number <= steps[-1].step:
            step = steps[number - steps[0].step]
            shown: list[RequestEvent] = []
            for event in islice(events, place, None):
                if _shows_in(event) > number + 1:
                    break
                # Where steps overlap, the next one is scheduled before this one is over.
                if _shows_in(event) == number or (event.kind in _SCHEDULED and event.time_s <= step.update_s):
                    shown.append(event)
            kinds = Counter(event.kind for event in shown)
            rows = {event.row for event in shown if event.kind == EventKind.ADMITTED}
            gone = sum(event.kind == EventKind.FINISHED and event.row < 0 for event in shown)
            waiting = kinds[EventKind.ARRIVED] + kinds[EventKind.PREEMPTED] - kinds[EventKind.ADMITTED] - gone
            # Whoever ran or waited all the time without an event would show here.
            if set(step.rows.tolist()) <= rows and step.num_waiting == waiting:
                return place
    raise ConfigError(
        f"the recording begins in the middle of a run, with step {steps[0].step:,}, and requests were under way all the"
        " time, so nobody knows what the scheduler had to start from; record sooner after the start, or after a pause"
    )
