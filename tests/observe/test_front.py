"""This module holds what reaches the front of an engine in another process: every event, once and in order. It does not
know HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import aclosing

import pytest
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.events import StepEvent
from octavo.engine.observe.explain import explain
from octavo.engine.observe.metrics import Metrics
from octavo.engine.process.fake import FAKE_ENGINE

from .runs import Log, replay
from .test_metrics import number, read

SETTINGS = {
    "block_size": 4,
    "kv_cache_tokens": 160,
    "max_model_len": 120,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
}


@pytest.mark.parametrize("in_process", [True, False])
def test_counters_equal_what_users_got(in_process: bool) -> None:
    heard: dict[str, list[list[int]]] = {}
    log = Log()

    async def ask(llm: AsyncLLM, i: int) -> None:
        prompt = [*range(20), *range(i, i + 5)] if i % 2 else [i] * 30
        params = llm.params({"max_tokens": 20, "n": 1 + i % 2, "seed": i, "ignore_eos": True})
        async with aclosing(llm.generate(prompt, params, request_id=f"r{i}")) as news:
            async for answer in news:
                heard[f"r{i}"] = [list(choice.token_ids) for choice in answer.outputs]
                if i % 5 == 4 and len(heard[f"r{i}"][0]) >= 3:
                    return

    async def main() -> Metrics:
        config = EngineConfig.from_settings({"model": "fake"} | SETTINGS)
        llm = await AsyncLLM.start(config, in_process=in_process, engine_factory=FAKE_ENGINE)
        metrics = Metrics(model_name="fake", num_blocks=llm.info.num_blocks, max_model_len=llm.info.max_model_len)
        try:
            llm.subscribe(log)
            llm.subscribe(metrics)
            await asyncio.gather(*(ask(llm, i) for i in range(15)))
            snapshot = await llm.snapshot()
            assert len(snapshot.blocks) == llm.info.num_blocks == 40
            assert snapshot.running == snapshot.waiting == []
            assert llm.ring.is_complete
            for request_id in heard:
                explanation = explain(llm.ring, request_id)
                assert explanation is not None
                assert [choice["state"] for choice in explanation["choices"]] == ["finished"] * len(heard[request_id])
        finally:
            await llm.shutdown(5)
        return metrics

    metrics = asyncio.run(asyncio.wait_for(main(), 120))
    samples, told = read(metrics), replay(log)
    early = {"r4", "r9", "r14"}
    sampled = {key: len(told_.token_times) for key, told_ in told.items()}
    for request_id, choices in heard.items():
        for index, token_ids in enumerate(choices):
            got = sampled[request_id, index]
            # Whoever left early has not heard what came before the engine knew.
            assert got == len(token_ids) or (got > len(token_ids) and request_id in early), request_id
    steps = [event.step for event in log.events if isinstance(event, StepEvent)]
    assert steps == list(range(len(steps)))
    assert number(samples, "generation_tokens_total") == sum(sampled.values())
    ends = [told_.finished.detail for told_ in told.values()]
    assert number(samples, "request_success_total", finished_reason="length") == ends.count("length") > 0
    assert number(samples, "request_success_total", finished_reason="abort") == ends.count("abort")
    assert number(samples, "num_preemptions_total") == sum(len(told_.preempted) for told_ in told.values())
    assert number(samples, "prompt_tokens_total") == sum(told_.arrived.num_tokens for told_ in told.values())
    assert number(samples, "request_params_n_count") == len(heard) == 15
    gaps = [b - a for t in told.values() for a, b in zip(t.token_times, t.token_times[1:], strict=False)]
    assert math.isclose(number(samples, "inter_token_latency_seconds_sum"), math.fsum(gaps), rel_tol=1e-6)


def test_times_count_from_when_the_front_had_the_request() -> None:
    async def main() -> None:
        config = EngineConfig.from_settings({"model": "fake"} | SETTINGS)
        llm = await AsyncLLM.start(config, in_process=True, engine_factory=FAKE_ENGINE)
        metrics = Metrics(model_name="fake", num_blocks=40, max_model_len=120, clock=time.monotonic)
        llm.subscribe(metrics)
        try:
            params = llm.params({"max_tokens": 3, "ignore_eos": True})
            async for answer in llm.generate([1, 2, 3], params, request_id="r", arrived_s=time.monotonic() - 50):
                last = answer
            assert last.outputs[0].metrics is not None
            explanation = explain(llm.ring, "r")
        finally:
            await llm.shutdown(5)
        samples = read(metrics)
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert 50 <= number(samples, f"{name}_seconds_sum") < 500, name
        for name in ("inter_token_latency", "request_prefill_time", "request_decode_time"):
            assert 0 < number(samples, f"{name}_seconds_sum") < 50, name
        assert explanation is not None
        (choice,) = explanation["choices"]
        assert choice["queued_s"] >= 50
        assert choice["waits"][0]["reasons"].keys() == {"on its way into a step"}
        assert choice["time_to_first_token_s"] >= 50

    asyncio.run(asyncio.wait_for(main(), 120))
