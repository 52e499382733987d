"""This module holds bad requests and faults in a running engine: each ends one request at most. It does not know HTTP.

Every test ends with the canary: a fixed greedy request gives its golden tokens and all blocks are free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from octavo.engine.errors import EngineDeadError, RequestError
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import CompletionOutput, FinishReason, ModelOutput, SchedulerOutput

from ..checkpoints import VOCAB_SIZE, make_prompts

CANARY, NEIGHBOUR = make_prompts([37, 20], seed=99)
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=2, ignore_eos=True)


def ask(llm: LLM, prompt: list[int] = CANARY) -> CompletionOutput:
    return llm.generate(prompt, GREEDY)[0].outputs[0]


@pytest.fixture
def golden(make_llm: Callable[..., LLM]) -> CompletionOutput:
    return ask(make_llm())


@pytest.fixture
def llm(make_llm: Callable[..., LLM], golden: CompletionOutput) -> Iterator[LLM]:
    """An engine that must sing like a fresh one after the test."""
    # Chunks shorter than the canary: a fault may come when a part of a prompt is cached already.
    engine = make_llm(max_num_batched_tokens=16)
    yield engine
    scheduler = engine.engine.core.scheduler
    for _ in range(2):  # computed, then from the prefix cache
        found = ask(engine)
        assert (found.token_ids, found.logprobs, found.text) == (golden.token_ids, golden.logprobs, golden.text)
    scheduler.check_integrity()
    assert not scheduler.has_unfinished
    assert scheduler.stats.num_free_blocks == scheduler.limits.num_blocks


BAD_REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "empty text": ("", {}),
    "no tokens": ([[]], {}),
    "id at the width of the logits": ([[1, VOCAB_SIZE]], {}),
    "negative id": ([[1, -1]], {}),
    "id past 32 bits": ([[2**32 + 5]], {}),
    "id past 64 bits": ([[2**70]], {}),
    "true as an id": ([[1, True]], {}),
    "fraction as an id": ([[1, 2.0]], {}),
    "text among ids": ([[1, "a"]], {}),
    "lone surrogate": ("a\ud800b", {}),
    "prompt as long as the context": ([[1] * 256], {"max_tokens": 1}),
    "prompt of a million tokens": ([[1] * 10**6], {}),
    "output past the context": ([[1] * 200], {"max_tokens": 57}),
    "stop token outside the vocabulary": ([[1]], {"stop_token_ids": [VOCAB_SIZE]}),
    "bias outside the vocabulary": ([[1]], {"logit_bias": {VOCAB_SIZE: 1.0}}),
    "allowed id outside the vocabulary": ([[1]], {"allowed_token_ids": [5, 2**31 - 1]}),
    "bad word outside the vocabulary": ([[1]], {"bad_words_token_ids": [[VOCAB_SIZE]]}),
    "min_tokens past the default max_tokens": ([[1]], {"min_tokens": 17}),
    "layer that is not there": ([[1]], {"return_hidden_states": [3]}),
    "top_k past the vocabulary": ([[1]], {"top_k": VOCAB_SIZE + 1}),
    "nothing": (None, {}),
    "a number": (5, {}),
    "bytes": (b"abc", {}),
    "bytes among prompts": ([b"abc"], {}),
    "a mapping": ({"prompt": [1]}, {}),
    "nothing among prompts": ([[1], None], {}),
    "numbers that are no int": ([np.int64(1), np.int64(2)], {}),
    "an array": (np.arange(3), {}),
    "lists in a list of ids": ([1, [2]], {}),
    "id of 5,000 digits": ([10**5000], {}),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request_is_refused(name: str, llm: LLM) -> None:
    prompts, settings = BAD_REQUESTS[name]
    steps = llm.engine.core.scheduler.stats.num_steps
    with pytest.raises(RequestError):
        llm.generate(prompts, SamplingParams(**settings))
    assert llm.engine.core.scheduler.stats.num_steps == steps


@pytest.mark.parametrize("params", [{"temperature": 0}, [None], [GREEDY, None], [GREEDY, GREEDY], "greedy", 5])
def test_params_that_are_none_are_refused(params: Any, llm: LLM) -> None:
    for ask in (llm.generate, llm.add, lambda prompt, params: next(llm.stream(prompt, params))):
        with pytest.raises(RequestError):
            ask([1], params)


@pytest.mark.parametrize("messages", [None, 5, b"abc", {"role": "user", "content": "a"}])
def test_messages_that_are_no_list_are_refused(messages: Any, llm: LLM) -> None:
    with pytest.raises(RequestError, match="list of messages"):
        llm.chat(messages)


def test_one_bad_prompt_refuses_the_batch_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate([CANARY, [VOCAB_SIZE], NEIGHBOUR], GREEDY)
    assert llm.engine.core.scheduler.stats.num_steps == 0
    assert not llm.engine.core.has_unfinished


def test_no_token_left_to_sample(llm: LLM) -> None:
    """Ids that the tokenizer does not have are never sampled, so allowing only those leaves none."""
    nothing = GREEDY.replace(allowed_token_ids=[VOCAB_SIZE - 2, VOCAB_SIZE - 1])
    alone = ask(llm, NEIGHBOUR)
    failed, neighbour = llm.generate([CANARY, NEIGHBOUR], [nothing, GREEDY])
    assert failed.outputs[0].finish_reason is FinishReason.ERROR
    assert failed.outputs[0].token_ids == []
    assert (neighbour.outputs[0].token_ids, neighbour.outputs[0].logprobs) == (alone.token_ids, alone.logprobs)


def test_nan_in_the_middle_of_an_output(llm: LLM, golden: CompletionOutput) -> None:
    """The tokens before the fault are kept, and none of its blocks is found by the same request later."""
    embedding = llm.engine.core.runner.model._embedding  # type: ignore[attr-defined]
    alone = ask(llm, NEIGHBOUR)
    victim = next(i for i, token in enumerate(golden.token_ids) if i >= 4 and token not in alone.token_ids + NEIGHBOUR)
    token = golden.token_ids[victim]
    assert token not in CANARY
    first = golden.token_ids.index(token)
    kept = embedding[token].clone()
    embedding[token] = float("nan")
    failed, neighbour = llm.generate([CANARY, NEIGHBOUR], GREEDY)
    embedding[token] = kept
    assert failed.outputs[0].finish_reason is FinishReason.ERROR
    assert failed.outputs[0].token_ids == golden.token_ids[: first + 1]
    assert failed.outputs[0].logprobs == (golden.logprobs or [])[: first + 1]
    assert (neighbour.outputs[0].token_ids, neighbour.outputs[0].logprobs) == (alone.token_ids, alone.logprobs)


def test_a_passing_nan_leaves_nothing_in_the_prefix_cache(llm: LLM) -> None:
    """The first chunk is cached before the last one has logits that show what is wrong with it."""
    embedding = llm.engine.core.runner.model._embedding  # type: ignore[attr-defined]
    kept = embedding[CANARY[3]].clone()
    embedding[CANARY[3]] = float("nan")
    failed = ask(llm)
    embedding[CANARY[3]] = kept
    assert (failed.finish_reason, failed.token_ids) == (FinishReason.ERROR, [])
    assert llm.engine.core.scheduler.stats.num_cached_blocks == 0


class Failing:
    """A runner that raises in some steps, before or after it has run them."""

    def __init__(self, llm: LLM, error: BaseException, steps: range, *, after: bool) -> None:
        core = llm.engine.core
        self._runner, core.runner = core.runner, self
        self._error, self._steps, self._after = error, steps, after
        self._num_calls = 0

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        fails = self._num_calls in self._steps
        self._num_calls += 1
        if fails and not self._after:
            raise self._error
        output = self._runner.execute(step)
        if fails:
            raise self._error
        return output


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", [0, 2, 3, 7])
def test_a_step_that_raises_ends_its_requests_only(step: int, after: bool, llm: LLM, golden: CompletionOutput) -> None:
    Failing(llm, RuntimeError("device lost its way"), range(step, step + 1), after=after)
    failed = ask(llm)
    assert failed.finish_reason is FinishReason.ERROR
    assert "device lost its way" in (failed.error or "")
    # Three chunks read the canary, and the third has the first token.
    assert failed.token_ids == golden.token_ids[: max(0, step - 2)]


def test_steps_that_keep_raising_end_the_engine(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    Failing(llm, RuntimeError("gone"), range(100), after=False)
    for _ in range(2):
        assert ask(llm).finish_reason is FinishReason.ERROR
    with pytest.raises(EngineDeadError, match="gone"):
        ask(llm)


@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_in_a_step(after: bool, llm: LLM) -> None:
    Failing(llm, KeyboardInterrupt(), range(3, 4), after=after)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([CANARY, NEIGHBOUR], GREEDY)


def test_an_exception_in_a_callback_aborts_what_runs(llm: LLM) -> None:
    def fail(progress: object) -> None:
        raise ValueError("from the caller")

    with pytest.raises(ValueError, match="from the caller"):
        llm.generate([CANARY, NEIGHBOUR], GREEDY, on_progress=fail)
