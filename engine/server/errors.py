"""This module holds how a request is refused over HTTP: a status and OpenAI's error body. It does not know routes."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.exceptions import HTTPException

from ..errors import BusyError, EngineDeadError, OctavoError, RequestError

__all__ = ["RETRY", "HTTPError", "as_http_error", "error_body", "printable"]

RETRY = ("retry-after", "1")
"""A header: what is full now may have room in a second."""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class HTTPError(OctavoError):
    """A request ends with this status.

    Args:
        status: of the response.
        message: what is wrong and what is allowed.
        param: the field at fault.
        code: a short name for programs.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.status = status
        self.param = param
        self.code = code
        self.headers = tuple(headers)
        super().__init__(message)

    def again(self) -> HTTPError:
        """Return the same, not yet raised: one that is raised twice keeps both stacks, and what they hold, alive."""
        return HTTPError(self.status, str(self), param=self.param, code=self.code, headers=self.headers)

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


def as_http_error(error: Exception) -> HTTPError | None:
    """Return what a known error is over HTTP; None for one that nobody expected."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, BusyError):
        return HTTPError(429, str(error), param=error.param, code="queue_full", headers=[RETRY])
    if isinstance(error, RequestError):
        return HTTPError(400, str(error), param=error.param)
    if isinstance(error, HTTPException):
        allowed = (error.headers or {}).get("Allow")
        message = f"there is no such method here; allowed: {allowed}" if allowed else "there is no such path"
        return HTTPError(error.status_code, message, headers=[("allow", allowed)] if allowed else [])
    if isinstance(error, EngineDeadError):
        return HTTPError(503, str(error), code="engine_dead")
    return None


def error_body(error: HTTPError) -> bytes:
    """Return OpenAI's error body."""
    return msgspec.json.encode(
        {
            "error": {
                "message": printable(str(error)),
                "type": error.type,
                "param": None if error.param is None else printable(error.param),
                "code": error.code,
            }
        }
    )


def printable(text: str) -> str:
    """Return a text as it may be sent and logged: lone surrogates and control characters escaped."""
    text = text.encode(errors="backslashreplace").decode()
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
