"""This module holds a connection that waits for nobody for ever. It does not know what is asked over it.

uvicorn's own limits concern idle connections and the size of headers. A client that sends a byte a minute, or that
never reads what it is sent, would hold its connection, and its request, for as long as it likes.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from typing import Any, AnyStr, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .errors import HTTPError, error_body
from .exchange import Receive, Scope, Send
from .settings import Limits

__all__ = ["CONNECTION", "Connection", "connection_class"]

CONNECTION = "octavo.connection"
"""Where a scope has its connection, if it came over one."""

OTHER_FILES = 32
"""That the process has open besides its connections."""
CRUMB_BYTES = 32
ANSWER_S = 3.0
"""For the application to say that a body came too slowly."""
MAX_CRUMBS = 1024
"""Pieces of a body that may be smaller than `CRUMB_BYTES` on average."""


class _Parser(h11.Connection):
    """h11, but for bodies in crumbs: a chunk of one byte costs as much time as one of many thousands."""

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self._num_pieces = self._num_bytes = 0
        self._sends_chunks = False

    def send(self, event: Any) -> Any:
        # Nearly all that a server of streams sends are chunks, which change nothing of h11's state: framed here they
        # cost less CPU. An empty one would end the body, and is h11's to leave out.
        if self._sends_chunks and type(event) is h11.Data and event.data:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        output = super().send(event)
        begins = isinstance(event, h11.Response)
        self._sends_chunks = begins and b"\r\nTransfer-Encoding: chunked\r\n" in (output or b"")
        return output

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                # Where one of two servers in a row goes by the one and one by the other, a request hides in a body.
                raise h11.RemoteProtocolError("a Content-Length beside a Transfer-Encoding", 400)
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > MAX_CRUMBS and self._num_bytes < CRUMB_BYTES * self._num_pieces:
                raise h11.RemoteProtocolError("the body comes in too many small pieces", 400)
        return event


class Connection(H11Protocol):
    """uvicorn's connection with a time for headers, bodies and writes."""

    limits: ClassVar[Limits] = Limits()
    max_connections: ClassVar[int] = limits.connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Parser(self.limits.header_bytes)
        routes = self.app

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope[CONNECTION] = self
            for name, slash in (("path", "/"), ("raw_path", b"/")):
                scope[name] = _without_origin(scope[name], slash)
            await routes(scope, receive, send)

        self.app = app
        self._reading: asyncio.TimerHandle | None = None
        self._awaited: type | None = None
        """The state of the client that the timer ends: before the end of its headers, or of its body."""
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(
                HTTPError(
                    503,
                    f"{self.max_connections} connections are open already",
                    code="too_many_connections",
                    headers=[("retry-after", "1")],
                )
            )
            return
        self._watch_reading(sent_something=True)

    async def write_chunk(self, data: bytes) -> None:
        """Send a piece, which may not be empty, of a body that has begun and is chunked."""
        if self.flow.write_paused:
            await self.flow.drain()
        self.write_now(data)

    @property
    def may_write(self) -> bool:
        """Whether the client reads what it is sent."""
        return not self.flow.write_paused

    def write_now(self, data: bytes) -> None:
        """Send a piece as `write_chunk` does, whether the client reads or not.

        It goes past h11, whose checks of each piece cost as much as all else that a stream does for one.
        """
        if not self.cycle.disconnected:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        super().data_received(data)
        self._watch_reading(sent_something=True)

    def on_response_complete(self) -> None:
        """Make ready for the next request."""
        super().on_response_complete()
        self._watch_reading(sent_something=bool(self.conn.trailing_data[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self._stop_reading_timer()
        self.resume_writing()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the time in which the client must read something."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.limits.body_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; uvicorn calls this while it handles h11's exception, which knows the status."""
        error = sys.exc_info()[1]
        status = 400
        if isinstance(error, h11.RemoteProtocolError):
            # Of a transfer coding that nobody has h11 says 501, but the server has not failed.
            hint = error.error_status_hint
            status, msg = 400 if hint >= 500 else hint, f"this is no HTTP that is understood here: {error}"
        if status == 431:
            msg = f"the headers are too large; allowed: {self.limits.header_bytes} bytes"
        self._refuse(HTTPError(status, msg))

    def _should_upgrade(self) -> bool:
        # HTTP lets a server answer as if nothing had been proposed; uvicorn would advise to install a library as well.
        return False

    def _watch_reading(self, *, sent_something: bool) -> None:
        """Arm the timer for what the client still has to send, and disarm it once that is there."""
        state = self.conn.their_state
        if state not in (h11.IDLE, h11.SEND_BODY) or (state is h11.IDLE and not sent_something):
            self._stop_reading_timer()
        elif self._reading is None or self._awaited is not state:
            self._stop_reading_timer()
            self._awaited = state
            delay = self.limits.header_s if state is h11.IDLE else self.limits.body_s
            self._reading = self.loop.call_later(delay, self._too_slow)

    def _too_slow(self) -> None:
        if self.conn.our_state is not h11.IDLE:
            # The application answers a slow body itself, unless it does not read bodies at all. Its time begins now:
            # the loop may have been late, and its own timer be due at the same moment as this one.
            self._reading = self.loop.call_later(ANSWER_S, self.transport.abort)
        elif self.conn.trailing_data[0]:
            self._refuse(HTTPError(408, f"the headers were not complete after {self.limits.header_s:g} s"))
        else:
            self.transport.close()

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _refuse(self, error: HTTPError) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error_body(error)
            headers = [
                *error.headers,
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _without_origin(path: AnyStr, slash: AnyStr) -> AnyStr:
    """Return the path of a target that may be a whole URL, as one sends it to proxies: every server must take it."""
    if path.startswith(slash):
        return path
    scheme, _, rest = path.partition(slash + slash)
    is_url = scheme.lower() in ("http:", b"http:", "https:", b"https:")
    return slash + rest.partition(slash)[2] if is_url else path


def connection_class(limits: Limits) -> type[Connection]:
    """Return the class of connections with these limits, for uvicorn to make.

    The process may open more files from now on, if it could not open enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = wanted if soft == resource.RLIM_INFINITY else soft
    max_connections = max(1, min(limits.connections, room - OTHER_FILES))
    return type("LimitedConnection", (Connection,), {"limits": limits, "max_connections": max_connections})
