"""A model that must call a tool does so, whatever its weights, with arguments that its schema takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
from octavo.engine.errors import RequestError
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import FinishReason
from octavo.engine.text import CallDelta, TextDelta, ToolFormat, ToolSession

from ..checkpoints import EOS, make_prompts

PROMPT = make_prompts([12], seed=8)[0]
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "$defs": {"unit": {"enum": ["c", "f"]}},
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 4}, "unit": {"$ref": "#/$defs/unit"}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "get_weather_2": {
        "type": "object",
        "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 14}},
        "required": ["days"],
        "additionalProperties": False,
    },
    "noop": {"type": "object", "properties": {}, "additionalProperties": False},
}


def tools(**more: Any) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for name, schema in SCHEMAS.items():
        function = {"name": name} | ({} if name == "noop" else {"parameters": schema}) | more
        made.append({"type": "function", "function": function})
    return made


def calls_of(
    llm: LLM, session: ToolSession, **params: Any
) -> list[tuple[str, list[tuple[str, str]], FinishReason | None]]:
    """Return each choice's text, its calls as (name, arguments), and why it ended."""
    defaults: dict[str, Any] = {"temperature": 1.0, "max_tokens": 220, "n": 3}
    wanted = SamplingParams(structured_outputs=session.structured_outputs, stop=session.stop, **(defaults | params))
    found = []
    for choice in llm.generate(PROMPT, wanted)[0].outputs:
        stream = session.stream()
        deltas = stream.feed(choice.text) + stream.finish()
        calls: list[list[str]] = []
        for delta in deltas:
            if isinstance(delta, CallDelta):
                calls += [[delta.name, ""]] if delta.name is not None else []
                calls[-1][1] += delta.arguments
        text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
        found.append((text, [(name, arguments) for name, arguments in calls], choice.finish_reason))
    return found


def assert_valid(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))


@pytest.mark.parametrize("tool_format", ["hermes", "llama", "qwen"])
@pytest.mark.parametrize("choice", ["required", *SCHEMAS])
def test_a_forced_call_is_valid(
    choice: str, tool_format: ToolFormat, llm: LLM, count: Callable[[int, int], int]
) -> None:
    wanted = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    session = ToolSession(tools(), wanted, parallel=False, tool_format=tool_format)
    for seed in range(count(2, 20)):
        for text, calls, reason in calls_of(llm, session, seed=seed):
            assert (text, reason, len(calls)) == ("", FinishReason.STOP, 1)
            assert choice in ("required", calls[0][0])
            assert_valid(calls)


def test_several_calls_may_be_made_where_they_may(llm: LLM) -> None:
    session = ToolSession([tools()[2]], "required")
    found = [calls for seed in range(3) for _, calls, _ in calls_of(llm, session, seed=seed, max_tokens=240)]
    assert {len(calls) for calls in found} - {1}
    for calls in found:
        assert_valid(calls[:-1])


def test_strict_tools_are_called_validly_or_not_at_all(llm: LLM) -> None:
    session = ToolSession(tools(strict=True), "auto")
    assert all(not calls for _, calls, _ in calls_of(llm, session, seed=1, max_tokens=20))
    # The tag is what the model would have to say; here a stop token after text ends the answer.
    open_tag = llm.tokenizer.encode("<tool_call>")
    assert session.structured_outputs is not None
    grammar = llm.engine.core.compile_grammar(SamplingParams(structured_outputs=session.structured_outputs))
    assert grammar is not None
    state = grammar.start(llm.tokenizer.encode("Sure. "))
    assert state.may_end
    for token_id in [*open_tag, *llm.tokenizer.encode('\n{"name": "get_weather_2", "arguments": {"days": 1')]:
        state.accept(token_id)
        assert state.error == ""
    assert not state.may_end
    for token_id in llm.tokenizer.encode(
        '}}\n</tool_call>\n<tool_call>\n{"name": "noop", "arguments": {}}\n</tool_call>'
    ):
        state.accept(token_id)
        assert state.error == ""
    assert state.may_end
    for wrong in ('{"name": "other"', '{"name": "get_weather_2", "arguments": {"days": 0', "hello"):
        assert grammar.start(llm.tokenizer.encode(f"x<tool_call>\n{wrong}")).error


def test_strict_tools_in_bare_json(llm: LLM) -> None:
    session = ToolSession(tools(strict=True), "auto", tool_format="llama")
    texts = calls_of(llm, session, seed=3, logit_bias={EOS: 3.0})
    for text, calls, reason in texts:
        assert text or calls or reason is FinishReason.STOP
        assert_valid(calls if reason is FinishReason.STOP else [])


def test_a_schema_that_cannot_be_forced_is_refused(llm: LLM) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "shoe"}}}
    session = ToolSession([{"type": "function", "function": {"name": "f", "parameters": bad}}], "required")
    with pytest.raises(RequestError, match="shoe"):
        calls_of(llm, session)
