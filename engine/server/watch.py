"""This module holds what ends a request early: its client, its time or the server. It does not know its work."""

from __future__ import annotations

import asyncio
from types import TracebackType

from .body import Disconnected
from .errors import HTTPError
from .exchange import Receive

__all__ = ["Watch"]


class Watch:
    """Cancels the task that has entered it, and raises in its place why.

    Args:
        receive: says when the client has gone; the body must have been read.
        limit_s: for all the work.

    Raises:
        Disconnected, HTTPError: from the `with` block, when it was cancelled from here.
    """

    def __init__(self, receive: Receive, limit_s: float) -> None:
        self._receive = receive
        self._limit_s = limit_s
        self._task: asyncio.Task[object] | None = None
        self._reason: Exception | None = None

    async def __aenter__(self) -> Watch:
        self._task = asyncio.current_task()
        self._listener = asyncio.create_task(self._listen())
        late = HTTPError(504, f"the request took longer than {self._limit_s:g} s", code="timeout")
        self._timer = asyncio.get_running_loop().call_later(self._limit_s, self.end, late)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        self._timer.cancel()
        self._listener.cancel()
        if self._reason is not None and task is not None:
            # Without uncancel a later timeout in the same task would take this cancellation for its own.
            task.uncancel()
            if isinstance(error, asyncio.CancelledError):
                raise self._reason from None

    def end(self, reason: Exception) -> None:
        """End the work for a reason; the first one counts, and none after the work is done."""
        if self._task is not None and self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end(Disconnected())
