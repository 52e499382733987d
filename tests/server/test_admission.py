"""Places in the queue: whose they are, and who must not hold one for ever."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from octavo.engine.events import EventKind, RequestEvent
from octavo.engine.server.admission import Admission
from octavo.engine.server.app import App, create_app
from octavo.engine.server.errors import HTTPError
from octavo.engine.server.settings import Limits, ServerSettings
from octavo.engine.server.watch import Watch

from .asgi import ask
from .raw import connect
from .serving import WAIT_S, Running, serving, started_llm

QUESTION = json.dumps({"prompt": "abc", "max_tokens": 2}).encode()


class _Ended(Watch):
    """Keeps why it was ended."""

    def __init__(self) -> None:
        self.reasons: list[Exception] = []

    def end(self, reason: Exception) -> None:
        self.reasons.append(reason)


def _admitted(request_id: str) -> RequestEvent:
    return RequestEvent(EventKind.ADMITTED, 0.0, 0, request_id, 0, 0, 5, 0)


def test_an_id_has_one_ticket() -> None:
    async def run() -> None:
        admission = Admission(Limits())
        with admission.enter(_Ended(), {"a-0": 5, "a-1": 6}, 2) as first:
            with pytest.raises(HTTPError, match="X-Request-Id") as refused, admission.enter(_Ended(), {"a-1": 7}, 1):
                pass
            assert refused.value.status == 409
            assert (admission.num_waiting, admission.num_waiting_tokens) == (4, 11)
            # Of a request of this name that has left: nothing that this one did.
            admission.on_request(_admitted("a-1"))
            assert not first.admitted
            first.is_sent = True
            admission.on_request(_admitted("a-1"))
            assert first.admitted
            assert first.timer is not None
            assert first.timer.cancelled()
            assert (admission.num_waiting, admission.num_waiting_tokens) == (2, 5)
        assert (admission.num_waiting, admission.num_waiting_tokens, admission.num_active) == (0, 0, 0)
        with admission.enter(_Ended(), {"a-1": 7}, 1):
            pass

    asyncio.run(run())


@asynccontextmanager
async def _app(settings: ServerSettings | None = None) -> AsyncGenerator[App, None]:
    async with started_llm() as llm:
        yield create_app(llm, settings)


def test_an_id_is_taken_while_its_last_bearer_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at who is there and the place in the queue the engine is asked to let go of the last one."""

    async def run() -> None:
        async with _app() as app:
            may_go, abort = asyncio.Event(), app.context.llm.abort

            async def slow_abort(request_id: str) -> None:
                await may_go.wait()
                await abort(request_id)

            monkeypatch.setattr(app.context.llm, "abort", slow_abort)
            headers = {"x-request-id": "again"}
            asked = [asyncio.create_task(ask(app, "/v1/completions", QUESTION, headers=headers)) for _ in range(3)]
            async with asyncio.timeout(WAIT_S):
                while sum(task.done() for task in asked) < 2:
                    await asyncio.sleep(0.005)
                may_go.set()
                assert sorted([answer.status for answer in await asyncio.gather(*asked)]) == [200, 409, 409]
            assert (app.context.admission.num_waiting, app.context.admission.num_waiting_tokens) == (0, 0)

    asyncio.run(run())


def test_refusals_hold_nobodys_stack() -> None:
    async def run() -> None:
        admission, reason = Admission(Limits()), HTTPError(503, "closing", code="shutting_down", headers=[("a", "b")])
        watches = [_Ended(), _Ended()]
        with admission.enter(watches[0], {"a": 1}, 1), admission.enter(watches[1], {"b": 1}, 1):
            admission.end_all(reason)
        ends = [each for watch in watches for each in watch.reasons]
        assert len(set(map(id, ends))) == 2
        admission.close(reason)
        for place in (admission.enter(_Ended(), {"c": 1}, 1), admission.encoding(5)):
            with pytest.raises(HTTPError, match="closing") as refused, place:
                pass
            assert refused.value is not reason
            ends.append(refused.value)
        for end in ends:
            assert isinstance(end, HTTPError)
            assert (str(end), end.status, end.code, end.headers) == ("closing", 503, "shutting_down", (("a", "b"),))
        assert reason.__traceback__ is None

    asyncio.run(run())


def test_texts_have_places() -> None:
    async def run() -> None:
        admission = Admission(Limits(queue_requests=2, queue_text_bytes=100))
        # One alone may be of any size that a body may have.
        with admission.encoding(1000), pytest.raises(HTTPError) as refused, admission.encoding(1):
            pass
        assert (refused.value.status, refused.value.code, refused.value.headers) == (
            429,
            "queue_full",
            (("retry-after", "1"),),
        )
        with admission.encoding(1), admission.encoding(1):
            with pytest.raises(HTTPError, match="2 texts"), admission.encoding(1):
                pass
            assert admission.num_texts == 2
        assert admission.num_texts == 0
        with admission.encoding(100):
            pass

    asyncio.run(run())


@contextmanager
def _busy_text_threads(running: Running) -> Iterator[threading.Event]:
    """Keep the threads that tokenise busy until the event is set, or the block ends."""
    may_go, num_busy = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        num_busy.release()
        may_go.wait(WAIT_S)

    async def occupy() -> list[asyncio.Task[None]]:
        return [asyncio.create_task(running.llm.on_text_thread(wait)) for _ in range(2)]

    tasks = running.run(occupy())
    for _ in tasks:
        assert num_busy.acquire(timeout=WAIT_S)
    try:
        yield may_go
    finally:
        may_go.set()

        async def gather() -> None:
            await asyncio.gather(*tasks)

        running.run(gather())


ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "of one who leaves"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "of one who leaves"}]}),
    ("/tokenize", {"prompt": "of one who leaves", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_nobody_tokenises_for_who_has_left(
    fake: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    admission, data = fake.server.app.context.admission, json.dumps(body).encode()
    begun: list[Any] = []
    on_text_thread = fake.llm.on_text_thread

    async def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            begun.append(function)
            return function(*args, **kwargs)

        return await on_text_thread(run)

    with _busy_text_threads(fake):
        monkeypatch.setattr(fake.llm, "on_text_thread", watched)
        with connect(fake) as sock:
            sock.sendall(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(data)}\r\n\r\n".encode()
                + data
            )
            fake.eventually(lambda: admission.num_texts == 1)
        fake.eventually(lambda: admission.num_texts == 0)
    monkeypatch.undo()
    # What was asked after it has been done, so it would have been, too.
    fake.check_canary()
    assert begun == []


def test_tokenising_counts_as_time_and_work() -> None:
    limits = Limits(request_s=1.0, queue_text_bytes=1)
    with serving(ServerSettings(port=0, limits=limits)) as running:
        app, admission = running.server.app, running.server.app.context.admission
        with _busy_text_threads(running):

            async def ask_twice() -> tuple[Any, Any]:
                first = asyncio.create_task(ask(app, "/v1/completions", QUESTION))
                while not admission.num_texts and not first.done():
                    await asyncio.sleep(0.001)
                second = await ask(app, "/v1/completions", QUESTION)
                return await first, second

            first, second = running.run(ask_twice())
        assert (first.status, first.error["code"]) == (504, "timeout")
        assert (second.status, second.error["code"]) == (429, "queue_full")
        assert admission.num_texts == 0
