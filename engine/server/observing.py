"""This module holds the routes that show what the engine does and did. It does not know how that is found out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from itertools import takewhile
from typing import Any

import msgspec

from ..errors import describe
from ..events import KVSnapshot
from ..observe.explain import explain, summaries
from ..observe.live import LiveFeed
from ..observe.metrics import CONTENT_TYPE_LATEST
from ..observe.recording import dumps, schedule_facts
from ..observe.ring import EventRing
from ..observe.trace import chrome_trace
from .body import Disconnected, send_json, send_response
from .context import Context
from .errors import HTTPError, as_http_error
from .exchange import Receive, Scope, Send
from .fields import MAX_PROMPTS
from .sse import EventStream, event
from .watch import Watch

__all__ = ["Explanation", "Live", "MetricsText", "Recording", "Requests", "Trace"]

_LIVE_PERIOD_S = 0.2
_NUM_WATCHERS = 32
_NUM_REQUESTS = 200
_DAY_S = 86_400.0


class Live:
    """The route of the live view: what is new, five times a second, for each of its watchers."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._num_watchers = 0
        self._snapshot: asyncio.Future[KVSnapshot] | None = None
        self._taken_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one watcher."""
        if self._num_watchers == _NUM_WATCHERS:
            raise HTTPError(429, f"{_NUM_WATCHERS} watch already", headers=[("retry-after", "5")])
        if scope["method"] == "HEAD":
            await send_response(send, 200, b"", "text/event-stream; charset=utf-8")
            return
        context = self._context
        feed = LiveFeed(context.ring, context.metrics)
        stream = EventStream(scope, send, context.settings.limits.ping_s)
        self._num_watchers += 1
        try:
            async with Watch(receive, _DAY_S):
                while not context.ending.is_set():
                    await stream.write(event(feed.next(await self._latest())))
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(context.ending.wait(), _LIVE_PERIOD_S)
                await stream.end()
        except Disconnected:
            raise
        except Exception as error:
            known = as_http_error(error)
            if known is None or not stream.started:
                raise
            await stream.fail(known)
        finally:
            self._num_watchers -= 1
            stream.close()

    async def _latest(self) -> KVSnapshot:
        """Return a snapshot that is new enough; whoever asks while one is taken gets the same."""
        now_s = time.monotonic()
        if self._snapshot is None or (self._snapshot.done() and now_s - self._taken_s > _LIVE_PERIOD_S / 2):
            self._snapshot = asyncio.ensure_future(self._context.llm.snapshot())
            # Where every watcher has gone meanwhile, nobody asks what became of it.
            self._snapshot.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._taken_s = now_s
        return await asyncio.shield(self._snapshot)


class Requests:
    """The route that lists recent requests."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        ring = self._context.ring.copy()
        await send_json(send, {"requests": await asyncio.to_thread(summaries, ring, _NUM_REQUESTS)})


class Explanation:
    """The route that says where the time of a request went."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        given = scope["path_params"]["request_id"]
        found = await asyncio.to_thread(_explained, self._context.ring.copy(), given, time.monotonic())
        if found is None:
            raise HTTPError(404, f"nothing is known of request {describe(given)}, or no longer", param="request_id")
        await send_json(send, found)


def _explained(ring: EventRing, given: str, now_s: float) -> dict[str, Any] | None:
    # The id of the answer is that of the engine; X-Request-Id is the same without the route's mark.
    for name in (given, f"chatcmpl-{given}", f"cmpl-{given}"):
        found = explain(ring, name, now_s=now_s)
        if found is None:
            # Of several prompts each has its number behind that.
            prompts = takewhile(ring.events_of, (f"{name}-{index}" for index in range(MAX_PROMPTS)))
            found = explain(ring, *prompts, now_s=now_s)
        if found is not None:
            return found | {"request_id": name}
    return None


class Recording:
    """The route of everything the ring holds, as a file."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        body = await asyncio.to_thread(dumps, self._context.ring.copy(), _facts(self._context))
        await send_response(send, 200, body, "application/json", [_as_file("octavo-recording.json")])


class Trace:
    """The route of the same as a Chrome trace."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        context = self._context
        trace = await asyncio.to_thread(chrome_trace, context.ring.copy(), num_blocks=context.llm.info.num_blocks)
        body = await asyncio.to_thread(msgspec.json.encode, trace)
        await send_response(send, 200, body, "application/json", [_as_file("octavo-trace.json")])


class MetricsText:
    """The route for Prometheus."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await send_response(send, 200, self._context.metrics.exposition(), CONTENT_TYPE_LATEST)


def _as_file(name: str) -> tuple[str, str]:
    return ("content-disposition", f'attachment; filename="{name}"')


def _facts(context: Context) -> dict[str, Any]:
    info = context.llm.info
    sizes = ("vocab_size", "num_layers", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks")
    names = (*sizes, "block_size", "dtype", "kv_cache_dtype", "device", "backend", "graphs")
    facts = {name: getattr(info, name) for name in names}
    return {"model": context.model_names[0], **facts, **schedule_facts(info.config, overlap=info.overlap)}
