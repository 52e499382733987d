"""This module holds what `LLM` promises its callers, against transformers where there is a number. It does not know the
scheduler.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError, RequestError
from octavo.engine.llm import LLM, GenerationProgress
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import FinishReason
from transformers import LlamaForCausalLM

from ..checkpoints import make_prompts

MakeLLM = Callable[..., LLM]
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
NUM_IDS = 261
"""Of the tokenizer; the logits are wider."""


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()


def test_text_and_its_token_ids_are_the_same_prompt(make_llm: MakeLLM) -> None:
    llm = make_llm()
    by_text, by_ids = llm.generate(["within the thing", llm.encode("within the thing")], GREEDY)
    assert by_text.prompt == "within the thing"
    assert by_ids.prompt is None
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert len(by_text.outputs[0].token_ids) == 16, "the default of max_tokens"
    assert (by_text.finished, by_text.outputs[0].finish_reason) == (True, FinishReason.LENGTH)


def test_answers_come_in_the_order_of_prompts(make_llm: MakeLLM) -> None:
    prompts = make_prompts([30, 1, 70, 5], seed=1)
    params = [GREEDY.replace(max_tokens=max_tokens) for max_tokens in (9, 2, 1, 14)]
    answers = make_llm().generate(prompts, params)
    assert [answer.prompt_token_ids for answer in answers] == prompts
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [9, 2, 1, 14]


def test_one_set_of_parameters_for_all_or_one_each(make_llm: MakeLLM) -> None:
    llm = make_llm()
    with pytest.raises(RequestError, match="2 sampling parameters for 3 prompts"):
        llm.generate([[1], [2], [3]], [GREEDY, GREEDY])
    assert llm.generate([]) == []


def test_settings_by_name_or_as_one_object(tiny_folder: Path) -> None:
    config = EngineConfig.from_settings({"model": str(tiny_folder), "kv_cache_tokens": 256})
    assert LLM(config=config).engine.resolved.num_blocks == 4
    with pytest.raises(ConfigError, match="one or the other"):
        LLM(str(tiny_folder), config=config)
    with pytest.raises(ConfigError, match="blok_size"):
        LLM(str(tiny_folder), blok_size=16)


def test_requests_without_a_seed_differ_and_an_engine_repeats(make_llm: MakeLLM) -> None:
    params = SamplingParams(temperature=1, max_tokens=10, ignore_eos=True)

    def draw(seed: int) -> list[list[int]]:
        return [answer.outputs[0].token_ids for answer in make_llm(seed=seed).generate([[5, 6]] * 3, params)]

    first, again, other = draw(1), draw(1), draw(2)
    assert first == again
    assert len({tuple(tokens) for tokens in first + other}) == 6


def test_defaults_of_the_checkpoint_count_unless_turned_off(
    make_llm: MakeLLM, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "greedy")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    greedy = make_llm().generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids

    def answer(params: dict[str, Any], **settings: Any) -> list[int]:
        llm = LLM(str(folder), device="cpu", kv_cache_tokens=1024, **settings)
        return llm.generate([5, 6, 7], SamplingParams(ignore_eos=True, seed=3, **params))[0].outputs[0].token_ids

    assert answer({}) == greedy
    drawn = answer({}, generation_config="none")
    assert drawn != greedy
    assert answer({"temperature": 1.0}) == drawn


def test_progress_counts_every_token(make_llm: MakeLLM) -> None:
    seen: list[tuple[int, int, int]] = []

    def note(progress: GenerationProgress) -> None:
        seen.append((progress.num_finished, progress.num_prefill_tokens, progress.num_output_tokens))

    llm = make_llm(max_num_batched_tokens=32)
    llm.generate(make_prompts([40, 20], seed=2), GREEDY.replace(max_tokens=5), on_progress=note)
    assert seen == sorted(seen)
    assert seen[-1] == (2, 60, 10)
    llm.generate([[3]], GREEDY.replace(max_tokens=2), on_progress=note)
    assert seen[-1] == (1, 0, 2), "a second call starts from nothing"


def test_prompt_logprobs_are_those_of_transformers(make_llm: MakeLLM, reference: LlamaForCausalLM) -> None:
    prompts = make_prompts([2, 90], seed=4)
    params = GREEDY.replace(max_tokens=1, prompt_logprobs=3)
    for answer in make_llm(max_num_batched_tokens=48).generate(prompts, params):
        with torch.inference_mode():
            logits = reference(torch.tensor([answer.prompt_token_ids])).logits[0, :-1, :NUM_IDS]
        expected = logits.log_softmax(-1)
        assert answer.prompt_logprobs is not None
        assert answer.prompt_logprobs[0] is None
        for row, token, entry in zip(expected, answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True):
            assert entry is not None
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert entry.rank == int((row >= row[token]).sum())
            assert entry.top_ids == row.topk(3).indices.tolist()
            assert entry.top_logprobs == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_prompt_logprobs_take_no_tokens_from_the_cache(make_llm: MakeLLM) -> None:
    """Positions found in the prefix cache have no logits, so they are computed again."""
    llm = make_llm()
    (prompt,) = make_prompts([64], seed=5)
    params = GREEDY.replace(max_tokens=1, prompt_logprobs=1)
    cold, warm = (llm.generate(prompt, params)[0] for _ in range(2))
    assert cold.prompt_logprobs == warm.prompt_logprobs
    assert warm.num_cached_tokens == 0


def test_hidden_states_are_those_of_transformers(make_llm: MakeLLM, reference: LlamaForCausalLM) -> None:
    prompts = make_prompts([3, 50], seed=6)
    params = GREEDY.replace(max_tokens=4, return_hidden_states=[2, 0, 1])
    plain = GREEDY.replace(max_tokens=4)
    *answers, other = make_llm(max_num_batched_tokens=24).generate([*prompts, [9]], [params, params, plain])
    assert other.outputs[0].hidden_states is None
    for answer in answers:
        (choice,) = answer.outputs
        text = torch.tensor([answer.prompt_token_ids + choice.token_ids])
        with torch.inference_mode():
            states = reference(text, output_hidden_states=True).hidden_states
        first = len(answer.prompt_token_ids) - 1
        expected = torch.stack([states[layer][0, first:-1] for layer in (2, 0, 1)], dim=1)
        assert choice.hidden_states is not None
        torch.testing.assert_close(torch.from_numpy(choice.hidden_states), expected, rtol=0, atol=2e-5)


def test_metrics_of_a_preempted_request(make_llm: MakeLLM) -> None:
    (choice,) = make_llm(preempt_every=4).generate([5] * 20, GREEDY)[0].outputs
    metrics = choice.metrics
    assert metrics is not None
    assert metrics.num_preemptions > 0
    times = [
        metrics.arrival_time_s,
        metrics.first_scheduled_time_s,
        metrics.first_token_time_s,
        metrics.finish_time_s,
    ]
    assert None not in times
    assert times == sorted(times, key=lambda time: time or 0.0)


def test_a_model_without_a_tokenizer_refuses_what_needs_text(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    llm = LLM(str(folder), device="cpu", kv_cache_tokens=256)
    assert len(llm.generate([5, 6], GREEDY)[0].outputs[0].token_ids) == 16
    with pytest.raises(RequestError, match="stop_token_ids"):
        llm.generate([5, 6], GREEDY.replace(stop=["a"]))
    with pytest.raises(ConfigError, match="no tokenizer"):
        llm.generate("a", GREEDY)
