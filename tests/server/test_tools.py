"""Formats and tools over HTTP: what they constrain, and how calls are told."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import openai
import pytest
from octavo.engine.server.message import MessageReader, whole_message

from .serving import Running, serving

MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Ulm?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Tell.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "no_arguments"}},
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


def _ask(running: Running, **fields: Any) -> Any:
    return running.client.chat.completions.create(
        **({"model": "tiny", "messages": MESSAGES, "max_tokens": 120, "seed": 1} | fields)
    )


def test_json_schema(tiny: Running) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    answer = _ask(tiny, response_format=wanted, n=3)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema_rs.validate(SCHEMA, json.loads(choice.message.content))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in _ask(tiny, response_format=wanted, stream=True))
    assert text == answer.choices[0].message.content


def test_json_object_and_text(tiny: Running) -> None:
    ask: dict[str, Any] = {"temperature": 0, "max_tokens": 60}
    answer = _ask(tiny, response_format={"type": "json_object"}, **ask).choices[0]
    assert answer.message.content.startswith("{")
    assert _ask(tiny, response_format={"type": "text"}, **ask).choices[0] == _ask(tiny, **ask).choices[0]


def test_structured_outputs_elsewhere(tiny: Running) -> None:
    answer = tiny.client.completions.create(
        model="tiny", prompt="a", max_tokens=20, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert answer.choices[0].text in ("yes", "no")
    assert (
        _ask(tiny, extra_body={"structured_outputs": {"regex": "[ab]{4}"}}).choices[0].message.content.strip("ab") == ""
    )


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_required_call(tiny: Running, choice: Any) -> None:
    answer = _ask(tiny, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    (given,) = answer.choices
    (call,) = given.message.tool_calls
    assert given.message.content is None
    assert given.finish_reason == "tool_calls"
    assert call.type == "function"
    if choice is NAMED:
        assert call.function.name == "weather"
    if call.function.name == "weather":
        jsonschema_rs.validate(SCHEMA, json.loads(call.function.arguments))
    names, arguments, ids = [], "", []
    reasons = []
    for chunk in _ask(tiny, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, stream=True):
        reasons.append(chunk.choices[0].finish_reason)
        for piece in chunk.choices[0].delta.tool_calls or []:
            assert piece.index == 0
            names += [piece.function.name] if piece.function.name else []
            ids += [piece.id] if piece.id else []
            arguments += piece.function.arguments
    assert (names, arguments, len(ids)) == ([call.function.name], call.function.arguments, 1)
    assert reasons[-1] == "tool_calls"


def test_a_call_cut_short(tiny: Running) -> None:
    given = _ask(tiny, tools=TOOLS, tool_choice=NAMED, max_tokens=45).choices[0]
    assert given.finish_reason == "length"


def test_auto_and_none(tiny: Running) -> None:
    """A random model calls nothing by itself: the tools are told to it, or not."""
    plain = _ask(tiny, max_tokens=5)
    told = _ask(tiny, max_tokens=5, tools=TOOLS)
    untold = _ask(tiny, max_tokens=5, tools=TOOLS, tool_choice="none")
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens == untold.usage.prompt_tokens
    assert told.choices[0].message.tool_calls is None
    assert untold.choices[0].message.content == plain.choices[0].message.content
    assert _ask(tiny, max_tokens=5, tools=[]).choices[0].message.content == plain.choices[0].message.content


def test_results_of_calls_go_back(tiny: Running) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Ulm", "days": 1}'},
    }
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert _ask(tiny, messages=messages, tools=TOOLS, max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom"}]}, "tools[0]"),
        ({"tools": "weather"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS, "tool_choice": "required"}, "tools"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {}}}, "structured_outputs"),
        (
            {"extra_body": {"structured_outputs": {"regex": "a"}}, "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_refusals_name_the_field(tiny: Running, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            _ask(tiny, **fields, stream=stream)
        assert refused.value.param == param
        assert param.partition(".")[0].partition("[")[0] in str(refused.value)


@pytest.mark.parametrize("wrong", [5, True, {"a": 1}, "", [""], [5], ["x"] * 17])
def test_stop_beside_calls_is_checked_as_ever(tiny: Running, wrong: Any) -> None:
    with pytest.raises(openai.BadRequestError) as plain:
        _ask(tiny, stop=wrong)
    with pytest.raises(openai.BadRequestError) as refused:
        _ask(tiny, tools=TOOLS, parallel_tool_calls=False, stop=wrong)
    assert (refused.value.param, str(refused.value)) == ("stop", str(plain.value))


def test_the_end_of_the_only_call_needs_no_place_among_the_stops(tiny: Running) -> None:
    regex = 'a<tool_call>\\{"name": "no_arguments", "arguments": \\{\\}\\}</tool_call>b{20}'
    ask = {"tools": TOOLS, "max_tokens": 200, "extra_body": {"structured_outputs": {"regex": regex}}}
    choice = _ask(tiny, **ask, parallel_tool_calls=False, stop=["x"] * 16).choices[0]
    assert (choice.message.content, len(choice.message.tool_calls)) == ("a", 1)
    assert _ask(tiny, **ask, stop=["x"] * 16).choices[0].message.content == "a" + "b" * 20


@pytest.mark.parametrize("wrong", ["", 0, False, {}])
def test_tools_that_are_no_list_are_refused(tiny: Running, wrong: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        _ask(tiny, extra_body={"tools": wrong})
    assert refused.value.param == "tools"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"choice": ["abc"]}, "allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"structured_outputs": {"choice": ["abc"]}, "bad_words": ["abc", "ab", "a"]}, "structured_outputs"),
        ({"allowed_token_ids": [5], "logit_bias": {"5": 3}, "bad_words": ["&"]}, "allowed_token_ids"),
    ],
)
def test_fields_that_leave_nothing_are_the_users_mistake(tiny: Running, fields: dict[str, Any], param: str) -> None:
    for n in (1, 2):
        with pytest.raises(openai.BadRequestError) as refused:
            _ask(tiny, extra_body=fields, n=n)
        assert refused.value.param == param
        assert "no token is left to sample" in str(refused.value)


@pytest.mark.parametrize("max_tokens", [120, 45])
def test_the_clients_own_messages_go_back(tiny: Running, max_tokens: int) -> None:
    """The usual loop around tools: whatever the answer was, cut short or not, it is appended as it came."""
    messages, ask = list(MESSAGES), {"tools": TOOLS, "parallel_tool_calls": False}
    for _ in range(2):
        message = _ask(tiny, messages=messages, max_tokens=max_tokens, tool_choice=NAMED, **ask).choices[0].message
        (call,) = message.tool_calls
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    message = _ask(tiny, messages=messages, max_tokens=3).choices[0].message
    strict: Any = {"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}
    parsed = tiny.client.chat.completions.parse(
        model="tiny", messages=[*messages, message], max_tokens=120, tools=[strict], tool_choice=NAMED
    )
    called: Any = parsed.choices[0].message
    assert called.tool_calls[0].function.parsed_arguments
    assert _ask(tiny, messages=[*messages, message, called, *MESSAGES], max_tokens=3).usage.completion_tokens == 3


def test_thoughts_are_told_apart() -> None:
    """A model whose template has opened its thoughts: they end where it says, and the answer follows."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}<think>\n{# </think> #}"
    reader = MessageReader(None, "<think>\n")
    text = "Hm.\n</think>\nFour"
    deltas = [delta for char in text for delta in reader.feed(char, is_last=False)] + reader.feed("", is_last=True)
    whole = {"role": "assistant", "content": "Four", "refusal": None, "reasoning_content": "Hm."}
    assert whole_message(deltas) == whole
    assert whole_message(MessageReader(None, "<think>\n").feed(text, is_last=True)) == whole
    with serving(chat_template=template) as running:
        message = _ask(running, model="fake", max_tokens=9).choices[0].message
        # The fake model never stops thinking.
        assert message.content == ""
        assert len(message.reasoning_content) == 9
        chunks = _ask(running, model="fake", max_tokens=9, stream=True)
        assert all(not chunk.choices[0].delta.content for chunk in chunks)
