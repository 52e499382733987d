"""This module holds a client that says exactly what it is told, byte by byte. It does not know what HTTP allows."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from .serving import WAIT_S, Running

__all__ = ["Response", "connect", "get", "post", "read_response", "send"]


class Response(NamedTuple):
    """What came back before the server closed, or the response was complete."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error."""
        value = json.loads(self.body)
        assert value.keys() == {"error"}
        assert value["error"].keys() == {"message", "type", "param", "code"}
        error: dict[str, Any] = value["error"]
        return error


def connect(running: Running, *, receive_bytes: int | None = None) -> socket.socket:
    """Return a connection; `receive_bytes` makes the kernel keep little of what is not read."""
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(WAIT_S)
    sock.connect(running.address)
    return sock


def send(running: Running, data: bytes) -> Response:
    """Send bytes on a connection of their own and read the response."""
    with connect(running) as sock:
        sock.sendall(data)
        return read_response(sock)


def get(running: Running, path: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Response:
    """Ask for a path."""
    return send(running, _head(running, method, path, headers or {}) + b"\r\n")


def post(
    running: Running, path: str, body: object, headers: Mapping[str, str] | None = None, *, method: str = "POST"
) -> Response:
    """Send a body: bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", "Content-Length": str(len(data))} | dict(headers or {})
    return send(running, _head(running, method, path, given) + b"\r\n" + data)


def _head(running: Running, method: str, path: str, headers: Mapping[str, str]) -> bytes:
    every = {"Host": "{}:{}".format(*running.address), "Connection": "close"} | dict(headers)
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in every.items()), ""]
    return "\r\n".join(lines).encode("latin-1")


def read_response(sock: socket.socket) -> Response:
    """Read until the server closes or the declared length is there."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(65536)
        assert part, f"the connection was closed after {data!r}"
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers["content-length"]) if "content-length" in headers else None
    while length is None or len(body) < length:
        part = sock.recv(65536)
        if not part:
            break
        body += part
    assert length is None or len(body) == length, "the body was cut off"
    return Response(int(status_line.split()[1]), headers, body)
