"""This module holds who waits for which answer, and what becomes of requests whose reader leaves. It does not know what
their parameters are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ..errors import BusyError, EngineDeadError, RequestError
from ..events import EventKind, RequestEvent
from ..step import FinishReason, RequestOutput
from ..text.output_processor import OutputProcessor
from .messages import Abort, Finish, News, ToEngine

__all__ = ["Push", "Reader", "Readers"]

Push = Callable[[RequestOutput], bool]
"""Takes news at once, or returns False and has changed nothing."""


class Reader:
    """One who reads one growing answer.

    Args:
        output: the answer.
        is_told_all: whether every token is news, or only the end.
        push: see `AsyncLLM.generate`.
    """

    __slots__ = ("_push", "_waiter", "error", "has_news", "is_told_all", "num_missed", "output")

    def __init__(self, output: RequestOutput, is_told_all: bool, push: Push | None = None) -> None:
        self.output = output
        self.is_told_all = is_told_all
        self._push = push
        self.has_news = False
        self.num_missed = 0
        """Times that news came since the reader last took some."""
        self.error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def answers(self) -> AsyncGenerator[RequestOutput, None]:
        """Yield the answer whenever there is news, until it is complete or the reader is failed."""
        loop = asyncio.get_running_loop()
        while True:
            if not self.has_news:
                if self.error is not None:
                    raise self.error
                self._waiter = loop.create_future()
                await self._waiter
                self._waiter = None
                continue
            self.has_news = False
            self.num_missed = 0
            # It may grow while the reader is away: only what was complete when it was told ends the stream.
            finished = self.output.finished
            yield self.output
            if finished:
                return

    def tell(self) -> None:
        """Wake the reader if it waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def takes(self) -> bool:
        """Offer the news to who has nothing else to do; whether that was all."""
        waits = self._waiter is not None and not self._waiter.done()
        if self._push is None or self.output.finished or not waits:
            return False
        try:
            return self._push(self.output)
        except Exception as error:
            self.fail(error)
            return True

    def fail(self, error: Exception) -> None:
        """End the stream, after what is still unread; the first error counts."""
        self.error = self.error or error
        self.tell()


class Readers:
    """All readers of one engine, by the id of their request.

    Args:
        send: takes messages to the engine.
        texts: makes answers of news.
        max_unread: a reader that is busy elsewhere while news come more often than this is ended.
    """

    def __init__(self, send: Callable[[ToEngine], None], texts: OutputProcessor, max_unread: int) -> None:
        self._send = send
        self._texts = texts
        self._max_unread = max_unread
        self._loop = asyncio.get_running_loop()
        self._readers: dict[str, Reader] = {}
        self._leaving: dict[str, list[asyncio.Future[None]]] = {}
        """Requests that the engine was told to abort and may still hold; who waits for it to say that it does not."""
        self._due: dict[str, Reader] = {}
        """Those who are told something when all messages that came together have been taken."""
        self._is_over = False
        self._none_left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._readers

    def add(self, output: RequestOutput, is_told_all: bool, push: Push | None = None) -> Reader:
        """Expect news of an answer that `texts` grows."""
        reader = self._readers[output.request_id] = Reader(output, is_told_all, push)
        return reader

    def remove(self, reader: Reader) -> None:
        """Forget a reader that is gone; where the engine may still run its request, tell it to stop."""
        request_id = reader.output.request_id
        del self._readers[request_id]
        self._texts.discard(request_id)
        runs = not reader.output.finished and reader.error is None and not self._is_over
        if runs and request_id not in self._leaving:
            self._send_abort(request_id)
        if not self._readers:
            self._none_left.set()

    async def abort(self, request_id: str) -> None:
        """End a request, and return once the engine has let go of it; its reader gets what there is."""
        reader = self._readers.get(request_id)
        if request_id not in self._leaving:
            if reader is None or reader.output.finished or self._is_over:
                return
            self._send_abort(request_id)
        await self.until_gone(request_id)

    async def until_gone(self, request_id: str) -> None:
        """Wait until the engine has let go of a request that was left or aborted, if there is such."""
        while request_id in self._leaving:
            gone = self._loop.create_future()
            self._leaving[request_id].append(gone)
            await gone

    async def until_none_is_left(self) -> None:
        """Wait for the last reader to leave."""
        while self._readers:
            self._none_left.clear()
            await self._none_left.wait()

    def take(self, news: News) -> None:
        """Take in what has come; readers are told of it by `deliver`."""
        for refusal in news.refusals:
            refused = self._readers.get(refusal.request_id)
            if refused is not None:
                kind = BusyError if refusal.is_busy else RequestError
                refused.fail(kind(refusal.message, refusal.param))
        changed, stops = self._texts.process(news.outputs)
        for stop in stops:
            self._send(Finish(stop.request_id, stop.index, stop.num_output_tokens))
        self._correct_ends(news.events)
        for output in changed:
            reader = self._readers[output.request_id]
            if reader.is_told_all or output.finished:
                self._due[output.request_id] = reader
        for request_id in news.aborted:
            for gone in self._leaving.pop(request_id, ()):
                if not gone.done():
                    gone.set_result(None)

    def deliver(self) -> None:
        """Tell everybody what concerns them; what came together counts once: a busy event loop is no slow reader."""
        due, self._due = self._due, {}
        for reader in due.values():
            if not reader.has_news and reader.takes():
                continue
            reader.has_news = True
            reader.num_missed += 1
            if reader.num_missed > self._max_unread:
                self._cut_off(reader)
            reader.tell()

    def end(self, reason: str) -> None:
        """Fail everybody who waits: the engine is gone."""
        self.deliver()
        self._is_over = True
        for reader in self._readers.values():
            if not reader.output.finished:
                reader.fail(EngineDeadError(reason))
        waiting: list[asyncio.Future[Any]] = [future for futures in self._leaving.values() for future in futures]
        self._leaving.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(EngineDeadError(reason))

    def _correct_ends(self, events: list[RequestEvent]) -> None:
        """Let a sequence that a stop string has ended have ended so for everybody who is told.

        The engine may have met another end by then: in the same step, or before it heard of this one.
        """
        for place, event in enumerate(events):
            if event.kind == EventKind.FINISHED and (reader := self._readers.get(event.request_id)) is not None:
                answer = reader.output.outputs[event.choice]
                if isinstance(answer.stop_reason, str):
                    events[place] = event._replace(detail=FinishReason.STOP.value, num_tokens=len(answer.token_ids))

    def _send_abort(self, request_id: str) -> None:
        self._leaving[request_id] = []
        self._send(Abort([request_id]))

    def _cut_off(self, reader: Reader) -> None:
        """End a reader that does not read: what it is owed would grow for as long as it likes."""
        request_id = reader.output.request_id
        if reader.error is None and not reader.output.finished:
            self._texts.discard(request_id)
            if request_id not in self._leaving:
                self._send_abort(request_id)
            reader.fail(RequestError(f"more than {self._max_unread} pieces of the answer were left unread"))
