"""What `AsyncLLM` says and does: answers, refusals, events, texts, start and end. On a thread and in a process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError, EngineDeadError, RequestError
from octavo.engine.events import EventKind, RequestEvent, StepEvent
from octavo.engine.llm import LLM
from octavo.engine.step import FinishReason
from octavo.engine.tools.replay import read_bundle

from .conftest import BOTH, LONG, check_canary, collect, expected, run, start
from .faulty_engines import FAULTY, NOT_FINITE, RAISE

TINY = {"invariant": True, "device": "cpu", "block_size": 16, "kv_cache_tokens": 1024, "max_num_seqs": 8}


@BOTH
def test_answers_are_those_of_llm(in_process: bool, tiny_folder: Path) -> None:
    """With steps that overlap, and without."""
    config = EngineConfig.from_settings({"model": str(tiny_folder)} | TINY)
    overlapped = EngineConfig.from_settings({"model": str(tiny_folder), "overlap": True} | TINY)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("the thin thing", {"temperature": 0, "max_tokens": 20}),
        ("in the beginning", {"seed": 3, "max_tokens": 40, "n": 3, "logprobs": 2, "prompt_logprobs": 1}),
        ("hello", {"seed": 7, "max_tokens": 60, "stop": ["a", "th"], "n": 2}),
        ("hello", {"seed": 8, "max_tokens": 60, "stop": ["e"], "include_stop_str_in_output": True}),
        ("bad words", {"seed": 9, "max_tokens": 20, "bad_words": ["t", "!"], "logit_bias": {"5": 3.0}}),
        ("states", {"seed": 4, "max_tokens": 5, "return_hidden_states": [0, 2]}),
        ("shape", {"seed": 5, "max_tokens": 30, "structured_outputs": {"regex": "[ab]{3,9}"}}),
    ]
    alone = LLM(config=config)

    async def main() -> None:
        llm = await AsyncLLM.start(overlapped, in_process=in_process)

        async def one(text: str, params: dict[str, Any]) -> Any:
            return await collect(llm, await llm.encode(text), params=params, prompt=text, stream="stop" not in params)

        answers = await asyncio.gather(*[one(text, params) for text, params in requests])
        for (text, params), answer in zip(requests, answers, strict=True):
            (wanted,) = alone.generate(text, alone.params(params))
            assert answer.prompt_token_ids == wanted.prompt_token_ids
            assert answer.prompt_logprobs == wanted.prompt_logprobs
            for choice, wanted_choice in zip(answer.outputs, wanted.outputs, strict=True):
                for name in ("text", "token_ids", "finish_reason", "stop_reason", "logprobs"):
                    assert getattr(choice, name) == getattr(wanted_choice, name), (params, name)
                if choice.hidden_states is not None:
                    assert (choice.hidden_states == wanted_choice.hidden_states).all()
        await llm.shutdown()

    run(main())


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([1] * 256, {}, "prompt"),
        ([264], {}, "prompt_token_ids"),
        ([1, -1], {}, "prompt_token_ids"),
        ([True], {}, "prompt_token_ids"),
        ("text", {}, "prompt"),
        ([1], {"max_tokens": 256}, "max_tokens"),
        ([1], {"stop_token_ids": [264]}, "stop_token_ids"),
        ([1], {"return_hidden_states": [2]}, "return_hidden_states"),
        ([1], {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
    ids=str,
)
def test_refused_requests_touch_no_other(prompt: Any, params: dict[str, Any], param: str) -> None:
    async def main() -> None:
        llm = await start()
        other = llm.generate([9, 9], llm.params(LONG))
        await anext(other)
        with pytest.raises(RequestError) as refused:
            await collect(llm, prompt, params=params)
        assert refused.value.param == param
        answer = [answer async for answer in other][-1]
        assert answer.outputs[0].token_ids == expected([9, 9], 200, 1)
        await check_canary(llm)
        await llm.shutdown()

    run(main())


@BOTH
def test_failed_rows_and_steps_end_their_requests_only(in_process: bool) -> None:
    async def main() -> None:
        llm = await start(in_process, FAULTY)
        bystander = asyncio.create_task(collect(llm, [7, 7], params={"seed": 2, "max_tokens": 150}))
        failed = (await collect(llm, [1], params={"seed": NOT_FINITE, "max_tokens": 9})).outputs[0]
        assert failed.finish_reason is FinishReason.ERROR
        assert "not finite" in failed.error
        assert (await bystander).outputs[0].token_ids == expected([7, 7], 150, 2)
        failed = (await collect(llm, [1], params={"seed": RAISE, "max_tokens": 9})).outputs[0]
        assert "InjectedError" in failed.error
        await check_canary(llm)
        await llm.shutdown()

    run(main())


@BOTH
def test_three_failed_steps_are_the_end(in_process: bool, tmp_path: Path) -> None:
    async def main() -> None:
        llm = await start(in_process, FAULTY, crash_folder=tmp_path / "new")
        for _ in range(2):
            await collect(llm, [1], params={"seed": RAISE, "max_tokens": 9})
        with pytest.raises(EngineDeadError, match="3 steps failed in a row"):
            await collect(llm, [1], params={"seed": RAISE, "max_tokens": 9})
        assert llm.is_dead
        assert not llm.health.ok
        assert "3 steps failed" in llm.health.reason
        for refused in (collect(llm, [1]), llm.snapshot(), llm.reset_prefix_cache(), llm.encode("a")):
            with pytest.raises(EngineDeadError):
                await refused
        await llm.abort("anything")
        await llm.shutdown()
        llm._threads.shutdown(wait=True)
        (bundle,) = (tmp_path / "new").iterdir()
        assert bundle.stat().st_mode & 0o777 == 0o600
        assert "3 steps failed" in bundle.read_text()
        facts = {"model": "smollm2-135m", "overlap": False, "graphs": False, "kv_cache_dtype": "float32"}
        assert facts.items() <= read_bundle(bundle).facts.items()

    run(main())


class Events:
    def __init__(self) -> None:
        self.all: list[RequestEvent | StepEvent] = []

    def on_request(self, event: RequestEvent) -> None:
        self.all.append(event)

    def on_step(self, event: StepEvent) -> None:
        self.all.append(event)


@BOTH
@pytest.mark.parametrize("overlap", [False, True])
def test_events_come_completely_and_in_order(in_process: bool, overlap: bool) -> None:
    async def main() -> None:
        llm = await start(in_process, settings={"overlap": overlap})
        events = Events()
        llm.subscribe(events)
        params = {"seed": 1, "max_tokens": 10}
        await asyncio.gather(*[collect(llm, [index, 1], params=params, request_id=str(index)) for index in range(20)])
        steps = [event for event in events.all if isinstance(event, StepEvent)]
        assert [event.step for event in steps] == list(range(len(steps)))
        assert sum(len(event.sampled) for event in steps) == 200
        for index in range(20):
            mine = [event for event in events.all if isinstance(event, RequestEvent) and event.request_id == str(index)]
            kinds = [event.kind for event in mine if event.kind is not EventKind.WAITS]
            assert kinds == [EventKind.ARRIVED, EventKind.ADMITTED, EventKind.FINISHED]
            # It is admitted before the first step it runs in, and ends after the last.
            first, last = (next(step for step in steps if step.step == event.step) for event in (mine[-2], mine[-1]))
            assert events.all.index(mine[-2]) < next(i for i, event in enumerate(events.all) if event is first)
            assert events.all.index(mine[-1]) > next(i for i, event in enumerate(events.all) if event is last)
        assert list(llm.ring.steps) == steps
        await llm.shutdown()

    run(main())


def test_a_recorder_that_fails_is_told_no_more(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Events):
        def on_step(self, event: StepEvent) -> None:
            raise ZeroDivisionError

    async def main() -> None:
        llm = await start()
        failing, events = Failing(), Events()
        llm.subscribe(failing)
        llm.subscribe(events)
        await collect(llm, [1], params={"max_tokens": 20})
        assert len(failing.all) < 3 < len(events.all)
        await check_canary(llm)
        await llm.shutdown()

    run(main())
    assert [record.exc_info is not None for record in caplog.records] == [True]


@BOTH
def test_whoever_stops_waiting_for_a_snapshot_is_not_missed(in_process: bool) -> None:
    async def main() -> None:
        llm = await start(in_process)
        for _ in range(20):
            asking = asyncio.create_task(llm.snapshot())
            await asyncio.sleep(0)
            asking.cancel()
        await check_canary(llm)
        await llm.shutdown()

    run(main())


@BOTH
def test_snapshot_and_reset_of_the_prefix_cache(in_process: bool) -> None:
    async def main() -> None:
        llm = await start(in_process)
        prompt = list(range(40))
        await collect(llm, prompt, params={"seed": 1, "max_tokens": 2})
        answers = llm.generate(prompt, llm.params(LONG), request_id="second")
        first = await anext(answers)
        snapshot = await llm.snapshot()
        assert snapshot.running[0].request_id == "second"
        assert len(snapshot.blocks) == 1024
        await answers.aclose()
        assert (await collect(llm, prompt, params={"seed": 1, "max_tokens": 2})).num_cached_tokens == 36
        await llm.reset_prefix_cache()
        assert (await collect(llm, prompt, params={"seed": 1, "max_tokens": 2})).num_cached_tokens == 0
        mine = await collect(llm, prompt, params={"seed": 1, "max_tokens": 2}, cache_domain="another")
        assert mine.num_cached_tokens == 0
        assert first.request_id == "second"
        await llm.shutdown()

    run(main())


@BOTH
def test_shutdown_lets_requests_finish(in_process: bool) -> None:
    async def main() -> None:
        llm = await start(in_process)
        running = [asyncio.create_task(collect(llm, [index], params=LONG)) for index in range(8)]
        await asyncio.sleep(0)
        ending = asyncio.create_task(llm.shutdown(60.0))
        await asyncio.sleep(0)
        assert llm.health.reason == "the engine is shutting down"
        with pytest.raises(EngineDeadError, match="shutting down"):
            await collect(llm, [1])
        for index, answer in enumerate(await asyncio.gather(*running)):
            assert answer.outputs[0].token_ids == expected([index], 200, 1)
        await ending
        await llm.shutdown()

    run(main())


@BOTH
def test_shutdown_without_grace_ends_readers(in_process: bool) -> None:
    async def main() -> None:
        llm = await start(in_process, settings={"max_model_len": 4000})
        params = {"seed": 1, "max_tokens": 3500}
        running = [asyncio.create_task(collect(llm, [index], params=params)) for index in range(8)]
        while not llm.ring.steps:
            await asyncio.sleep(0)
        await llm.shutdown()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(outcome, EngineDeadError)
            assert "shut down" in str(outcome)

    run(main())


def test_texts() -> None:
    async def main() -> None:
        llm = await start()
        assert llm.tokenizer is not None
        assert await llm.encode("abc") == llm.tokenizer.encode("abc")
        messages = [{"role": "user", "content": "hello"}]
        token_ids = await llm.encode_chat(messages)
        assert token_ids == llm.chat_template.encode(messages)
        assert len(await llm.encode_chat(messages, add_generation_prompt=False)) < len(token_ids)
        with pytest.raises(RequestError, match="characters; allowed"):
            await llm.encode("a" * 100_000)
        with pytest.raises(RequestError, match="characters; allowed") as refused:
            await llm.encode_chat([{"role": "user", "content": "a" * 100_000}])
        assert refused.value.param == "messages"
        with pytest.raises(RequestError, match="surrogate"):
            await llm.encode("\ud800")
        with pytest.raises(RequestError):
            await llm.encode_chat([])
        answer = await collect(llm, token_ids, params={"seed": 1, "max_tokens": 5}, prompt="shown")
        assert answer.prompt == "shown"
        await llm.shutdown()

    run(main())


@BOTH
def test_a_notebook_runs_its_loop_now_and_then(in_process: bool) -> None:
    with asyncio.Runner() as cells:
        llm = cells.run(start(in_process))
        answers = llm.generate([1, 2], llm.params(LONG))
        first = cells.run(anext(answers))  # type: ignore[arg-type]
        assert not first.finished
        other = cells.run(collect(llm, [3], params={"seed": 2, "max_tokens": 50}))
        assert other.outputs[0].token_ids == expected([3], 50, 2)
        while not first.finished:
            first = cells.run(anext(answers))  # type: ignore[arg-type]
        assert first.outputs[0].token_ids == expected([1, 2], 200, 1)
        cells.run(answers.aclose())
        cells.run(check_canary(llm))
        cells.run(llm.shutdown())


def test_another_chat_template() -> None:
    async def main() -> None:
        llm = await start(chat_template="{{ messages[0].content }}!")
        assert llm.tokenizer is not None
        assert await llm.encode_chat([{"role": "user", "content": "x"}]) == llm.tokenizer.encode("x!", add_bos=False)
        await llm.shutdown()

    run(main())


def test_the_default_of_max_tokens_is_the_callers() -> None:
    async def main() -> None:
        llm = await start()
        assert len((await collect(llm, [1], default_max_tokens=7)).outputs[0].token_ids) == 7
        assert len((await collect(llm, [1] * 200)).outputs[0].token_ids) == 56
        await llm.shutdown()

    run(main())


@BOTH
def test_what_the_engine_logs_is_in_the_callers_log(in_process: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo")

    async def main() -> None:
        llm = await start(in_process, factory="faulty_engines:talking_engine")
        await llm.shutdown()

    run(main())
    lines = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert [line for line in lines if "a line" in line[2]] == [
        ("octavo.engine", level, f"a line of {level}") for level in ("INFO", "WARNING")
    ]


@BOTH
def test_what_the_caller_hears_of_a_start(in_process: bool, tiny_folder: Path) -> None:
    async def main() -> None:
        phases: list[str] = []
        weights: list[tuple[int, int]] = []
        config = EngineConfig.from_settings({"model": str(tiny_folder)} | TINY)
        llm = await AsyncLLM.start(
            config, in_process=in_process, on_phase=phases.append, on_weights=lambda *bytes_: weights.append(bytes_)
        )
        info = llm.info
        assert phases[: len(info.phases)] == [phase.name for phase in info.phases]
        assert weights[-1][0] == weights[-1][1] > 0
        assert (info.model, info.config) == (str(tiny_folder), config)
        assert (info.vocab_size, info.num_layers, info.max_model_len) == (300, 2, 256)
        assert (info.num_slots, info.block_size, info.device, info.dtype) == (1024, 16, "cpu", "float32")
        assert info.eos_token_ids == (257, 258)
        await llm.shutdown()

    run(main())


def test_a_callback_that_fails_ends_the_start() -> None:
    def refuse(phase: str) -> None:
        raise ConfigError(phase)

    async def main() -> None:
        with pytest.raises(ConfigError, match="hang"):
            await start(False, "faulty_engines:hangs_at_start", on_phase=refuse)

    run(main())
