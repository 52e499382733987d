"""This module holds a server in a process of its own and clients of it that are whole, cut short, slow or wrong. It
does not know how many there are, or for how long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from octavo.engine.process.fake import FAKE_ENGINE

from .soak_cases import Bad, Case

__all__ = [
    "GATHERING_ENGINE",
    "MOMENTS",
    "PACED_ENGINE",
    "WAIT_S",
    "Answer",
    "Client",
    "Moment",
    "Served",
    "get",
    "served",
]

WAIT_S = 120.0
"""For what takes seconds on a machine that does nothing else."""
STEADY_HEAP = {"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Pools and arenas keep what was freed, and are minutes in finding their sizes: they grew by 2 MB/min after one minute
and 0.8 after four where what was in use grew by 0.2."""
PACED_ENGINE = "soak_server:paced_engine"
GATHERING_ENGINE = "soak_server:gathering_engine"
SCRIPT = Path(__file__).with_name("soak_server.py")
Moment = Literal["connected", "headers", "body", "sent", "soon", "first", "later", "last"]
"""When a client leaves: before it has asked, in its headers or body, at once, while its prompt may be running, at the
first event, after some, or with nothing but the end of the stream to come."""
MOMENTS: Sequence[Moment] = get_args(Moment)


class Answer(NamedTuple):
    """What came back."""

    status: int
    """0: nothing."""
    body: bytes
    """As it came: of a stream with the sizes of its chunks between."""

    @property
    def is_whole_stream(self) -> bool:
        """Whether nothing is missing."""
        return self.body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    def events(self) -> list[dict[str, Any]]:
        """Return the events of a stream but the last; one that was cut in two is none."""
        lines = (line for line in self.body.split(b"\n\n")[:-1] if b"data: {" in line)
        return [json.loads(line[line.index(b"data: ") + 6 :]) for line in lines]


class Served:
    """A server's process."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, engine_pid: int) -> None:
        self._process = process
        self.address = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.pid, self.engine_pid = process.pid, engine_pid

    async def holdings(self, *, collect: bool = False) -> dict[str, int]:
        """Return what the server and its engine hold; see `soak_server.py`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"collect\n" if collect else b"tell\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), WAIT_S)
        assert line, "the server is gone"
        held: dict[str, int] = json.loads(line)
        return held

    async def until_idle(self) -> float:
        """Return once nobody holds anything; after how many seconds."""
        started = time.monotonic()
        names = ("blocks", "running", "waiting", "active", "queued", "streams")
        while True:
            held = await self.holdings()
            if not any(held[name] for name in names):
                return time.monotonic() - started
            assert time.monotonic() - started < WAIT_S, held

    async def metrics(self) -> dict[str, float]:
        """Return all metrics, by name and labels as they are written, without the model's."""
        text = (await get(self, "/metrics")).body.decode().replace('{model_name="served"}', "")
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {
            name.replace('model_name="served",', "").replace(',model_name="served"', ""): float(value)
            for name, _, value in lines
        }


@asynccontextmanager
async def served(
    engine: dict[str, Any],
    *,
    factory: str | None = FAKE_ENGINE,
    limits: dict[str, Any] | None = None,
    send_buffer_bytes: int | None = None,
    steady: bool = False,
) -> AsyncGenerator[Served, None]:
    """Serve for as long as the block lasts; see `soak_server.py`.

    Args:
        engine: its settings.
        factory: who builds it; None: from a model.
        limits: of the server.
        send_buffer_bytes: of the kernel, for each connection; None: its own choice.
        steady: let memory that grows be memory that leaks.
    """
    options = {
        "engine": engine,
        "factory": factory,
        "limits": limits or {},
        "send_buffer_bytes": send_buffer_bytes,
        "small_ring": steady,
    }
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(SCRIPT), json.dumps(options)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **STEADY_HEAP} if steady else None,
        )
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), WAIT_S)
            assert line, "the server has not started"
            url, engine_pid = line.split()
            yield Served(process, url.decode(), int(engine_pid))
            process.terminate()
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            errors.seek(0)
            said = errors.read().decode()
            assert said == "", said[-5000:]


async def get(server: Served, path: str) -> Answer:
    """Ask for a path."""
    reader, writer = await asyncio.open_connection(*server.address)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return await _read(reader)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, data: bytes = b"") -> Answer:
    with contextlib.suppress(ConnectionResetError):
        while part := await asyncio.wait_for(reader.read(1 << 16), WAIT_S):
            data += part
    return _parsed(data)


def _parsed(data: bytes) -> Answer:
    head, end, body = data.partition(b"\r\n\r\n")
    return Answer(int(head.split(b" ", 2)[1]) if end else 0, body)


class Client:
    """Sends requests, checks what comes back, and counts it.

    Args:
        server: to ask.
    """

    def __init__(self, server: Served) -> None:
        self._server = server
        self.statuses: Counter[int] = Counter()
        """Of requests that were not cut short."""
        self.reasons: Counter[str] = Counter()
        """Finish reasons of their choices."""
        self.kinds: Counter[str] = Counter()
        """What was done."""
        self.num_prompt_tokens = 0
        """As the engine counts them: once for each choice."""
        self.num_output_tokens = 0
        self.num_left_choices = 0
        """Of requests that were cut short."""

    def add(self, other: Client) -> None:
        """Count what another client has seen."""
        self.statuses += other.statuses
        self.reasons += other.reasons
        self.num_prompt_tokens += other.num_prompt_tokens
        self.num_output_tokens += other.num_output_tokens

    async def ask(self, rng: random.Random, case: Case) -> None:
        """Send a request and check the whole answer."""
        stream = rng.random() < 0.7
        async with self._connected() as (reader, writer):
            writer.write(_request(case.path, _body(case, rng, stream)))
            self._finish(case, await _read(reader), stream)
        self.kinds["streams" if stream else "whole answers"] += 1

    async def ask_together(self, case: Case, ready: asyncio.Barrier) -> None:
        """Stream an answer and check it; the request is complete once all others are nearly so, too."""
        async with self._connected() as (reader, writer):
            data = _request(case.path, case.body | {"stream": True, "stream_options": {"include_usage": True}})
            writer.write(data[:-1])
            await ready.wait()
            writer.write(data[-1:])
            self._finish(case, await _read(reader), True)

    async def dawdle(self, rng: random.Random, case: Case) -> None:
        """Stream an answer, read it in small pieces with rests between, and check it."""
        async with self._connected(receive_bytes=4096) as (reader, writer):
            writer.write(_request(case.path, _body(case, rng, True)))
            data = b""
            with contextlib.suppress(ConnectionResetError):
                while part := await asyncio.wait_for(reader.read(rng.randrange(1, 4000)), WAIT_S):
                    data += part
                    await asyncio.sleep(rng.random() * 0.01)
            self._finish(case, _parsed(data), True)
        self.kinds["slow readers"] += 1

    async def stall(self, case: Case, rest_s: float) -> None:
        """Stream a long answer, read the beginning, then nothing for a time in which the server may lose patience."""
        async with self._connected(receive_bytes=2048) as (reader, writer):
            writer.write(_request(case.path, case.body | {"stream": True}))
            data = await asyncio.wait_for(reader.read(500), WAIT_S)
            await asyncio.sleep(rest_s)
            answer = await _read(reader, data)
        if answer.is_whole_stream:
            self._finish(case, answer, True)
        else:
            assert answer.status == 200, answer
            _check_beginning(case, answer)
            self.num_left_choices += len(case.choices)
            self.kinds["readers cut off"] += 1
        self.kinds["readers that stall"] += 1

    async def stall_sending(self, case: Case, *, in_headers: bool) -> None:
        """Send a part of a request and wait for the server to end it."""
        async with self._connected() as (reader, writer):
            head, _, body = _request(case.path, case.body).partition(b"\r\n\r\n")
            writer.write(head if in_headers else head + b"\r\n\r\n" + body[: len(body) // 2])
            answer = await _read(reader)
            assert answer.status == 408, answer
            if not in_headers:
                self.statuses[408] += 1
        self.kinds["senders that stall"] += 1

    async def misbehave(self, bad: Bad) -> None:
        """Send a request that must be refused."""
        async with self._connected() as (reader, writer):
            writer.write(_request(bad.path, bad.body, bad.method, bad.headers))
            answer = await _read(reader)
            assert answer.status == bad.status, (bad, answer)
            assert json.loads(answer.body)["error"]["message"]
            self.statuses[bad.status] += 1
        self.kinds["bad requests"] += 1

    async def leave(self, rng: random.Random, case: Case, moment: Moment, **changes: Any) -> None:
        """Send a request and leave at some moment, politely or not; check what has come until then.

        `changes` of the request make its answers longer than the case's, but for who leaves at the end.
        """
        stream = moment not in ("sent", "soon") or rng.random() < 0.5
        body = _body(case, rng, stream) | ({} if moment == "last" else changes)
        data = _request(case.path, body)
        body_at = data.index(b"\r\n\r\n") + 4
        num_events = 1 if moment == "first" else rng.randrange(1, 30)
        async with self._connected(politely=rng.random() < 0.5) as (reader, writer):
            if moment == "headers":
                writer.write(data[: rng.randrange(1, body_at - 2)])
            elif moment == "body":
                writer.write(data[: rng.randrange(body_at, len(data))])
            elif moment != "connected":
                writer.write(data)
            received = b""
            if moment == "soon":
                await asyncio.sleep(rng.random() * 0.05)  # the moment is the case, nothing is waited for
            elif moment in ("first", "later", "last"):
                while not _has_come(received, moment, num_events, len(case.choices)):
                    part = await asyncio.wait_for(reader.read(1 << 16), WAIT_S)
                    if not part:
                        break
                    received += part
        if received:
            answer = _parsed(received)
            assert answer.status == 200, answer
            _check_beginning(case, answer)
        if moment not in ("connected", "headers", "body"):
            self.num_left_choices += len(case.choices)
        self.kinds["clients that leave"] += 1

    def _finish(self, case: Case, answer: Answer, stream: bool) -> None:
        """Check a whole answer and count it."""
        assert answer.status == 200, answer
        assert not stream or answer.is_whole_stream, answer.body[-1000:]
        parts = answer.events() if stream else [json.loads(answer.body)]
        _check_choices(case, parts, whole=True)
        usage = parts[-1].get("usage")
        num_tokens = sum(len(choice.token_ids) for choice in case.choices)
        if usage is not None:
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (case.num_prompt_tokens, num_tokens)
        self.statuses[200] += 1
        self.reasons.update(choice.finish_reason for choice in case.choices)
        self.num_prompt_tokens += case.num_sequence_prompt_tokens
        self.num_output_tokens += num_tokens

    @asynccontextmanager
    async def _connected(
        self, *, receive_bytes: int | None = None, politely: bool = True
    ) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter], None]:
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await asyncio.get_running_loop().sock_connect(sock, self._server.address)
        reader, writer = await asyncio.open_connection(sock=sock, limit=receive_bytes or 1 << 16)
        try:
            yield reader, writer
        finally:
            if not politely:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


def _request(path: str, body: object, method: str = "POST", headers: Sequence[str] = ()) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(data)}"]
    if not any(line.startswith("Content-Type") for line in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


def _body(case: Case, rng: random.Random, stream: bool) -> dict[str, Any]:
    """Return the request in one of the forms that do not change what is generated."""
    body = case.body | {"return_token_ids": rng.random() < 0.5}
    if rng.random() < 0.2:
        chat = "messages" in body
        body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    return body | ({"stream": True, "stream_options": {"include_usage": rng.random() < 0.5}} if stream else {})


def _has_come(received: bytes, moment: Moment, num_events: int, num_choices: int) -> bool:
    if b"data: [DONE]" in received:
        return True
    if moment == "last":
        return received.count(b'"finish_reason":"') >= num_choices
    return received.count(b"data: ") >= num_events


def _check_beginning(case: Case, answer: Answer) -> None:
    _check_choices(case, [part for part in answer.events() if "error" not in part], whole=False)


@dataclass(slots=True)
class _Got:
    """What the parts of an answer say of one choice."""

    text: str = ""
    num_token_ids: int = 0
    num_logprobs: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None


def _check_choices(case: Case, parts: Sequence[dict[str, Any]], *, whole: bool) -> None:
    """Compare what has come with what must come."""
    got = [_Got() for _ in case.choices]
    for part in parts:
        for choice in part["choices"]:
            mine, expected = got[choice["index"]], case.choices[choice["index"]]
            message = choice.get("delta") or choice.get("message") or {}
            mine.text += choice.get("text") or message.get("content") or ""
            mine.finish_reason = choice["finish_reason"] or mine.finish_reason
            mine.stop_reason = choice.get("stop_reason") or mine.stop_reason
            token_ids = choice.get("token_ids", [])
            known = expected.token_ids[mine.num_token_ids :][: len(token_ids)]
            assert token_ids[: len(known)] == known
            mine.num_token_ids += len(token_ids)
            if (logprobs := choice.get("logprobs")) is not None:
                mine.num_logprobs += len(logprobs["content"] if "content" in logprobs else logprobs["tokens"])
    for mine, expected in zip(got, case.choices, strict=True):
        num_tokens = len(expected.token_ids)
        if whole:
            assert mine.text == expected.text
            assert (mine.finish_reason, mine.stop_reason or None) == (expected.finish_reason, expected.stop_reason)
            assert mine.num_token_ids in (0, num_tokens)
            assert mine.num_logprobs in (0, num_tokens)
        else:
            size = min(len(mine.text), len(expected.text))
            assert mine.text[:size] == expected.text[:size]
            assert size == len(mine.text) or expected.finish_reason == "length"
