"""This module holds a client that calls the application without a socket. It does not know what it sends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.types import ASGIApp

__all__ = ["Answer", "ask"]


class Answer(NamedTuple):
    """What an application sent."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any] | None:
        """OpenAI's error, where it is one."""
        if self.status == 200:
            return None
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


async def ask(
    app: ASGIApp,
    path: str,
    body: bytes | None = None,
    *,
    method: str | None = None,
    num_parts: int = 1,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Send one request and return the whole answer.

    Args:
        app: the application.
        path: with no query.
        body: None makes it a GET.
        method: instead of GET or POST.
        num_parts: in how many pieces the body comes.
        headers: besides the host, and that it is JSON.
    """
    every = {"host": "localhost", "content-type": "application/json"} | dict(headers or {})
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "path": path,
        "raw_path": path.encode(errors="surrogatepass"),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in every.items()],
    }
    data = body or b""
    size = -(-len(data) // num_parts) or 1
    parts = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    sent: list[Any] = []

    async def receive() -> Any:
        if parts:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *rest = sent
    assert start["type"] == "http.response.start"
    assert all(message["type"] == "http.response.body" for message in rest)
    assert not rest[-1].get("more_body")
    given = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], given, b"".join(message.get("body", b"") for message in rest))
