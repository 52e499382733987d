"""This module holds the queue in front of the engine: who may join it, and how long one may wait. It does not run it.

A request is in the queue from here until the engine says that it has admitted it, so the events of the engine count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import RequestError
from ..events import EventKind, RequestEvent, StepEvent
from .errors import RETRY, HTTPError
from .settings import Limits
from .watch import Watch

__all__ = ["Admission", "Ticket"]


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place in the queue, and then in the engine."""

    watch: Watch
    waiting: dict[str, int]
    """Engine's id -> tokens, of those of its prompts that wait."""
    num_sequences: int
    """For each prompt."""
    admitted: bool = False
    """The engine has begun with one of its prompts."""
    is_sent: bool = False
    """The engine knows no other request of its ids any more: what it says of them concerns this one."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Admission:
    """Bounds the queue and knows all requests that are being answered. A `Recorder` of the engine's events."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tickets: set[Ticket] = set()
        self._waiting: dict[str, Ticket] = {}
        self._ids: set[str] = set()
        self.num_texts = 0
        """Requests whose texts become tokens, or wait for that."""
        self._num_text_bytes = 0
        self.num_waiting = 0
        """Sequences."""
        self.num_waiting_tokens = 0
        self.closed: HTTPError | None = None
        """Why nobody is let in any more."""

    @property
    def num_active(self) -> int:
        """Requests that are being answered."""
        return len(self._tickets)

    def is_active(self, engine_id: str) -> bool:
        """Whether a prompt of this id waits or is being answered."""
        return engine_id in self._ids

    @contextmanager
    def enter(self, watch: Watch, num_tokens: dict[str, int], num_sequences: int) -> Iterator[Ticket]:
        """Give a request its place for as long as the block lasts.

        Args:
            watch: ends the request.
            num_tokens: of each prompt, by the id under which the engine will know it.
            num_sequences: for each prompt.

        Raises:
            HTTPError: 409 where one of the ids is being answered already, 429 where the queue is full, 503 where the
                server is closing.
            RequestError: the request alone is more than the queue takes.
        """
        if not self._ids.isdisjoint(num_tokens):
            raise HTTPError(409, "a request of this X-Request-Id is being answered already", param="X-Request-Id")
        self._check_room(len(num_tokens) * num_sequences, sum(num_tokens.values()))
        ticket = Ticket(watch, dict(num_tokens), num_sequences)
        late = HTTPError(
            503,
            f"the request has waited {self._limits.queue_s:g} s for its turn",
            code="queue_timeout",
            headers=[RETRY],
        )
        ticket.timer = asyncio.get_running_loop().call_later(self._limits.queue_s, watch.end, late)
        self._tickets.add(ticket)
        self._ids.update(num_tokens)
        self._waiting.update(dict.fromkeys(num_tokens, ticket))
        self.num_waiting += len(num_tokens) * num_sequences
        self.num_waiting_tokens += sum(num_tokens.values())
        try:
            yield ticket
        finally:
            ticket.timer.cancel()
            self._tickets.discard(ticket)
            self._ids.difference_update(num_tokens)
            for engine_id in num_tokens:
                self._take_from_queue(engine_id, ticket)

    @contextmanager
    def encoding(self, num_bytes: int) -> Iterator[None]:
        """Give a request's texts their place among those that become tokens, for as long as the block lasts.

        Args:
            num_bytes: of its body.

        Raises:
            HTTPError: 429 where too many wait for that, 503 where the server is closing.
        """
        self._check_open()
        limits, full = self._limits, None
        if self.num_texts >= limits.queue_requests:
            full = f"{self.num_texts} texts wait already; allowed: {limits.queue_requests}"
        elif self.num_texts and self._num_text_bytes + num_bytes > limits.queue_text_bytes:
            full = f"{self._num_text_bytes} bytes of texts wait already; allowed: {limits.queue_text_bytes}"
        if full is not None:
            raise _queue_full(full)
        self.num_texts += 1
        self._num_text_bytes += num_bytes
        try:
            yield
        finally:
            self.num_texts -= 1
            self._num_text_bytes -= num_bytes

    def close(self, reason: HTTPError) -> None:
        """Let nobody in any more."""
        self.closed = self.closed or reason

    def end_all(self, reason: HTTPError) -> None:
        """End everything that is being answered."""
        for ticket in list(self._tickets):
            ticket.watch.end(reason.again())

    def on_request(self, event: RequestEvent) -> None:
        """Take what the engine did with a sequence."""
        ticket = self._waiting.get(event.request_id)
        if event.kind is EventKind.ADMITTED and ticket is not None and ticket.is_sent:
            self._take_from_queue(event.request_id, ticket)

    def on_step(self, event: StepEvent) -> None:
        """Take a step of the engine."""

    def _take_from_queue(self, engine_id: str, ticket: Ticket) -> None:
        if self._waiting.get(engine_id) is not ticket:
            return
        del self._waiting[engine_id]
        ticket.admitted = True
        if ticket.timer is not None:
            ticket.timer.cancel()
        self.num_waiting -= ticket.num_sequences
        self.num_waiting_tokens -= ticket.waiting.pop(engine_id)

    def _check_room(self, num_sequences: int, num_tokens: int) -> None:
        self._check_open()
        limits = self._limits
        if num_sequences > limits.queue_requests:
            allowed = f"prompts times n of at most {limits.queue_requests}"
            raise RequestError(f"the request has {num_sequences} sequences; allowed: {allowed}", "n")
        if num_tokens > limits.queue_tokens:
            allowed = f"at most {limits.queue_tokens} in all prompts"
            raise RequestError(f"the request has {num_tokens} prompt tokens; allowed: {allowed}", "prompt")
        full = None
        if self.num_waiting + num_sequences > limits.queue_requests:
            full = f"{self.num_waiting} sequences wait already; allowed: {limits.queue_requests}"
        elif self.num_waiting_tokens + num_tokens > limits.queue_tokens:
            full = f"{self.num_waiting_tokens} prompt tokens wait already; allowed: {limits.queue_tokens}"
        if full is not None:
            raise _queue_full(full)

    def _check_open(self) -> None:
        if self.closed is not None:
            raise self.closed.again()


def _queue_full(why: str) -> HTTPError:
    return HTTPError(429, f"the queue is full: {why}", code="queue_full", headers=[RETRY])
