"""This module holds forty real prompts on SmolLM2-135M: token for token what transformers says, in every configuration.
It does not know how the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import FinishReason, RequestOutput
from octavo.kernels.attention import gather

from ..smollm2 import load_prompts, load_reference, spread
from .runs import NEAR_TIE, Task, all_bits, assert_same, run

WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "steps of 16 tokens": {"max_num_batched_tokens": 16},
    "no prefix cache": {"prefix_caching": False},
    "a small pool": {"kv_cache_tokens": 1024, "max_model_len": 512},
}
TIGHT_POOL: dict[str, Any] = {"kv_cache_tokens": 304, "max_model_len": 304, "block_size": 4}
"""As small for a few prompts as 1,024 tokens are for forty."""
EOS = 2
SMALL_PROMPTS, SMALL_TOKENS = 6, 12


@pytest.fixture(scope="module")
def num_tokens(count: Callable[[int, int], int]) -> int:
    return min(64, count(SMALL_TOKENS, 64))


@pytest.fixture(scope="module")
def prompts(count: Callable[[int, int], int]) -> list[str]:
    every = load_prompts()
    return spread(every, min(len(every), count(SMALL_PROMPTS, len(every))))


def run_every_way(prompts: list[str], params: SamplingParams, *, invariant: bool) -> dict[str, list[RequestOutput]]:
    """Run in every configuration, each of which must really do what it is named after."""
    answers = {}
    for name, settings in WAYS.items():
        if name == "a small pool" and len(prompts) <= SMALL_PROMPTS:
            settings = TIGHT_POOL
        llm = LLM("smollm2-135m", device="cpu", dtype="float32", invariant=invariant, **settings)
        answers[name] = run(llm, [Task(llm.encode(prompt), params) for prompt in prompts])
        stats = llm.engine.core.scheduler.stats
        assert (stats.num_preemptions > 0) == (name == "a small pool"), f"{name}: {stats.num_preemptions} preemptions"
        assert (stats.prefix_cache_hits > 0) == (name != "no prefix cache"), name
    return answers


@pytest.fixture(scope="module")
def greedy(prompts: list[str], num_tokens: int) -> dict[str, list[RequestOutput]]:
    return run_every_way(prompts, SamplingParams(temperature=0, max_tokens=num_tokens, logprobs=2), invariant=False)


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_transformers(
    way: str, greedy: dict[str, list[RequestOutput]], num_tokens: int
) -> None:
    """Reading our whole text, transformers must choose our token at each step, but where two are nearly tied."""
    reference = load_reference()
    for answer in greedy[way]:
        (choice,) = answer.outputs
        text = torch.tensor([answer.prompt_token_ids + choice.token_ids])
        with torch.inference_mode():
            logits = reference(text).logits[0, len(answer.prompt_token_ids) - 1 : -1]
        gaps = logits.max(dim=-1).values - logits.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0]
        assert float(gaps.max()) < NEAR_TIE, f"{answer.prompt_token_ids[:8]}...: step {int(gaps.argmax())}"
        assert EOS not in choice.token_ids[:-1]
        ended = choice.token_ids[-1] == EOS
        assert choice.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert ended or len(choice.token_ids) == num_tokens


def test_greedy_tokens_are_the_same_in_every_way(greedy: dict[str, list[RequestOutput]]) -> None:
    for answers in greedy.values():
        assert_same(answers, greedy["batched"], bitwise=False)


def test_invariant_mode_gives_the_same_bits_in_every_way(
    prompts: list[str],
    num_tokens: int,
    greedy: dict[str, list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, logprobs=2)
    found = run_every_way(prompts, params, invariant=True)
    for answers in found.values():
        assert_same(answers, found["batched"], bitwise=True)
    assert_same(found["batched"], greedy["batched"], bitwise=False)
    # The control: keys merged in splits of another size give other last bits, on any machine.
    monkeypatch.setattr(gather, "SPLIT_TOKENS", 8)
    llm = LLM("smollm2-135m", device="cpu", dtype="float32", invariant=True)
    few = run(llm, [Task(llm.encode(prompt), params) for prompt in prompts[:2]])
    assert all_bits(few) != all_bits(found["batched"][:2])


def test_three_choices_of_one_seed_differ_and_repeat(num_tokens: int) -> None:
    params = SamplingParams(temperature=1, seed=7, n=3, max_tokens=min(num_tokens, 16), logprobs=2, ignore_eos=True)
    found = run_every_way(spread(load_prompts(), SMALL_PROMPTS)[:3], params, invariant=True)
    for answer in found["batched"]:
        assert len({tuple(choice.token_ids) for choice in answer.outputs}) == 3
    for answers in found.values():
        assert_same(answers, found["batched"], bitwise=True)
