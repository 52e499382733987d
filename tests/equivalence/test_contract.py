"""This module holds what autoregressive generation promises: each token from all before it, until an end. It does not
know batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import FinishReason

from ..checkpoints import EOS, SECOND_EOS, make_prompts
from .conftest import MakeLLM
from .runs import assert_idle, bits

LETTERS = list(range(64, 90))
"""Ids of the bytes a to z."""
NUM_IDS = 261
"""Of the tokenizer; the logits are wider."""


@pytest.fixture(scope="module")
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm(invariant=True)


@pytest.mark.parametrize(("eos", "other"), [(EOS, SECOND_EOS), (SECOND_EOS, EOS)])
def test_every_eos_id_ends_a_sequence(eos: int, other: int, llm: LLM) -> None:
    bias = {eos: 100.0, other: -100.0}
    (prompt,) = make_prompts([5], seed=1)

    def answer(**settings: Any) -> tuple[list[int], FinishReason | None, str]:
        params = SamplingParams(temperature=0, max_tokens=8, logit_bias=bias, **settings)
        (choice,) = llm.generate(prompt, params)[0].outputs
        assert choice.stop_reason is None, "the end of a sequence is no stop token that the request named"
        return choice.token_ids, choice.finish_reason, choice.text

    assert answer() == ([eos], FinishReason.STOP, "")
    assert answer(ignore_eos=True)[:2] == ([eos] * 8, FinishReason.LENGTH)
    tokens, reason, _ = answer(min_tokens=3)
    assert (len(tokens), tokens[-1], reason) == (4, eos, FinishReason.STOP)
    assert eos not in tokens[:-1]
    assert_idle(llm)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_of_the_request_ends_it(include: bool, llm: LLM) -> None:
    (prompt,) = make_prompts([12], seed=2)
    params = SamplingParams(temperature=1, seed=1, max_tokens=20, allowed_token_ids=LETTERS)
    (free,) = llm.generate(prompt, params)[0].outputs
    stop = free.token_ids[7]
    at = free.token_ids.index(stop)
    params = params.replace(stop_token_ids=[stop], include_stop_str_in_output=include)
    (choice,) = llm.generate(prompt, params)[0].outputs
    assert choice.token_ids == free.token_ids[: at + 1]
    assert choice.text == free.text[: at + include]
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("length", [1, 200, 255])
def test_generation_ends_at_the_context_limit(length: int, llm: LLM) -> None:
    (prompt,) = make_prompts([length], seed=3)
    left = 256 - length
    params = SamplingParams(temperature=0, max_tokens=left, ignore_eos=True)
    (choice,) = llm.generate(prompt, params)[0].outputs
    assert (len(choice.token_ids), choice.finish_reason) == (left, FinishReason.LENGTH)
    assert_idle(llm)


def test_feedback_a_cached_step_is_the_full_recomputation(llm: LLM, make_llm: MakeLLM) -> None:
    """The log-probability of each output equals, bit for bit, that of the same token read in a prompt."""
    prompts = make_prompts([1, 20, 64], seed=4)
    params = SamplingParams(temperature=1, seed=5, max_tokens=30, logprobs=4, ignore_eos=True)
    fresh = make_llm(invariant=True, prefix_caching=False)
    for answer in llm.generate(prompts, params):
        (choice,) = answer.outputs
        text = answer.prompt_token_ids + choice.token_ids
        (read,) = fresh.generate(text, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=4))
        assert read.prompt_logprobs is not None
        entries = read.prompt_logprobs[len(answer.prompt_token_ids) :]
        for ours, theirs in zip(choice.logprobs or (), entries, strict=True):
            assert theirs is not None
            assert bits(ours) == bits(theirs)


def test_a_prompt_id_without_a_token_has_no_probability(llm: LLM) -> None:
    """Nothing that could be sampled shares its mass with it; what follows it is reported as ever."""
    text = [5, 290, 7, 9]
    (answer,) = llm.generate(text, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3))
    assert answer.prompt_logprobs is not None
    nothing, missing, *rest = answer.prompt_logprobs
    assert nothing is None
    assert missing is not None
    assert (missing.logprob, missing.rank) == (-math.inf, NUM_IDS + 1)
    for entry in (missing, *rest):
        assert entry is not None
        assert max(entry.top_ids) < NUM_IDS
        assert math.isfinite(entry.top_logprobs[2])
    assert all(entry is not None and math.isfinite(entry.logprob) for entry in rest)


def test_greedy_takes_the_likeliest_token(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=1, ignore_eos=True)
    for answer in llm.generate(make_prompts([3, 70], seed=6), params):
        for token, entry in zip(answer.outputs[0].token_ids, answer.outputs[0].logprobs or (), strict=True):
            assert entry.rank == 1
            assert token == entry.top_ids[0]
            assert entry.logprob == entry.top_logprobs[0]


def test_streamed_text_is_the_decoded_whole(llm: LLM, count: Callable[[int, int], int], seed: int) -> None:
    """Random bytes: most are no UTF-8, some make characters of two to four bytes together."""
    for trial in range(seed, seed + count(5, 200)):
        (prompt,) = make_prompts([8], seed=trial)
        params = SamplingParams(temperature=1.5, seed=trial, max_tokens=60, ignore_eos=True)
        seen = ""
        num_tokens = 0
        for output in llm.stream(prompt, params):
            (choice,) = output.outputs
            assert choice.text.startswith(seen), "text that was shown has changed"
            assert len(choice.token_ids) == num_tokens + 1
            seen, num_tokens = choice.text, len(choice.token_ids)
        assert seen == llm.tokenizer.decode(choice.token_ids)
        (again,) = llm.generate(prompt, params)[0].outputs
        assert (again.text, again.token_ids) == (seen, choice.token_ids)
    assert_idle(llm)


def test_closing_a_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(make_prompts([100], seed=7)[0], SamplingParams(max_tokens=50, ignore_eos=True))
    for _ in range(3):
        next(stream)
    assert llm.engine.core.scheduler.stats.num_running == 1
    stream.close()
    assert_idle(llm)
