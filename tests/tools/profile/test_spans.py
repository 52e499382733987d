"""This module checks the stopwatch on a clock of its own. It does not know an engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from octavo.engine.tools.profile.spans import PartTime, Spans


class Time:
    """A clock that goes on when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


class Moment:
    """A device's event, on a device that needs three times as long as its host."""

    def __init__(self, time: Time) -> None:
        self._time = time

    def record(self) -> None:
        self.at_ms = 3000 * self._time.now

    def elapsed_time(self, end: Moment) -> float:
        return end.at_ms - self.at_ms


def nested(spans: Spans, time: Time) -> Callable[[], None]:
    """Return a whole of 10 seconds: 3 in two leaves of different names, 4 in a branch with a leaf of 1 in it."""
    leaf = spans.wrap("leaf", time.spend)

    def branch() -> None:
        time.spend(3)
        leaf(1)

    def whole() -> None:
        time.spend(3)
        spans.wrap(lambda seconds: f"named {seconds}", time.spend)(2)
        leaf(1)
        spans.wrap("branch", branch)()

    return spans.wrap("whole", whole)


def test_own_times_add_up_to_the_whole() -> None:
    time = Time()
    spans = Spans(clock=time)
    nested(spans, time)()
    total, parts = spans.take()
    assert total == 10
    assert parts == {
        "whole": PartTime(3, 1),
        "named 2": PartTime(2, 1),
        "leaf": PartTime(2, 2),
        "branch": PartTime(3, 1),
    }
    assert spans.take() == (0, {})


def test_a_device_has_times_of_its_own() -> None:
    time = Time()
    spans = Spans(lambda: Moment(time), clock=time)
    nested(spans, time)()
    _, parts = spans.take()
    assert {name: part.device_s for name, part in parts.items()} == {"whole": 9, "named 2": 6, "leaf": 6, "branch": 9}


def test_an_error_passes_through_and_closes_its_spans() -> None:
    time = Time()
    spans = Spans(clock=time)

    def fail() -> None:
        time.spend(1)
        raise ValueError("it failed")

    outer = spans.wrap("outer", spans.wrap("inner", fail))
    with pytest.raises(ValueError, match="it failed"):
        outer()
    assert spans.take()[1]["inner"] == PartTime(1, 1)


def test_a_profiler_is_told_of_every_span() -> None:
    told: list[str] = []

    @contextmanager
    def scope(name: str) -> Any:
        told.append(f"+{name}")
        yield
        told.append(f"-{name}")

    def entered(name: str) -> AbstractContextManager[Any]:
        return scope(name)

    spans = Spans()
    spans.scope = entered
    spans.wrap("a", spans.wrap("b", lambda: None))()
    assert told == ["+a", "+b", "-b", "-a"]


def test_what_is_wrapped_returns_what_it_did() -> None:
    assert Spans().wrap("sum", lambda a, *, b: a + b)(1, b=2) == 3
