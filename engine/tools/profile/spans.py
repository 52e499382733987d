"""This module holds a stopwatch for functions that call each other. It does not know what they do.

A span's own time is its time without the spans inside it, so that the own times of a tree add up to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Event", "PartTime", "Spans"]


class Event(Protocol):
    """A moment on a device, as `torch.cuda.Event` has it."""

    def record(self) -> None:
        """Note the moment at which the device gets here."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds until another moment, once the device has been there."""
        ...


@dataclass(slots=True)
class PartTime:
    """What the spans of one name took together."""

    seconds: float = 0.0
    """Own time on the host."""
    num_calls: int = 0
    device_s: float = 0.0
    """Own time between moments on the device, where there is one."""


@dataclass(slots=True)
class _Span:
    name: str
    begin: Event | None
    begin_s: float = 0.0
    end_s: float = 0.0
    end: Event | None = None
    inner: list[_Span] = field(default_factory=list)


class Spans:
    """Times wrapped functions.

    Args:
        make_event: makes moments of a device; None: host time alone.
        clock: seconds.
    """

    def __init__(
        self, make_event: Callable[[], Event] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.scope: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
        """Entered around every span, by its name: how a profiler learns of it."""
        self._make_event = make_event
        self._clock = clock
        self._open: list[_Span] = []
        self._roots: list[_Span] = []

    def wrap(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a span around each call; `name` may depend on its arguments."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._span(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return timed

    def take(self) -> tuple[float, dict[str, PartTime]]:
        """Return the seconds since the last time that lie within spans, and each part's own; then forget them.

        The device, where there is one, must have come to its end.
        """
        assert not self._open, "no span is open"
        parts: dict[str, PartTime] = {}
        total_s = sum(root.end_s - root.begin_s for root in self._roots)
        waiting, self._roots = self._roots, []
        while waiting:
            span = waiting.pop()
            part = parts.setdefault(span.name, PartTime())
            part.num_calls += 1
            part.seconds += span.end_s - span.begin_s - sum(each.end_s - each.begin_s for each in span.inner)
            part.device_s += _device_s(span) - sum(map(_device_s, span.inner))
            waiting += span.inner
        return total_s, parts

    def _span(self, name: str) -> _Opened:
        return _Opened(self, name)


class _Opened:
    """One call: a class, as a generator would cost a microsecond more."""

    __slots__ = ("_name", "_scope", "_span", "_spans")

    def __init__(self, spans: Spans, name: str) -> None:
        self._spans = spans
        self._name = name

    def __enter__(self) -> None:
        spans = self._spans
        self._scope = spans.scope(self._name)
        self._scope.__enter__()
        self._span = span = _Span(self._name, None if spans._make_event is None else spans._make_event())
        (spans._open[-1].inner if spans._open else spans._roots).append(span)
        spans._open.append(span)
        if span.begin is not None:
            span.begin.record()
        span.begin_s = spans._clock()

    def __exit__(self, *error: Any) -> None:
        spans, span = self._spans, self._span
        span.end_s = spans._clock()
        if spans._make_event is not None:
            span.end = spans._make_event()
            span.end.record()
        assert spans._open.pop() is span, "spans nest"
        self._scope.__exit__(*error)


def _device_s(span: _Span) -> float:
    return 0.0 if span.begin is None or span.end is None else span.begin.elapsed_time(span.end) / 1e3
