"""A tiny OpenAI-compatible server on asyncio, whose answers and faults a test chooses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Reply = Callable[[Mapping[str, Any]], "list[bytes] | tuple[int, Any]"]
"""A request's body -> what to send, piece by piece, or a status and JSON."""


def chunk(text: str, finish_reason: str | None = None, *, is_chat: bool = False) -> bytes:
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
    choice |= {"delta": {"content": text}} if is_chat else {"text": text}
    return b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"


def usage(num_prompt: int, num_output: int, num_cached: int | None = None) -> bytes:
    details = {} if num_cached is None else {"prompt_tokens_details": {"cached_tokens": num_cached}}
    told = {"prompt_tokens": num_prompt, "completion_tokens": num_output, **details}
    return b"data: " + json.dumps({"id": "x", "choices": [], "usage": told}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def answer(body: Mapping[str, Any]) -> list[bytes]:
    """Answer as asked for: one token per chunk, as many prompt tokens as words."""
    is_chat = "messages" in body
    prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
    num_prompt, num_output = len(prompt.split() if isinstance(prompt, str) else prompt), body["max_tokens"]
    pieces = [chunk(" a", is_chat=is_chat) for _ in range(num_output)]
    return [*pieces, chunk("", "length", is_chat=is_chat), usage(num_prompt, num_output), DONE]


@dataclass
class StandIn:
    """A running server."""

    url: str
    reply: Reply = answer
    delay_s: float = 0.0
    """Before each piece."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of the requests so far, warm-ups left out."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of the last request."""
    num_connections: int = 0
    num_open: int = 0
    """Requests under way."""
    max_open: int = 0
    """The most there were."""
    hangs_up: bool = False
    """Close the next connection that a request comes on, without an answer."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) != b"":
                path, body = await self._read(head, reader)
                if self.hangs_up:
                    self.hangs_up = False
                    return
                await self._answer(path, body, writer)
        except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _read(self, head: bytes, reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]]:
        first, *lines = head.decode().strip().split("\r\n")
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(self.headers.get("content-length", 0)))
        return first.split()[1], json.loads(body) if body else {}

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            sent: list[bytes] | tuple[int, Any] = (200, {"data": [{"id": "stand-in"}]})
        elif path == "/tokenize":
            sent = (200, {"count": len(body["prompt"].split())})
        else:
            is_warm_up = body.get("prompt") == "The" or body.get("messages") == [{"role": "user", "content": "The"}]
            if not is_warm_up:
                self.bodies.append(body)
            sent = answer(body) if is_warm_up else self.reply(body)
        if isinstance(sent, tuple):
            data = json.dumps(sent[1]).encode()
            writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (sent[0], len(data), data))
            await writer.drain()
            return
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in sent:
            await asyncio.sleep(self.delay_s)
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        writer.write(b"0\r\n\r\n")
        self.num_open -= 1
        await writer.drain()


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Run a server in a thread of this process."""
    loop = asyncio.new_event_loop()
    server = StandIn("")
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(server.serve, "127.0.0.1", 0), loop).result(30)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:

        async def end() -> None:
            listening.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
