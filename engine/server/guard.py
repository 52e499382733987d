"""This module holds what every request passes first, and how it is accounted for. It does not know routes.

It is plain ASGI around the application: nothing stands between a stream's chunks and the connection.
"""

from __future__ import annotations

import logging
import re
import time
import traceback
from collections.abc import Callable
from uuid import uuid4

from starlette.types import ASGIApp

from ..observe.metrics import Metrics
from .access import Access
from .body import Disconnected, send_error
from .errors import HTTPError, as_http_error, printable
from .exchange import Exchange, Message, Receive, Scope, Send
from .settings import Limits

__all__ = ["Guard"]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))
"""Others are counted together: each value of a metric's label is kept for ever."""
_LOG = logging.getLogger("octavo.server")


class Guard:
    """Checks sizes, ids and keys, turns errors into OpenAI's body, and writes one line per request.

    Args:
        app: the routes.
        limits: of the headers.
        access: who may ask.
        is_open: whether everybody may ask for a path.
        handler_of: the pattern of the route that has served a scope.
        metrics: counts requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        access: Access,
        is_open: Callable[[str], bool],
        handler_of: Callable[[Scope], str],
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._limits = limits
        self._access = access
        self._is_open = is_open
        self._handler_of = handler_of
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(uuid4().hex)
        scope["octavo.exchange"] = exchange

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", exchange.request_id.encode())]
            await send(message)

        try:
            self._check(scope, exchange)
            await self._app(scope, receive, send_counted)
        except Disconnected:
            exchange.ended_by = "the client has gone"
        except Exception as error:
            known = as_http_error(error) or _unexpected(error, exchange)
            exchange.ended_by = "" if not exchange.status else printable(str(known))
            # Once a response has begun only its stream could tell; what failed after that is the log's.
            if not exchange.status:
                await send_error(receive, send_counted, known)
        finally:
            self._account(scope, exchange)

    def _check(self, scope: Scope, exchange: Exchange) -> None:
        headers = scope["headers"]
        if len(headers) > self._limits.headers:
            raise HTTPError(431, f"there are {len(headers)} headers; allowed: {self._limits.headers}")
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in headers)
        if size > self._limits.header_bytes:
            raise HTTPError(431, f"the headers have {size} bytes; allowed: {self._limits.header_bytes}")
        by_name = dict(headers)
        given = by_name.get(b"x-request-id")
        if given is not None:
            if not _REQUEST_ID.fullmatch(given.decode("latin-1")):
                allowed = "1 to 128 of letters, digits, . _ : and -"
                raise HTTPError(
                    400, f"the header X-Request-Id is not allowed; allowed: {allowed}", param="X-Request-Id"
                )
            exchange.request_id = given.decode()
        if not self._is_open(scope["path"]):
            exchange.cache_domain = self._access.check(by_name)

    def _account(self, scope: Scope, exchange: Exchange) -> None:
        seconds, method = time.monotonic() - exchange.started_s, scope["method"]
        known_method = method if method in _METHODS else "other"
        self._metrics.observe_http(known_method, self._handler_of(scope), exchange.status, seconds)
        _LOG.info(
            "%s %s %s %d, %d + %d tokens, %.3f s%s",
            exchange.request_id,
            printable(method[:16]),
            printable(scope["path"][:200]),
            exchange.status,
            exchange.num_prompt_tokens,
            exchange.num_output_tokens,
            seconds,
            f" ({exchange.ended_by})" if exchange.ended_by else "",
        )


def _unexpected(error: Exception, exchange: Exchange) -> HTTPError:
    # The stack and the kind of error, not its words: they may quote a prompt.
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    _LOG.error("%s: %s in %s", exchange.request_id, type(error).__name__, where)
    return HTTPError(500, f"the server has failed; its log has more under {exchange.request_id}", code="internal_error")
