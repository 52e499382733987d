"""This module holds how two steps differ, and how that is said. It does not know how either came about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .script import POOL_FIELDS, SEQUENCE_FIELDS, Facts, Script

__all__ = ["Difference", "first_difference", "table"]

TITLES = {
    "error": "the scheduler raised an error",
    "preempted": "who is preempted",
    "admitted": "who is admitted",
    "rows": "who runs, and how many tokens",
    "waits": "why the head of the queue waits",
    "sampled": "who gets a token",
    "finished": "who ends",
    "num_waiting": "how many wait",
    "num_free_blocks": "how many blocks are free",
    "num_cached_blocks": "how many blocks are cached",
}
MAX_NAMED = 5
NUM_BEFORE = 3
NUM_AFTER = 2


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing in which a replay is not what was recorded."""

    place: int
    """Of the step in the script."""
    field: str
    recorded: Facts
    here: Facts

    @property
    def only_recorded(self) -> list[Any]:
        """What was so in the recording and is not so here; the value, where it is one."""
        return _without(self.recorded.get(self.field), self.here.get(self.field))

    @property
    def only_here(self) -> list[Any]:
        """The other way round."""
        return _without(self.here.get(self.field), self.recorded.get(self.field))

    def lines(self, script: Script) -> list[str]:
        """Say it in words: what differs, then both sides."""
        title = TITLES[self.field]
        if self.field == "error":
            return [f"{title}: {self.here['error']}"]
        return [
            title,
            *(f"  {side:<9} {words}" for side, words in zip(("recorded", "here"), self.words(script), strict=True)),
        ]

    def words(self, script: Script) -> tuple[str, str]:
        """Return both sides in words, without what they have in common."""
        sides = (self.only_recorded, self.only_here)
        if sides == ([], []):
            sides = (list(self.recorded[self.field]), list(self.here[self.field]))
            return f"{_words(script, self.field, sides[0])}, in this order", f"{_words(script, self.field, sides[1])}"
        return _words(script, self.field, sides[0]), _words(script, self.field, sides[1])

    def matches(self, other: Difference) -> bool:
        """Whether this is what another is, or part of it."""
        parts = ((self.only_recorded, other.only_recorded), (self.only_here, other.only_here))
        return self.field == other.field and all(each in whole for part, whole in parts for each in part)


def first_difference(place: int, recorded: Facts, here: Facts) -> Difference | None:
    """Compare what a step did; of the recorded facts those that are there.

    Args:
        place: of the step.
        recorded: its facts by field.
        here: all facts, and "error" where the scheduler raised one.
    """
    if here.get("error") and "rows" not in here:
        return Difference(place, "error", recorded, here)
    for name in (*SEQUENCE_FIELDS, *POOL_FIELDS):
        if name in recorded and recorded[name] != here.get(name):
            return Difference(place, name, recorded, here)
    return Difference(place, "error", recorded, here) if here.get("error") else None


def table(script: Script, difference: Difference) -> list[list[str]]:
    """Return the steps around a difference as rows of text, their heads first."""
    rows = [["step", "", "rows", "tokens", "sampled", "waiting", "free", "cached", "admitted", "preempted"]]
    place = difference.place
    for i in range(max(0, place - NUM_BEFORE), min(len(script.steps), place + NUM_AFTER + 1)):
        step = script.steps[i]
        rows.append([f"{step.event.step:,}", "recorded" if i == place else "", *_cells(script, step.facts)])
        if i == place:
            rows.append(["", "here", *_cells(script, difference.here)])
    return rows


def _cells(script: Script, facts: Facts) -> list[str]:
    def names(field: str) -> str:
        entries = facts.get(field, [])
        more = f" +{len(entries) - 2}" if len(entries) > 2 else ""
        return ", ".join(script.name(entry[0]) for entry in entries[:2]) + more

    if "rows" not in facts:
        return [""] * 8
    counts = [str(len(facts["rows"])), f"{sum(count for _, count in facts['rows']):,}", str(len(facts["sampled"]))]
    pool = [f"{facts[name]:,}" if name in facts else "" for name in POOL_FIELDS]
    return [*counts, *pool, names("admitted"), names("preempted")]


def _without(entries: Any, others: Any) -> list[Any]:
    if not isinstance(entries, list):
        return [] if entries is None or entries == others else [entries]
    return [entry for entry in entries if entry not in (others or ())]


def _words(script: Script, field: str, entries: list[Any]) -> str:
    if not entries:
        return "nobody" if field in SEQUENCE_FIELDS else "nothing"
    said = [_entry(script, field, entry) for entry in entries[:MAX_NAMED]]
    more = [f"and {len(entries) - MAX_NAMED} more"] if len(entries) > MAX_NAMED else []
    return ", ".join(said + more)


def _entry(script: Script, field: str, entry: Any) -> str:
    if field in POOL_FIELDS:
        return f"{entry:,}"
    name, rest = script.name(entry[0]), entry[1:]
    match field:
        case "preempted":
            return f"{name} (gives up {rest[0]:,} tokens)"
        case "admitted":
            return f"{name} ({rest[1]:,} of {rest[0]:,} tokens cached)"
        case "rows":
            return f"{name} runs {rest[0]:,}"
        case "waits":
            return f"{name} ({rest[0]})"
    return name
