"""This module holds cases that each were a bug in somebody's engine, by name. It does not know how ours avoids them."""

from __future__ import annotations

import pytest
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import FinishReason

from ..checkpoints import make_prompts
from .conftest import MakeLLM
from .runs import Task, assert_idle, assert_same, run, run_alone

GREEDY = {"temperature": 0, "max_tokens": 12, "logprobs": 2}
LETTERS = list(range(64, 90))
"""Ids of the bytes a to z."""


def tasks_for(*prompts: list[int], **settings: object) -> list[Task]:
    return [Task(prompt, SamplingParams.from_mapping(GREEDY | settings)) for prompt in prompts]


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_prefix_hit_of_exactly_k_blocks_is_the_whole_prompt(num_blocks: int, make_llm: MakeLLM) -> None:
    (prompt,) = make_prompts([16 * num_blocks], seed=1)
    task = tasks_for(prompt)
    llm = make_llm(invariant=True)
    cold, warm = run(llm, task), run(llm, task)
    assert_same(warm, cold, bitwise=True)
    assert warm[0].num_cached_tokens == 16 * (num_blocks - 1), "the last token must be run to have logits"


def test_preempt_then_resume_onto_own_orphan_blocks(make_llm: MakeLLM) -> None:
    (prompt,) = make_prompts([40], seed=2)
    tasks = tasks_for(prompt, max_tokens=40)
    llm = make_llm(invariant=True, preempt_every=2)
    found = run(llm, tasks)
    stats = llm.engine.core.scheduler.stats
    metrics = found[0].outputs[0].metrics
    assert metrics is not None
    assert metrics.num_preemptions >= 10
    assert stats.prefix_cache_hits >= 10 * 32, "it never found its own blocks"
    assert_same(found, run(make_llm(invariant=True, prefix_caching=False), tasks), bitwise=True)


def test_two_requests_sharing_a_prefix_in_the_same_step(make_llm: MakeLLM) -> None:
    shared, one, other = make_prompts([48, 9, 5], seed=3)
    tasks = tasks_for(shared + one, shared + other, shared + one)
    llm = make_llm(invariant=True)
    found = run(llm, tasks)
    assert [answer.num_cached_tokens for answer in found] == [0, 48, 48]
    assert_same(found, run_alone(make_llm(invariant=True, prefix_caching=False), tasks), bitwise=True)


@pytest.mark.parametrize("aborted", [0, 1])
def test_same_prefix_computed_twice_then_one_copy_freed(aborted: int, make_llm: MakeLLM) -> None:
    """Two sequences write the same block, which only outputs fill, so neither could wait for the other."""
    (prompt,) = make_prompts([10], seed=4)
    (whole,) = run(make_llm(invariant=True, prefix_caching=False), tasks_for(prompt, max_tokens=40))
    llm = make_llm(invariant=True, kv_cache_tokens=128)
    core, (task,) = llm.engine.core, tasks_for(prompt, max_tokens=40)
    tokens: dict[str, list[int]] = {"0": [], "1": []}
    for request_id in tokens:
        core.add_request(request_id, prompt, task.params, stream=True)
    while core.has_unfinished:
        for news in core.step():
            tokens[news.request_id] += news.new_token_ids
        if len(tokens[str(aborted)]) == 10:
            core.abort(str(aborted))
        core.scheduler.check_integrity()
    assert tokens[str(aborted)] == whole.outputs[0].token_ids[:10]
    assert tokens[str(1 - aborted)] == whole.outputs[0].token_ids
    # A third one begins where they ended, and finds what is left.
    text = prompt + whole.outputs[0].token_ids[:30]
    (after,) = run(llm, tasks_for(text, max_tokens=10))
    assert after.num_cached_tokens == 32
    assert after.outputs[0].token_ids == whole.outputs[0].token_ids[30:]


def test_abort_during_chunked_prefill(make_llm: MakeLLM) -> None:
    (prompt,) = make_prompts([100], seed=5)
    tasks = tasks_for(prompt)
    llm = make_llm(invariant=True, max_num_batched_tokens=24)
    core = llm.engine.core
    core.add_request("gone", prompt, tasks[0].params)
    for _ in range(2):
        assert core.step() == []
    (news,) = core.abort("gone")
    assert (news.finish_reason, news.new_token_ids) == (FinishReason.ABORT, [])
    assert_idle(llm)
    found = run(llm, tasks)
    assert found[0].num_cached_tokens == 48, "two chunks of 24 fill three blocks of 16"
    assert_same(found, run(make_llm(invariant=True, prefix_caching=False), tasks), bitwise=True)


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_straddling_two_tokens(include: bool, make_llm: MakeLLM) -> None:
    prompts = make_prompts([9, 30], seed=6)
    settings = {"temperature": 1.0, "seed": 1, "allowed_token_ids": LETTERS, "max_tokens": 20}
    llm = make_llm()
    free = run(llm, tasks_for(*prompts, **settings))
    for answer, prompt in zip(free, prompts, strict=True):
        text = answer.outputs[0].text
        assert len(text) == 20
        stop = text[6:8]
        at = text.index(stop)
        (task,) = tasks_for(prompt, stop=[stop], include_stop_str_in_output=include, **settings)
        (choice,) = run(llm, [task])[0].outputs
        assert choice.text == text[: at + 2 * include]
        assert choice.token_ids == answer.outputs[0].token_ids[: at + 2]
        assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, stop)
        assert len(choice.logprobs or ()) == at + 2


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32])
def test_last_block_exactly_full_then_one_decode(length: int, make_llm: MakeLLM) -> None:
    (prompt,) = make_prompts([length], seed=7)
    reference = run(make_llm(invariant=True, block_size=256), tasks_for(prompt, max_tokens=4))
    for max_tokens in (1, 2, 3):
        tasks = tasks_for(prompt, max_tokens=max_tokens)
        # No slot more than prompt and output take; the last output has no place of its own.
        llm = make_llm(invariant=True, kv_cache_tokens=-(-(length + max_tokens) // 16) * 16)
        (choice,) = run(llm, tasks)[0].outputs
        assert choice.token_ids == reference[0].outputs[0].token_ids[:max_tokens]
        assert choice.finish_reason is FinishReason.LENGTH


def test_a_mutable_max_tokens_of_1(make_llm: MakeLLM) -> None:
    """One parameter object serves many requests, and none of them may count it down."""
    prompts = make_prompts([5, 16, 33], seed=8)
    params = SamplingParams(temperature=0, max_tokens=1, min_tokens=1)
    llm = make_llm(max_num_batched_tokens=16)
    for _ in range(2):
        answers = llm.generate(prompts, params)
        assert [len(answer.outputs[0].token_ids) for answer in answers] == [1, 1, 1]
        assert all(answer.outputs[0].finish_reason is FinishReason.LENGTH for answer in answers)
    assert (params.max_tokens, params.min_tokens) == (1, 1)
    assert_idle(llm)
