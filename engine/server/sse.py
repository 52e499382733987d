"""This module holds a response in server-sent events. It does not know what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from .connection import CONNECTION, Connection
from .errors import HTTPError, error_body
from .exchange import Message, Scope, Send

__all__ = ["DONE", "EventStream", "event"]

DONE = b"data: [DONE]\n\n"
_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}


def event(value: object) -> bytes:
    """Return a value as one event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventStream:
    """Sends events, and comments when there are none for a while, so that neither side takes the other for dead.

    Nothing is sent before the first event, so that an error until then still has a status of its own; a comment is the
    first only where the work has begun.

    Args:
        scope, send: of ASGI.
        ping_s: time without an event, seconds.
        has_begun: whether the status may be sent although there is no event yet.
    """

    def __init__(self, scope: Scope, send: Send, ping_s: float, has_begun: Callable[[], bool] = lambda: True) -> None:
        self._send = send
        connection = scope.get(CONNECTION) if scope["http_version"] == "1.1" and scope["method"] != "HEAD" else None
        self._connection: Connection | None = connection
        self._write_chunk = self._send_body if connection is None else connection.write_chunk
        self._ping_s = ping_s
        self._has_begun = has_begun
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._timer = self._loop.call_later(ping_s, self._tick)
        self._ping: asyncio.Task[None] | None = None
        self.started = False

    async def write(self, events: bytes) -> None:
        """Send events that are ready to go."""
        self._last_s = self._loop.time()
        if self._ping is not None:
            await self._ping
        if not self.started:
            await self._start()
        await self._write_chunk(events)

    @property
    def may_write(self) -> bool:
        """Whether `write_now` may be called, while nobody waits in another method."""
        return self._ping is None and self._connection is not None and self._connection.may_write

    def write_now(self, events: bytes) -> None:
        """Send events without a task that may wait."""
        assert self._connection is not None, "nothing but a connection takes what is not waited for"
        self._last_s = self._loop.time()
        self._connection.write_now(events)

    async def end(self) -> None:
        """Send the end of the response."""
        if self._ping is not None:
            await self._ping
        if not self.started:
            await self._start()
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: HTTPError) -> None:
        """End a response that has begun with an error event, and without the event that says it is complete."""
        await self.write(b"data: " + error_body(error) + b"\n\n")
        await self.end()

    def close(self) -> None:
        """Stop the comments."""
        self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()

    async def _start(self) -> None:
        self.started = True
        await self._send({**_START, "headers": list(_START["headers"])})

    def _tick(self) -> None:
        rest_s = self._last_s + self._ping_s - self._loop.time()
        if rest_s <= 0 and self._has_begun():
            if self._ping is None:
                self._ping = self._loop.create_task(self._comment())
            self._last_s = self._loop.time()
        self._timer = self._loop.call_later(rest_s if rest_s > 0 else self._ping_s, self._tick)

    async def _comment(self) -> None:
        if not self.started:
            await self._start()
        await self._write_chunk(b": ping\n\n")
        self._ping = None

    async def _send_body(self, events: bytes) -> None:
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
