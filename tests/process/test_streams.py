"""Many readers at once: exact, cancelled, too slow, stopped early. The same on a thread and in a process."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from contextlib import aclosing

import pytest
from octavo.engine.core import EngineCore
from octavo.engine.errors import BusyError, RequestError
from octavo.engine.events import EventKind
from octavo.engine.observe.metrics import Metrics
from octavo.engine.process.loop import MAX_COMPILING, NUM_COMPILERS
from octavo.engine.process.thread import MAX_UNREAD, ThreadLink
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import FinishReason, RequestOutput

from .conftest import BOTH, LONG, check_canary, collect, expected, run, start


@BOTH
def test_simultaneous_streams_are_exact(in_process: bool, count: Callable[[int, int], int]) -> None:
    num_streams = count(100, 1000)

    async def main() -> None:
        llm = await start(in_process)

        async def one(index: int) -> None:
            prompt = [index % 90, index // 90, *range(index % 17)]
            seen: list[int] = []
            params = llm.params({"seed": index, "max_tokens": 1 + index % 37})
            async for answer in llm.generate(prompt, params):
                tokens = answer.outputs[0].token_ids
                assert tokens[: len(seen)] == seen
                seen = list(tokens)
            assert seen == expected(prompt, 1 + index % 37, index)
            assert answer.outputs[0].text == "".join(chr(33 + token) for token in seen)
            assert answer.outputs[0].finish_reason is FinishReason.LENGTH

        await asyncio.gather(*[one(index) for index in range(num_streams)])
        await check_canary(llm)
        await llm.shutdown()

    run(main())


@BOTH
def test_cancelled_anywhere_frees_everything(in_process: bool, count: Callable[[int, int], int], seed: int) -> None:
    num_requests, rng = count(150, 5000), random.Random(seed)

    async def main() -> None:
        llm = await start(in_process)

        async def leave(index: int, num_news: int) -> None:
            prompt = [index % 90, index // 90, *range(rng.randrange(150))]
            params = llm.params({"seed": index, "max_tokens": 30, "n": 1 + index % 3})
            async with aclosing(llm.generate(prompt, params, stream=bool(index % 5))) as answers:
                while num_news > 0 and await anext(answers, None) is not None:
                    num_news -= 1

        async def one(index: int) -> None:
            task = asyncio.create_task(leave(index, rng.randrange(40)))
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            if index % 2:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for first in range(0, num_requests, 50):
            await asyncio.gather(*[one(index) for index in range(first, min(first + 50, num_requests))])
        await check_canary(llm)
        await llm.shutdown()

    run(main())


def test_cancelled_before_the_engine_has_seen_it() -> None:
    async def main() -> None:
        llm = await start()
        answers = llm.generate([1, 2], llm.params(LONG))
        waiting = asyncio.ensure_future(anext(answers))
        await asyncio.sleep(0)  # the request is sent; the engine's answer cannot be here before the loop runs again
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert llm.health.num_unfinished == 0
        await check_canary(llm)
        await llm.shutdown()

    run(main())


def test_an_id_is_free_once_its_reader_has_left() -> None:
    async def main() -> None:
        llm = await start()
        for trial in range(20):
            answers = llm.generate([trial], llm.params({"seed": trial, "max_tokens": 200}), request_id="mine")
            await anext(answers)
            with pytest.raises(RequestError, match="not in use") as refused:
                await collect(llm, [1], request_id="mine")
            assert refused.value.param == "request_id"
            await answers.aclose()
            again = await collect(llm, [5, 6], request_id="mine", params={"seed": 3, "max_tokens": 4})
            assert again.outputs[0].token_ids == expected([5, 6], 4, 3)
        await check_canary(llm)
        await llm.shutdown()

    run(main())


@BOTH
def test_abort_ends_the_stream_with_what_there_is(in_process: bool) -> None:
    async def main() -> None:
        llm = await start(in_process)
        answers = llm.generate([1, 2, 3], llm.params(LONG), request_id="long")
        await anext(answers)
        await llm.abort("long")
        assert (await llm.snapshot()).running == []
        rest = [answer async for answer in answers]
        assert rest[-1].finished
        choice = rest[-1].outputs[0]
        assert choice.finish_reason is FinishReason.ABORT
        assert choice.token_ids == expected([1, 2, 3], 200, 1)[: len(choice.token_ids)]
        await llm.abort("long")
        await llm.abort("never heard of")
        await check_canary(llm)
        await llm.shutdown()

    run(main())


def test_a_reader_that_does_not_read_is_cut_off() -> None:
    async def main() -> None:
        llm = await start(max_unread=10, settings={"max_model_len": 4000})
        slow = llm.generate([1, 2], llm.params({"seed": 1, "max_tokens": 3900}))
        await anext(slow)
        while (await llm.snapshot()).running:
            pass
        with pytest.raises(RequestError, match="more than 10 pieces"):
            [answer async for answer in slow]
        assert llm.health.num_unfinished == 0
        # Who wants the end only leaves nothing unread.
        answer = await collect(llm, [3], params={"seed": 5, "max_tokens": 100}, stream=False)
        assert answer.outputs[0].token_ids == expected([3], 100, 5)
        await check_canary(llm)
        await llm.shutdown()

    run(main())


def test_a_busy_event_loop_makes_no_slow_readers() -> None:
    async def main() -> None:
        llm = await start(max_unread=10)
        answers = llm.generate([1, 2], llm.params(LONG))
        await anext(answers)
        assert isinstance(llm._link, ThreadLink)
        while len(llm._link._outbox._unread) < 30:  # nobody gets a turn while this one does not wait
            assert llm._link._thread.is_alive()
        rest = [len(answer.outputs[0].token_ids) async for answer in answers]
        assert rest[0] >= 30
        assert rest[-1] == 200
        await llm.shutdown()

    run(main())


def test_an_engine_on_a_thread_waits_for_its_front() -> None:
    async def main() -> None:
        llm = await start()
        answers = llm.generate([1, 2], llm.params(LONG))
        await anext(answers)
        assert isinstance(llm._link, ThreadLink)
        unread = llm._link._outbox._unread
        while len(unread) < MAX_UNREAD:
            assert llm._link._thread.is_alive()
        until_s = time.monotonic() + 0.2
        while time.monotonic() < until_s:  # enough for many a step
            assert len(unread) == MAX_UNREAD
        assert [answer async for answer in answers][-1].outputs[0].token_ids == expected([1, 2], 200, 1)
        await llm.shutdown()

    run(main())


@BOTH
def test_a_stop_string_ends_the_sequence_in_the_engine(in_process: bool) -> None:
    async def main() -> None:
        llm = await start(in_process, settings={"max_model_len": 4000})
        tokens = expected([1, 2], 3000, 1)
        stop = "".join(chr(33 + token) for token in tokens[20:24])
        for stream in (True, False):
            params = {"seed": 1, "max_tokens": 3000, "stop": stop}
            choice = (await collect(llm, [1, 2], params=params, stream=stream)).outputs[0]
            assert choice.token_ids == tokens[:24]
            assert choice.text == "".join(chr(33 + token) for token in tokens[:20])
            assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, stop)
            last = llm.ring.events[-1]
            assert (last.kind, last.detail, last.num_tokens) == (EventKind.FINISHED, "stop", 24)
        assert llm.ring.num_steps < 1000
        await llm.shutdown()

    run(main())


@BOTH
def test_events_tell_the_end_that_the_reader_got(in_process: bool) -> None:
    """The engine may be at another end when the front finds a stop string: in the last token, or long before it."""
    whole = expected([7], 30, 5)
    stops = {place: chr(33 + token) for place, token in enumerate(whole) if token not in whole[:place]}

    async def main() -> None:
        llm = await start(in_process)
        metrics = Metrics(model_name="fake", num_blocks=llm.info.num_blocks, max_model_len=llm.info.max_model_len)
        llm.subscribe(metrics)
        for place, stop in stops.items():
            for max_tokens in (place + 1, 30):
                params = {"seed": 5, "max_tokens": max_tokens, "stop": [stop]}
                answer = await collect(llm, [7], params=params, request_id=f"{place} of {max_tokens}")
                assert answer.outputs[0].token_ids == whole[: place + 1]
                end = llm.ring.events_of(answer.request_id)[-1]
                assert (end.kind, end.detail, end.num_tokens) == (EventKind.FINISHED, "stop", place + 1)
        ends, num_tokens = (
            metrics.registry.get_sample_value(f"octavo:{name}", {"model_name": "fake"} | labels)
            for name, labels in (
                ("request_success_total", {"finished_reason": "stop"}),
                ("request_generation_tokens_sum", {}),
            )
        )
        assert ends == 2 * len(stops)
        assert num_tokens == 2 * sum(place + 1 for place in stops)
        await check_canary(llm)
        await llm.shutdown()

    run(main())


@pytest.mark.parametrize("min_tokens", [23, 24, 300])
def test_no_stop_string_ends_before_min_tokens(min_tokens: int) -> None:
    """As with stop tokens, the first to end the output is the one after min_tokens."""

    async def main() -> None:
        llm = await start(settings={"max_model_len": 400})
        tokens = expected([1, 2], 300, 1)
        stop = "".join(chr(33 + token) for token in tokens[20:24])
        ends = 24 if min_tokens == 23 else 300
        for more in ((), ("never",)):
            params = {"seed": 1, "max_tokens": 300, "stop": stop, "min_tokens": min_tokens}
            choice = (await collect(llm, [1, 2], params=params, more_stops=more)).outputs[0]
            assert choice.token_ids == tokens[:ends]
            assert choice.text == "".join(chr(33 + token) for token in tokens[: 20 if ends == 24 else 300])
        await llm.shutdown()

    run(main())


def test_stop_strings_of_the_caller_come_on_top() -> None:
    async def main() -> None:
        llm = await start()
        text = "".join(chr(33 + token) for token in expected([1, 2], 60, 1))
        params = {"seed": 1, "max_tokens": 60, "stop": ["é"] * 16}
        for stream in (True, False):
            choice = (await collect(llm, [1, 2], params=params, more_stops=(text[9:12],), stream=stream)).outputs[0]
            assert (choice.text, choice.stop_reason) == (text[:9], text[9:12])
        await llm.shutdown()

    run(main())


def test_grammars_of_those_who_left_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    begun, may_end = threading.Semaphore(0), threading.Event()

    def compile_grammar(core: EngineCore, params: SamplingParams) -> None:
        if params.structured_outputs is None:
            return
        compiled.append(params.structured_outputs["regex"])
        begun.release()
        may_end.wait()
        raise RequestError("not in this test", "structured_outputs")

    monkeypatch.setattr(EngineCore, "compile_grammar", compile_grammar)

    async def main() -> None:
        llm = await start()

        def ask(regex: str) -> asyncio.Task[object]:
            return asyncio.create_task(collect(llm, [1], params={"structured_outputs": {"regex": regex}}))

        asked = [ask(f"leaves{index}") for index in range(MAX_COMPILING)]
        for _ in range(NUM_COMPILERS):
            await asyncio.to_thread(begun.acquire)
        with pytest.raises(BusyError, match="allowed: later") as refused:
            await ask("one too many")
        assert refused.value.param == "structured_outputs"
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        stays = ask("stays")
        await llm.snapshot()  # what was sent before it has been read
        may_end.set()
        with pytest.raises(RequestError, match="not in this test"):
            await stays
        assert sorted(compiled) == ["leaves0", "leaves1", "stays"]
        await check_canary(llm)
        await llm.shutdown()

    run(main())


def test_news_coalesce_and_the_end_comes_once() -> None:
    async def main() -> None:
        llm = await start()
        answers = llm.generate([1, 2], llm.params({"seed": 1, "max_tokens": 60}))
        await anext(answers)
        await collect(llm, [3], params={"seed": 5, "max_tokens": 100})
        rest = [answer.finished async for answer in answers]
        assert rest == [True]
        whole = llm.generate([1, 2], llm.params({"seed": 1, "max_tokens": 60}), stream=False)
        assert [answer.finished async for answer in whole] == [True]
        await llm.shutdown()

    run(main())


@BOTH
def test_who_waits_is_offered_news_first(in_process: bool) -> None:
    """What is taken is not yielded; what is not, is; the end always is."""

    async def main() -> None:
        llm = await start(in_process)
        # More than can come at once.
        params, tokens = llm.params({"seed": 1, "max_tokens": 200, "n": 2}), expected([1, 2], 200, 1)
        offered: list[int] = []
        yielded: list[int] = []

        def push(answer: RequestOutput) -> bool:
            assert not answer.finished
            offered.append(len(answer.outputs[0].token_ids))
            return offered[-1] > 30

        async for answer in llm.generate([1, 2], params, push=push):
            yielded.append(len(answer.outputs[0].token_ids))
        taken = [num_tokens for num_tokens in offered if num_tokens > 30]
        assert taken
        assert answer.finished
        assert not set(taken) & set(yielded[:-1])
        assert yielded[-1] == 200 > 2 * MAX_UNREAD
        assert answer.outputs[0].token_ids == tokens
        await check_canary(llm)
        await llm.shutdown()

    run(main())


def test_who_fails_to_take_news_fails_alone() -> None:
    async def main() -> None:
        llm = await start()

        def push(answer: RequestOutput) -> bool:
            raise RequestError("cannot be told", "prompt")

        other = asyncio.create_task(collect(llm, [3], params={"seed": 2, "max_tokens": 200}))
        with pytest.raises(RequestError, match="cannot be told"):
            async for _ in llm.generate([1, 2], llm.params(LONG), push=push):
                pass
        assert (await other).outputs[0].token_ids == expected([3], 200, 2)
        await check_canary(llm)
        await llm.shutdown()

    run(main())
