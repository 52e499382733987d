"""This module holds a light client of OpenAI-compatible servers that notes when each piece of an answer came. It does
not know what is measured.

The machine is often shared with the server, so the client must cost little: h11 takes 5 µs of CPU for a chunk and json
2, on a 2.6 GHz Xeon.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import h11

from ..errors import ConfigError, describe

__all__ = ["Answer", "ServerError", "StreamClient"]

MAX_ERROR_BYTES = 4096
"""Of a refusal's body, how much is looked at."""


class ServerError(Exception):
    """A request that got no answer; says why."""


@dataclass(slots=True)
class Answer:
    """What came of one streamed request. Times are seconds of `time.monotonic`."""

    start_s: float = 0.0
    """The request began, before its connection was there."""
    piece_times_s: list[float] = field(default_factory=list)
    """When each chunk with text came."""
    end_s: float = 0.0
    """When the last chunk with a choice came."""
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    """What the server says it was; None: it says nothing. The same below."""
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    error: str = ""
    """Why it failed, if it did."""
    is_over: bool = False


class StreamClient:
    """Sends requests and reads answers, over as many connections as there are requests at once.

    To be used as a context, which closes them.

    Args:
        base_url: of the server, with or without /v1 at its end.
        api_key: sent as a bearer token.
        timeout_s: most seconds for one request.

    Raises:
        ConfigError: base_url is none.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        try:
            url = urlsplit(base_url)
            port = url.port
        except ValueError:
            url, port = urlsplit(""), None
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ConfigError(f"--base-url is {describe(base_url)}; allowed: such as http://127.0.0.1:8000")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.timeout_s = timeout_s
        self._host = url.hostname
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._port = port or (443 if self._tls is not None else 80)
        self._folder = url.path.rstrip("/").removesuffix("/v1")
        self._headers = [("host", url.netloc.rpartition("@")[2]), ("accept", "*/*"), ("user-agent", "octavo-bench")]
        if api_key is not None:
            self._headers.append(("authorization", f"Bearer {api_key}"))
        self._idle: list[_Connection] = []

    async def json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """GET a path, or POST a body to it, and return the JSON of the answer.

        Raises:
            ServerError: there is none, or it is a refusal.
        """
        pieces: list[bytes] = []
        await self._exchange(path, body, pieces.append)
        try:
            return json.loads(b"".join(pieces))
        except ValueError:
            raise ServerError(f"{path} is not answered in JSON") from None

    async def stream(self, path: str, body: Mapping[str, Any], answer: Answer) -> None:
        """POST a body that asks for a stream and read it into an answer; a failure is told there, never raised."""
        answer.start_s = time.monotonic()
        events = _Events(answer)
        try:
            await self._exchange(path, body, events.receive)
            if not events.is_done:
                answer.error = answer.error or "the stream ended without [DONE]"
        except ServerError as error:
            answer.error = answer.error or str(error)
        answer.is_over = True

    async def __aenter__(self) -> StreamClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            self._idle.pop().abort()
        # The loop closes aborted sockets in its next turn.
        await asyncio.sleep(0)

    async def _exchange(self, path: str, body: Mapping[str, Any] | None, receive: Callable[[bytes], object]) -> None:
        """Send a request and hand on the pieces of its answer's body as they come."""
        request = self._request(path, body)
        try:
            async with asyncio.timeout(self.timeout_s):
                while True:
                    is_fresh = not self._idle
                    connection = await self._connect() if is_fresh else self._idle.pop()
                    try:
                        await connection.exchange(request, receive)
                    except _UnansweredError:
                        # A server may close an idle connection just as it is used again.
                        if is_fresh:
                            raise ServerError("the server closed the connection without an answer") from None
                        continue
                    finally:
                        if connection.is_reusable:
                            self._idle.append(connection)
                    return
        except TimeoutError:
            raise ServerError(f"no complete answer within {self.timeout_s:g} s") from None
        except (OSError, h11.ProtocolError) as error:
            raise ServerError(f"{self.base_url}: {_short(error)}") from None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls))[1]

    def _request(self, path: str, body: Mapping[str, Any] | None) -> list[h11.Event]:
        headers = self._headers
        events: list[h11.Event] = []
        if body is not None:
            data = json.dumps(body).encode()
            headers = [*headers, ("content-type", "application/json"), ("content-length", str(len(data)))]
            events.append(h11.Data(data=data))
        method = "GET" if body is None else "POST"
        return [h11.Request(method=method, target=self._folder + path, headers=headers), *events, h11.EndOfMessage()]


class _UnansweredError(Exception):
    """The connection was closed before the answer's first byte."""


class _Connection(asyncio.Protocol):
    """One connection. Answers are taken apart as they arrive, with no task to wake for each piece."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[None] | None = None
        self._receive: Callable[[bytes], object] = bytes
        self._status = 0
        self._refusal = b""

    @property
    def is_reusable(self) -> bool:
        assert self._transport is not None, "it is connected"
        return self._http.our_state is h11.IDLE and not self._transport.is_closing()

    async def exchange(self, request: list[h11.Event], receive: Callable[[bytes], object]) -> None:
        """Send a request and wait for the end of its answer.

        Raises:
            ServerError: it is a refusal.
        """
        assert self._transport is not None, "it is connected"
        if self._transport.is_closing():
            raise _UnansweredError
        self._answered = asyncio.get_running_loop().create_future()
        self._receive, self._status, self._refusal = receive, 0, b""
        try:
            self._transport.write(b"".join(self._http.send(event) or b"" for event in request))
            await self._answered
        finally:
            if not self.is_reusable:
                self.abort()
        if self._status != 200:
            raise ServerError(_refusal(self._status, self._refusal))

    def abort(self) -> None:
        assert self._transport is not None, "it is connected"
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "it is a stream"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            while self._take(self._http.next_event()):
                pass
        except h11.ProtocolError as error:
            self._fail(error)

    def eof_received(self) -> None:
        if self._status:
            # Where a body has no length, this is its end.
            self.data_received(b"")

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(_UnansweredError() if self._status == 0 else error or ConnectionError("the connection was closed"))

    def _take(self, event: Any) -> bool:
        """Take in one event; return whether there may be another."""
        if isinstance(event, h11.Data):
            if self._status == 200:
                self._receive(bytes(event.data))
            elif len(self._refusal) < MAX_ERROR_BYTES:
                self._refusal += event.data
        elif isinstance(event, h11.Response):
            self._status = event.status_code
        elif isinstance(event, h11.EndOfMessage):
            if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
                self._http.start_next_cycle()
            if self._answered is not None and not self._answered.done():
                self._answered.set_result(None)
            return False
        return not (event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed))

    def _fail(self, error: Exception) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(error)


class _Events:
    """Reads server-sent events into an answer."""

    def __init__(self, answer: Answer) -> None:
        self.is_done = False
        self._rest = b""
        """What is no whole line yet."""
        self._answer = answer

    def receive(self, data: bytes) -> None:
        now = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    def _take(self, data: bytes, now: float) -> None:
        answer = self._answer
        if data == b"[DONE]":
            self.is_done = True
            return
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                answer.error = answer.error or _message(chunk)
                return
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or choice
                if delta.get("text") or delta.get("content") or delta.get("reasoning_content"):
                    answer.piece_times_s.append(now)
                answer.end_s = now
                answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            if usage := chunk.get("usage"):
                answer.num_prompt_tokens = usage.get("prompt_tokens")
                answer.num_output_tokens = usage.get("completion_tokens")
                answer.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        except (ValueError, AttributeError, TypeError):
            answer.error = answer.error or f"the stream has an event that is no chunk of an answer: {data[:80]!r}"


def _refusal(status: int, body: bytes) -> str:
    try:
        text = _message(json.loads(body))
    except (ValueError, AttributeError, TypeError):
        text = body.decode(errors="replace").strip()[:200]
    return f"status {status}: {text}" if text else f"status {status}"


def _message(body: Any) -> str:
    error = body.get("error", body)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _short(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
