"""Outputs follow what was asked for, whatever else a request wants, and nobody beside it notices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import CompletionOutput, FinishReason

from ..checkpoints import BOS, EOS, SECOND_EOS, make_prompts
from ..equivalence.runs import Task, assert_idle, assert_same, run, run_alone
from .conftest import MakeLLM
from .schemas import SCHEMAS

PROMPT = make_prompts([20], seed=3)[0]
SPECIAL = {BOS, EOS, SECOND_EOS}
A, B, C = 64, 65, 66
"""Token ids of "a", "b", "c"."""


def answers(llm: LLM, wanted: dict[str, Any], **params: Any) -> list[CompletionOutput]:
    defaults: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 200}
    answer = run(llm, [Task(PROMPT, SamplingParams(structured_outputs=wanted, **(defaults | params)))])[0]
    return answer.outputs


def answer(llm: LLM, wanted: dict[str, Any], **params: Any) -> CompletionOutput:
    return answers(llm, wanted, **params)[0]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_json_follows_its_schema(kind: str, llm: LLM, count: Callable[[int, int], int]) -> None:
    validator = jsonschema_rs.validator_for(SCHEMAS[kind])
    for seed in range(count(2, 30)):
        for choice in answers(llm, {"json": SCHEMAS[kind]}, n=3, seed=seed):
            assert choice.finish_reason is FinishReason.STOP, choice.text
            validator.validate(json.loads(choice.text))
            assert not SPECIAL & set(choice.token_ids[:-1])


def test_n_choices_differ(llm: LLM) -> None:
    assert len({choice.text for choice in answers(llm, {"json": SCHEMAS["object"]}, n=3)}) == 3


def test_any_json_object(llm: LLM) -> None:
    texts = [choice.text for seed in range(4) for choice in answers(llm, {"json_object": True}, seed=seed, n=4)]
    assert all(text.startswith("{") for text in texts)
    ended = [text for text in texts if text.endswith("}") and isinstance(_json_or_none(text), dict)]
    assert ended, "none of 16 objects came to its end"


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("regex", [r"[a-z]{2,5}", r"^\d{3}-(yes|no)$", r"a/b\\c\"", r"(th|in)+!", r"é?ü{2}", r"x|\$"])
def test_text_matches_its_regex(regex: str, llm: LLM) -> None:
    for choice in answers(llm, {"regex": regex}, n=4):
        assert choice.finish_reason is FinishReason.STOP
        assert re.fullmatch(regex, choice.text)


def test_text_is_one_of_the_choices(llm: LLM) -> None:
    choices = ["yes", "yes!", "no", 'a "b"\n\\', "é🦜", "<eos>"]
    found = {choice.text for seed in range(6) for choice in answers(llm, {"choice": choices}, n=4, seed=seed)}
    assert found <= set(choices)
    assert len(found) > 2


def test_text_follows_a_grammar_that_no_regex_can_say(llm: LLM) -> None:
    for choice in answers(llm, {"grammar": 'start: "(" start ")" | "ab"'}, n=4, max_tokens=120):
        depth = choice.text.count("(")
        assert choice.finish_reason is FinishReason.LENGTH or choice.text == "(" * depth + "ab" + ")" * depth


def test_an_output_ends_where_nothing_can_follow(llm: LLM) -> None:
    """Without an end-of-sequence token, whatever asks for more tokens."""
    for params in ({}, {"ignore_eos": True}, {"min_tokens": 20}, {"max_tokens": 3}, {"allowed_token_ids": [A, B]}):
        choice = answer(llm, {"regex": "[ab]{3}"}, **params)
        assert (choice.finish_reason, choice.stop_reason, len(choice.token_ids)) == (FinishReason.STOP, None, 3)
        assert len(choice.text) == 3


@pytest.mark.parametrize("params", [{"allowed_token_ids": [A]}, {"allowed_token_ids": [A, EOS], "min_tokens": 9}])
def test_an_output_that_is_complete_ends_rather_than_fails(params: dict[str, Any], llm: LLM) -> None:
    """Something could follow, but is not allowed, and nor is a stop token."""
    choice = answer(llm, {"regex": "ab?"}, **params)
    assert (choice.finish_reason, choice.token_ids, choice.text) == (FinishReason.STOP, [A], "a")


def test_an_output_that_may_end_does_so_by_a_stop_token(llm: LLM) -> None:
    choice = answer(llm, {"regex": "[ab]*"}, logit_bias={EOS: 4.0})
    assert choice.finish_reason is FinishReason.STOP
    assert choice.token_ids[-1] == EOS
    assert choice.text == llm.tokenizer.decode(choice.token_ids[:-1])
    assert answer(llm, {"regex": "[ab]*"}, logit_bias={EOS: 9.0}, min_tokens=9).token_ids.index(EOS) >= 9
    assert len(answer(llm, {"regex": "[ab]*"}, logit_bias={EOS: 9.0}, ignore_eos=True, max_tokens=30).token_ids) == 30
    own = answer(llm, {"regex": "[ab]*"}, stop_token_ids=[BOS], logit_bias={BOS: 9.0}, ignore_eos=True)
    assert (own.token_ids[-1], own.stop_reason) == (BOS, BOS)


def test_an_output_cut_by_its_length_says_so(llm: LLM) -> None:
    choice = answer(llm, {"json": SCHEMAS["object"]}, max_tokens=4)
    assert (choice.finish_reason, len(choice.token_ids)) == (FinishReason.LENGTH, 4)


def test_a_stop_string_ends_json_too(llm: LLM) -> None:
    choice = answer(llm, {"json": SCHEMAS["object"]}, stop=['"b"'])
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, '"b"')
    assert choice.text.startswith("{")
    assert '"b"' not in choice.text


def test_other_limits_on_tokens_hold_inside_a_grammar(llm: LLM) -> None:
    texts = [choice.text for choice in answers(llm, {"regex": "[a-d]{8}"}, n=8, bad_words_token_ids=[[A], [B, C]])]
    assert all("a" not in text and "bc" not in text for text in texts)
    few = [choice.text for choice in answers(llm, {"regex": "[a-d]{8}"}, n=4, allowed_token_ids=[A, C, 200])]
    assert all(set(text) <= {"a", "c"} for text in few)
    pushed = answer(llm, {"regex": "[a-d]{8}"}, logit_bias={C: 50.0, 200: 100.0}, logprobs=2)
    assert pushed.text == "c" * 8
    assert pushed.logprobs is not None
    assert len(pushed.logprobs) == 8


@pytest.mark.parametrize(
    "params", [{"allowed_token_ids": [B]}, {"bad_words_token_ids": [[A]]}, {"bad_words_token_ids": [[A, A]]}]
)
def test_a_dead_end_fails_alone(params: dict[str, Any], llm: LLM) -> None:
    neighbour = Task(PROMPT, SamplingParams(temperature=0, max_tokens=8, logprobs=1))
    dead = Task(PROMPT, SamplingParams(temperature=0, structured_outputs={"regex": "a{5}"}, **params))
    (failed,), alone = run(llm, [dead]), run(llm, [neighbour])
    assert failed.outputs[0].finish_reason is FinishReason.ERROR
    assert "no token is left" in (failed.outputs[0].error or "")
    param = "allowed_token_ids" if "allowed_token_ids" in params else "structured_outputs"
    assert failed.outputs[0].error_param == param
    assert_same(run(llm, [neighbour, dead])[:1], alone, bitwise=True)


def test_masks_are_computed_beside_the_model(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    runner = llm.engine.core.runner
    seen: list[bool] = []
    forward = runner.model.forward  # type: ignore[attr-defined]

    def watched(*args: Any) -> Any:
        extras = [each for each in runner._sampler._extras if each is not None]  # type: ignore[attr-defined]
        seen.extend(each.grammar._next is not None for each in extras)
        return forward(*args)

    monkeypatch.setattr(runner.model, "forward", watched)  # type: ignore[attr-defined]
    assert len(answer(llm, {"regex": "[a-z]{6}"}, temperature=0.5).token_ids) == len(seen) > 2
    assert all(seen)


def test_an_aborted_request_leaves_nothing(llm: LLM) -> None:
    for num_steps in (0, 1, 3):
        request_id = llm.add(PROMPT, SamplingParams(structured_outputs={"json_object": True}, n=2, max_tokens=50))
        for _ in range(num_steps):
            llm.step()
        llm.abort(request_id)
        assert_idle(llm)


def tasks() -> list[Task]:
    prompts = make_prompts([70, 9, 33], seed=5)
    drawn: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 60, "logprobs": 2}
    wanted: list[dict[str, Any]] = [
        *({"structured_outputs": {"json": SCHEMAS[kind]}, "n": 3} for kind in ("object", "ref", "anyOf")),
        {"structured_outputs": {"regex": "[a-z ]*"}, "min_tokens": 5, "frequency_penalty": 0.5},
        {"structured_outputs": {"json": SCHEMAS["object"]}, "stop": ['"b"', "3"]},
        {"structured_outputs": {"choice": ["yes", "no", "nothing"]}, "n": 2, "ignore_eos": True},
        {},
        {"temperature": 0},
    ]
    return [Task(prompts[i % 3], SamplingParams(**(drawn | each))) for i, each in enumerate(wanted)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 5},
        {"preempt_every": 1},
        {"preempt_every": 2, "max_num_batched_tokens": 16, "miss_prefix_cache": True},
        {"kv_cache_tokens": 160, "max_model_len": 160},
    ],
    ids=["together", "tiny chunks", "preempted in every step", "preempted, chunked, never cached", "a small pool"],
)
def test_every_way_of_running_gives_the_same_bits(settings: dict[str, Any], make_llm: MakeLLM, llm: LLM) -> None:
    """With and without a grammar: neighbours included."""
    assert_same(run(make_llm(**settings), tasks()), run_alone(llm, tasks()), bitwise=True)
