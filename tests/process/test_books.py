"""What is told of a busy run with overlap, in metrics and explanations, against what its readers got."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from random import Random

from octavo.engine.async_llm import AsyncLLM
from octavo.engine.events import EventKind
from octavo.engine.observe.explain import explain
from octavo.engine.observe.metrics import Metrics
from octavo.engine.step import FinishReason, RequestOutput

from .conftest import BOTH, check_canary, expected, run, start

SMALL = {"overlap": True, "max_num_seqs": 6, "kv_cache_tokens": 256, "max_num_batched_tokens": 32}


class Asked:
    """One request: what it asks for, and what its reader does and gets."""

    def __init__(self, rng: Random, number: int) -> None:
        self.id = f"r{number}"
        self.prompt = [rng.randrange(94) for _ in range(rng.randint(1, 60))]
        self.params = {"seed": number, "max_tokens": rng.randint(1, 40), "n": rng.choice((1, 1, 1, 2))}
        if rng.random() < 0.3:  # a character somewhere in the first choice's answer
            self.params["stop"] = chr(33 + rng.choice(expected(self.prompt, self.params["max_tokens"], number)))
        self.leaves, self.aborts = rng.random() < 0.15, rng.random() < 0.15
        self.after = rng.randint(1, 8)
        """News before it leaves or aborts, if it is not over by then."""
        self.aborts_at_once = number % 10 == 0
        if self.aborts_at_once:
            self.params = {"seed": number, "max_tokens": 150, "n": 1}
        self.answer: RequestOutput | None = None

    async def read(self, llm: AsyncLLM) -> None:
        # It is told to the engine right behind the request itself.
        aborting = asyncio.ensure_future(llm.abort(self.id)) if self.aborts_at_once else None
        num_news = 0
        async with aclosing(llm.generate(self.prompt, llm.params(self.params), request_id=self.id)) as answers:
            async for answer in answers:
                num_news += 1
                self.answer = answer
                if num_news == self.after and self.leaves and aborting is None:
                    return
                if num_news == self.after and self.aborts and aborting is None:
                    aborting = asyncio.ensure_future(llm.abort(self.id))
        if aborting is not None:
            await aborting


@BOTH
def test_metrics_and_explanations_are_of_what_readers_got(in_process: bool, count: Callable[[int, int], int]) -> None:
    rng = Random(5)
    asked = [Asked(rng, number) for number in range(count(60, 400))]

    async def main() -> None:
        llm = await start(in_process, settings=SMALL)
        metrics = Metrics(model_name="fake", num_blocks=llm.info.num_blocks, max_model_len=llm.info.max_model_len)
        llm.subscribe(metrics)
        await asyncio.gather(*(each.read(llm) for each in asked))
        await llm.snapshot()  # those that left are gone with it
        metrics.exposition()
        check_books(llm, metrics)
        await check_canary(llm)
        await llm.shutdown()

    def check_books(llm: AsyncLLM, metrics: Metrics) -> None:
        def number(name: str, **labels: str) -> float:
            value = metrics.registry.get_sample_value(f"octavo:{name}", {"model_name": "fake"} | labels)
            assert value is not None, name
            return value

        ends, num_kept, num_sampled, num_started, num_prompt = Counter[str](), 0, 0, 0, 0
        for each in asked:
            found = explain(llm.ring, each.id)
            assert found is not None
            assert len(found["choices"]) == each.params["n"]
            for choice in found["choices"]:
                assert choice["state"] == "finished"
                times = [choice["queued_s"], *choice["tokens"]["at_s"][:1], choice["seconds"]]
                # An end that comes with the first token is there before the news of it.
                assert times == sorted(times) or choice["output_tokens"] == 1
                ends[choice["finish_reason"]] += 1
                num_kept += choice["output_tokens"]
                num_sampled += len(choice["tokens"]["step"])
                num_started += len(choice["tokens"]["step"]) > 0
                num_prompt += len(each.prompt) * bool(choice["rows"])
                if each.answer is not None and each.answer.finished:
                    answer = each.answer.outputs[choice["choice"]]
                    assert (answer.finish_reason, len(answer.token_ids)) == (
                        choice["finish_reason"],
                        choice["output_tokens"],
                    )
        for reason in FinishReason:
            assert number("request_success_total", finished_reason=reason.value) == ends[reason.value], reason
        assert number("request_generation_tokens_sum") == num_kept
        assert number("request_generation_tokens_count") == ends.total()
        # What was sampled before the engine heard of a stop string counts, what was sampled in vain does not.
        assert number("generation_tokens_total") == num_sampled >= num_kept
        assert number("num_wasted_tokens_total") > 0
        assert number("time_to_first_token_seconds_count") == num_started
        assert number("inter_token_latency_seconds_count") == num_sampled - num_started
        assert number("prompt_tokens_total") == num_prompt
        assert number("iteration_tokens_total_count") == llm.ring.num_steps
        assert number("num_preemptions_total") > 0
        assert {"stop", "length", "abort"} <= ends.keys()
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert number(gauge) == 0, gauge
        assert sum(event.kind is EventKind.ARRIVED for event in llm.ring.events) == ends.total()

    run(main())
