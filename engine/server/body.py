"""This module holds the way of bodies: JSON in, JSON out. It does not know what they mean."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from ..strict_json import parse_json
from .errors import HTTPError, error_body
from .exchange import Exchange, Receive, Scope, Send
from .settings import Limits

__all__ = ["Disconnected", "read_object", "send_error", "send_json", "send_response"]

_LINGER_S = 2.0
_MANY_BYTES = 64 << 10
"""Parsing more takes longer than other clients should wait."""


class Disconnected(Exception):  # noqa: N818 (not an error: there is nobody left to tell)
    """The client has gone."""


async def read_object(scope: Scope, receive: Receive, limits: Limits) -> dict[str, Any]:
    """Read the body of a request, which must be one JSON object.

    Raises:
        HTTPError: it is too large, too slow, compressed, not declared as JSON, or no such object.
        Disconnected: the client has gone.
    """
    headers = dict(scope["headers"])
    _check_content_type(headers.get(b"content-type", b"").decode("latin-1"))
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise HTTPError(415, "the Content-Encoding is not allowed; allowed: none, or identity")
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and len(declared) < 20 and int(declared) > limits.body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_s):
            body = await _read(receive, limits)
    except TimeoutError:
        raise HTTPError(
            408, f"the body was not complete after {limits.body_s:g} s", headers=[("connection", "close")]
        ) from None
    Exchange.of(scope).num_body_bytes = len(body)
    max_parts = limits.body_parts
    return await asyncio.to_thread(_parse, body, max_parts) if len(body) > _MANY_BYTES else _parse(body, max_parts)


def _parse(body: bytes, max_parts: int) -> dict[str, Any]:
    try:
        value = parse_json(body.decode(), max_parts=max_parts)
    except UnicodeDecodeError as error:
        raise HTTPError(400, f"the body is no UTF-8 at byte {error.start}", code="invalid_json") from None
    except ValueError as error:
        raise HTTPError(400, f"the body is no valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise HTTPError(400, "the body is no JSON object", code="invalid_json")
    return value


async def _read(receive: Receive, limits: Limits) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > limits.body_bytes:
            raise _too_large(limits)
    return b"".join(parts)


def _too_large(limits: Limits) -> HTTPError:
    return HTTPError(
        413, f"the body is too large; allowed: {limits.body_bytes} bytes", headers=[("connection", "close")]
    )


def _check_content_type(value: str) -> None:
    kind, *parameters = (part.strip().lower() for part in value.split(";"))
    if kind != "application/json" or any(part not in ("", "charset=utf-8", 'charset="utf-8"') for part in parameters):
        raise HTTPError(415, "the Content-Type is not allowed; allowed: application/json, in UTF-8")


async def send_response(
    send: Send, status: int, body: bytes, content_type: str, headers: Sequence[tuple[str, str]] = ()
) -> None:
    """Send a whole response."""
    await _send_start(send, status, content_type, [*headers, ("content-length", str(len(body)))])
    await send({"type": "http.response.body", "body": body})


async def _send_start(send: Send, status: int, content_type: str, headers: Sequence[tuple[str, str]]) -> None:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in (("content-type", content_type), *headers)]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


async def send_json(send: Send, value: object, status: int = 200) -> None:
    """Send a value as JSON."""
    await send_response(send, status, msgspec.json.encode(value), "application/json")


async def send_error(receive: Receive, send: Send, error: HTTPError) -> None:
    """Send an error; what is left of a body that was refused is read and thrown away for a moment.

    A connection closed on a client that is still writing is reset, and the client never reads why.
    """
    body = error_body(error)
    await _send_start(send, error.status, "application/json", [*error.headers, ("content-length", str(len(body)))])
    if error.status == 413:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            async with asyncio.timeout(_LINGER_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except TimeoutError:
            pass
        body = b""
    await send({"type": "http.response.body", "body": body})
