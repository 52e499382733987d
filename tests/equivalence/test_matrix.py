"""This module holds one mixed workload under every way of running it: the answers must not change. It does not know
what the right answers are, which the tests of models and contract do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from octavo.engine.layers import linear
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import FinishReason, RequestOutput
from octavo.kernels.attention import gather

from ..checkpoints import VOCAB_SIZE, make_prompts
from .conftest import MakeLLM
from .runs import Task, all_bits, assert_same, run, run_alone
from .storm import Storm

Answers = dict[bool, list[RequestOutput]]

SMALL_POOL = {"kv_cache_tokens": 160, "max_model_len": 160}
WAYS: dict[str, dict[str, Any]] = {
    "in one batch": {},
    "one token per step": {"max_num_batched_tokens": 1},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "chunks of 64": {"max_num_batched_tokens": 64},
    "no prefix cache": {"prefix_caching": False},
    "prefix cache always missed": {"miss_prefix_cache": True},
    "preemption in every step": {"preempt_every": 1},
    "preemption every 3 steps, chunks of 16": {"preempt_every": 3, "max_num_batched_tokens": 16},
    "preemption every 2 steps, no prefix cache": {"preempt_every": 2, "prefix_caching": False},
    "preemption every 5 steps, cache missed": {"preempt_every": 5, "miss_prefix_cache": True, "max_num_seqs": 5},
    "a small pool": SMALL_POOL,
    "a small pool, no prefix cache": SMALL_POOL | {"prefix_caching": False},
    "a small pool, chunks of 16": SMALL_POOL | {"max_num_batched_tokens": 16},
    "blocks of 1": {"block_size": 1},
    "blocks of 1, a small pool": SMALL_POOL | {"block_size": 1, "max_num_batched_tokens": 64},
    "blocks of 64": {"block_size": 64},
    "blocks of 64, chunks of 16": {"block_size": 64, "max_num_batched_tokens": 16},
    "two at a time": {"max_num_seqs": 2},
    "priorities": {"policy": "priority"},
}
PREEMPTING = [name for name in WAYS if "preemption" in name or "small pool" in name]


@pytest.fixture(scope="module")
def expected(make_llm: MakeLLM, tasks: list[Task]) -> Answers:
    """Each request alone and in one piece, by whether in invariant mode."""
    return {
        invariant: run_alone(make_llm(invariant=invariant, prefix_caching=False), tasks) for invariant in (False, True)
    }


@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
@pytest.mark.parametrize("way", WAYS)
def test_same_answers(way: str, invariant: bool, make_llm: MakeLLM, tasks: list[Task], expected: Answers) -> None:
    llm = make_llm(invariant=invariant, **WAYS[way])
    found = run(llm, tasks)
    assert_same(found, expected[invariant], bitwise=invariant)
    assert (llm.engine.core.scheduler.stats.num_preemptions > 0) == (way in PREEMPTING)


@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
def test_same_answers_from_a_warm_cache(
    invariant: bool, make_llm: MakeLLM, tasks: list[Task], expected: Answers
) -> None:
    llm = make_llm(invariant=invariant)
    run(llm, tasks)
    warm = run(llm, tasks[::-1])[::-1]
    assert_same(warm, expected[invariant], bitwise=invariant)
    # A prompt of exactly two blocks: its last token is always computed, so only the first block can be a hit.
    assert warm[6].num_cached_tokens == 16
    assert warm[0].num_cached_tokens == 80


def test_default_mode_says_what_invariant_mode_says(expected: Answers) -> None:
    assert_same(expected[False], expected[True], bitwise=False)


def test_the_workload_uses_what_it_claims(expected: Answers) -> None:
    """Features that never take effect would be compared in vain."""
    choices = [choice for answer in expected[True] for choice in answer.outputs]
    reasons = {choice.finish_reason for choice in choices}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    assert any(isinstance(choice.stop_reason, str) for choice in choices), "no stop string was found"
    assert any(isinstance(choice.stop_reason, int) for choice in choices), "no stop token was sampled"
    three = expected[True][10].outputs
    assert len({tuple(choice.token_ids) for choice in three}) == 3, "the n choices are alike"
    assert len({token for choice in choices for token in choice.token_ids}) > 50, "the model repeats itself"


def test_negative_control_split_size(
    make_llm: MakeLLM, tasks: list[Task], expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys merged in splits of another size give other last bits: the bitwise comparison can see that."""
    monkeypatch.setattr(gather, "SPLIT_TOKENS", 16)
    found = run_alone(make_llm(invariant=True, prefix_caching=False), tasks)
    assert_same(found, expected[True], bitwise=False)
    assert all_bits(found) != all_bits(expected[True])
    with pytest.raises(AssertionError, match="step"):
        assert_same(found, expected[True], bitwise=True)


def linear_by_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A product that is summed in an order of its own for every number of rows, as many CPUs' are for some."""
    cut = 1 + x.shape[0] % (x.shape[1] - 1)
    return F.linear(x[:, :cut], weight[:, :cut]) + F.linear(x[:, cut:], weight[:, cut:], bias)


def test_plain_products_depend_on_their_rows_outside_invariant_mode(
    make_llm: MakeLLM, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a product's bits depend on its number of rows is up to the machine: here they do everywhere, and it is
    the mode that hides it.
    """
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(linear, "F", SimpleNamespace(linear=linear_by_rows, pad=F.pad))
    alone = run_alone(make_llm(invariant=True, prefix_caching=False), tasks)
    for settings in ({}, {"max_num_batched_tokens": 16}, {"preempt_every": 3, "miss_prefix_cache": True}):
        assert_same(run(make_llm(invariant=True, **settings), tasks), alone, bitwise=True)
    default = run(make_llm(), tasks)
    assert_same(default, alone, bitwise=False)
    assert all_bits(default) != all_bits(run_alone(make_llm(prefix_caching=False), tasks))


def test_negative_control_wrong_token(expected: Answers, make_llm: MakeLLM, tasks: list[Task]) -> None:
    """One changed prompt token is seen up to ties, too."""
    changed = [Task([*tasks[0].prompt[:-1], 7], tasks[0].params)]
    with pytest.raises(AssertionError):
        assert_same(run(make_llm(), changed), expected[False][:1], bitwise=False)


POISON = VOCAB_SIZE - 1
"""An id that the tokenizer does not have: it is taken in a prompt and never sampled."""


@pytest.mark.parametrize("settings", [{}, {"kv_cache_tokens": 256, "max_num_batched_tokens": 32}])
def test_beside_and_after_abort_storms(
    settings: dict[str, Any],
    make_llm: MakeLLM,
    tasks: list[Task],
    expected: Answers,
    count: Callable[[int, int], int],
    seed: int,
) -> None:
    llm = make_llm(invariant=True, **settings)
    prompts = [*make_prompts([3, 40, 90], seed=21), tasks[0].prompt, tasks[3].prompt]
    for trial in range(seed, seed + count(1, 20)):
        storm = Storm(llm, random.Random(trial), prompts)
        assert_same(run(llm, tasks, storm), expected[True], bitwise=True)
        assert storm.num_aborted > 20
    assert_same(run(llm, tasks), expected[True], bitwise=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 16},
        {"kv_cache_tokens": 160, "max_model_len": 160},
        {"block_size": 64, "preempt_every": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
def test_beside_neighbours_with_nan_logits(
    invariant: bool, settings: dict[str, Any], make_llm: MakeLLM, tasks: list[Task], expected: Answers
) -> None:
    """Sequences with NaN keys, values and logits end in errors; nobody else sees a bit of it, then or later."""
    llm = make_llm(invariant=invariant, **settings)
    poison_embedding(llm)
    long = tasks[3].prompt
    poisoned = [[POISON], [*long[:64], POISON], [POISON, *long[:40]], [*long[:20], POISON, *long[20:30]]]
    bad = [Task(prompt, SamplingParams(temperature=0, max_tokens=5, logprobs=1)) for prompt in poisoned]
    mixed = [bad[0], bad[1], *tasks[:10], bad[2], *tasks[10:], bad[3]]
    for _ in range(2):
        answers = run(llm, mixed)
        good = [*answers[2:12], *answers[13:-1]]
        assert_same(good, expected[invariant], bitwise=invariant)
        for answer in (answers[0], answers[1], answers[12], answers[-1]):
            assert answer.outputs[0].finish_reason is FinishReason.ERROR
            assert answer.outputs[0].token_ids == []
            assert "not finite" in (answer.outputs[0].error or "")
    assert_same(run(llm, tasks), expected[invariant], bitwise=invariant)


def poison_embedding(llm: LLM) -> None:
    """Make one token's embedding NaN, and with it every later position of a sequence that holds it."""
    llm.engine.core.runner.model._embedding[POISON] = float("nan")  # type: ignore[attr-defined]
