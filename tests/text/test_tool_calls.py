"""Calls are found in streams however these are cut, and what is no call stays text to the character."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.text import CallDelta, TextDelta, ToolFormat, ToolStream

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "noop": {},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a}\\"b", "days": [1, {}]}}\n</tool_call>'
NOOP = '<tool_call>{"name":"noop","arguments":{}}</tool_call>'
XML = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n5\n</parameter>\n"
    "<parameter=days>\n5\n</parameter>\n</function>\n</tool_call>"
)
BARE = '{"name": "get_weather", "parameters": {"city": "x"}}'


class Found(NamedTuple):
    text: str
    calls: list[tuple[str, str]]


def read(pieces: list[str], tool_format: ToolFormat = "hermes", *, parallel: bool = True) -> Found:
    ids = iter(range(100))
    stream = ToolStream(TOOLS, tool_format, parallel=parallel, make_id=lambda: f"id-{next(ids)}")
    deltas = [delta for piece in pieces for delta in stream.feed(piece)] + stream.finish()
    calls: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, CallDelta):
            if delta.index == len(calls):
                assert delta.name is not None, "a call begins with its name"
                assert delta.arguments == ""
                calls.append([delta.name, ""])
            else:
                assert delta.index == len(calls) - 1, "pieces of a call come before the next call"
                assert delta.name is None
                assert delta.arguments
            assert delta.call_id == f"id-{delta.index}"
            calls[-1][1] += delta.arguments
        else:
            assert delta.text
    assert stream.num_calls == len(calls)
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    return Found(text, [(name, arguments) for name, arguments in calls])


WEATHER = ("get_weather", '{"city": "a}\\"b", "days": [1, {}]}')
EXPECTED: list[tuple[str, Found]] = [
    ("", Found("", [])),
    (" hi\n", Found(" hi\n", [])),
    (" \n", Found(" \n", [])),
    (CALL, Found("", [WEATHER])),
    (f"\n{CALL}\n{NOOP}\n", Found("", [WEATHER, ("noop", "{}")])),
    (f"Sure. {NOOP} Done.", Found("Sure.  Done.", [("noop", "{}")])),
    (XML, Found("", [("get_weather", '{"city": "5", "days": 5}')])),
    ('<tool_call>{"arguments": {"a": 1}, "name": "noop"}</tool_call>', Found("", [("noop", '{"a": 1}')])),
    ('<tool_call>{"name": "noop"}</tool_call>', Found("", [("noop", "{}")])),
    ('<tool_call>{"name": "noop", "arguments": "{\\"a\\": 1}"}</tool_call>', Found("", [("noop", '{"a": 1}')])),
    # Without its end, but not without its meaning; cut in its arguments, as a limit on tokens does.
    ('<tool_call>{"name": "noop", "arguments": {}', Found("", [("noop", "{}")])),
    ('<tool_call>{"name": "noop", "arguments": {}}</tool_c', Found("", [("noop", "{}")])),
    ('<tool_call>{"name": "noop", "arguments": {"a', Found("", [("noop", '{"a')])),
    (f"{NOOP[:-12]} and more", Found(" and more", [("noop", "{}")])),
    # What only looks like a call.
    *(
        (text, Found(text, []))
        for text in (
            "a < b, <tool_ca",
            "<tool_call>",
            "<tool_call> no {",
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> x',
            '<tool_call>{"name": "noop", "arguments": 5}</tool_call>',
            '<tool_call>{"name": "noop", "arguments": "{\\"a\\": NaN}"}</tool_call>',
            '<tool_call>{"name": "noop", "argum',
            "<tool_call><function=unknown><parameter=a>1</parameter></function></tool_call>",
            "<tool_call><function=noop><parameter=a>1",
            "<tool_call><function=" + "x" * 90,
            '{"name": "noop", "arguments": {}}',
        )
    ),
    (f"<tool_call>no<tool_call>{NOOP}", Found("<tool_call>no<tool_call>", [("noop", "{}")])),
]
BARE_EXPECTED: list[tuple[str, Found]] = [
    ("hello " + BARE, Found("hello " + BARE, [])),
    (BARE, Found("", [("get_weather", '{"city": "x"}')])),
    (f" <|python_tag|>{BARE}", Found("", [("get_weather", '{"city": "x"}')])),
    ('{"type": "function", "name": "noop", "parameters": {}}', Found("", [("noop", "{}")])),
    (f'{BARE}; {{"name": "noop"}}', Found("", [("get_weather", '{"city": "x"}'), ("noop", "{}")])),
    *(
        (text, Found(text, []))
        for text in (' {"a": 1} x', "{", '{"name": "unknown", "parameters": {}}', NOOP, "<|python")
    ),
]


@pytest.mark.parametrize(("text", "expected"), EXPECTED)
def test_tagged_calls(text: str, expected: Found) -> None:
    assert read([text]) == expected
    assert read([text], "qwen") == expected
    assert read(list(text)) == expected


@pytest.mark.parametrize(("text", "expected"), BARE_EXPECTED)
def test_bare_calls(text: str, expected: Found) -> None:
    assert read([text], "llama") == expected
    assert read(list(text), "llama") == expected


PARTS = st.sampled_from(
    [
        *(CALL, NOOP, XML, BARE, "<tool_call>", "</tool_call>", "{", "}", '"', "\\", "\n", " ", "é", ";", "<", "x"),
        *('{"name": "noop", ', '"arguments": ', '"parameters": {', "<function=noop>", "</function>", "<|python_tag|>"),
    ]
)


@given(
    text=st.lists(PARTS, max_size=8).map("".join),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    tool_format=st.sampled_from(["hermes", "llama", "qwen"]),
    parallel=st.booleans(),
)
def test_cuts_change_nothing(text: str, cuts: list[int], tool_format: ToolFormat, parallel: bool) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:stop] for start, stop in pairwise(borders)]
    whole = read([text], tool_format, parallel=parallel)
    assert read(pieces, tool_format, parallel=parallel) == whole
    assert read(list(text), tool_format, parallel=parallel) == whole
    if not whole.calls:
        assert whole.text == text
    assert parallel or len(whole.calls) <= 1


def test_without_parallel_calls_a_second_one_is_text() -> None:
    assert read([f"{CALL}{NOOP}"], parallel=False) == Found(NOOP, [WEATHER])
    assert read([f'{BARE};{{"name": "noop"}}'], "llama", parallel=False).text == ';{"name": "noop"}'


def test_arguments_leave_as_they_come() -> None:
    stream = ToolStream(TOOLS, "hermes")
    assert stream.feed('<tool_call>{"name": "get_weather", "arguments":') == []
    (name, first) = stream.feed(' {"ci')
    assert isinstance(name, CallDelta)
    assert isinstance(first, CallDelta)
    assert (name.name, first.arguments) == ("get_weather", '{"ci')
    (more,) = stream.feed('ty": "Pa')
    assert isinstance(more, CallDelta)
    assert more.arguments == 'ty": "Pa'
    assert len(name.call_id) == len("call_") + 24
    assert name.call_id == more.call_id


def test_a_long_answer_takes_time_that_grows_with_it() -> None:
    """Quadratic work over a call of 200,000 characters, one at a time, would take minutes."""
    body = json.dumps({"arguments": {"text": "x{" * 100_000}, "name": "noop"})
    found = read(list(f"<tool_call>{body}</tool_call>"))
    assert [name for name, _ in found.calls] == ["noop"]


@pytest.mark.parametrize(
    "pieces",
    [
        ["<tool_call><function=noop>" + "<parameter=a>" * 50_000 + "</function></tool_call>"],
        ["<tool_call>", *[" " * 4] * 50_000, "{"],
        ["<tool_call>{", *[" " * 4] * 50_000, "}"],
        ["<tool_call><function=noop>", *["abc "] * 50_000],
        [f"{NOOP}x", NOOP[:-12], *[" " * 4] * 50_000, "y"],
        [*[" " * 4] * 50_000, "y"],
    ],
    ids=["parameters", "before the head", "in the head", "in tags", "after a call", "alone"],
)
def test_hostile_answers_take_time_that_grows_with_them(pieces: list[str]) -> None:
    """Looking at each character again with each piece would take from tens of seconds to hours."""
    start = time.process_time()
    read(pieces)
    assert time.process_time() - start < 30


def test_tags_hold_what_they_did() -> None:
    """A parameter ends at the first end after it, loses one line break on each side, and the last may lack its end."""
    body = "<parameter=a>\n\nx\n\n</parameter><parameter=b>\n</parameter><parameter=c>{</parameter><parameter=d>1"
    found = read([f"<tool_call><function=noop>{body}</function></tool_call>"])
    assert [(name, json.loads(arguments)) for name, arguments in found.calls] == [
        ("noop", {"a": "\nx\n", "b": "", "c": "{"})
    ]


@pytest.mark.parametrize("properties", [5, None, [1], {"a": 5}, {"a": {"type": ["string"]}}])
def test_schemas_of_any_kind_leave_arguments_readable(properties: Any) -> None:
    stream = ToolStream({"f": {"type": "object", "properties": properties}}, "qwen")
    deltas = stream.feed("<tool_call><function=f><parameter=a>1</parameter></function></tool_call>")
    assert [delta.arguments for delta in deltas if isinstance(delta, CallDelta)] == ["", '{"a": 1}']
