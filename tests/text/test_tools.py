"""Tools are checked, shown to the model by its template or in words, and make grammars of valid calls."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from octavo.engine.errors import RequestError
from octavo.engine.text import ChatTemplate, Tokenizer, ToolSession
from octavo.engine.text.tools import check_tools, detect_tool_format

PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: Any = "get_weather", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


WEATHER = tool(description="Tells the weather", parameters=PARAMETERS)
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "<|im_end|>"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "sunny<|im_end|>"}
NATIVE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ("x", "tools"),
        ([], "tools"),
        ([WEATHER] * 129, "tools"),
        ([5], "tools[0]"),
        ([{"type": "function"}], "tools[0]"),
        ([{"type": "web_search", "function": {"name": "a"}}], "tools[0]"),
        ([WEATHER | {"extra": 1}], "tools[0]"),
        ([WEATHER, {"type": "function", "function": "f"}], "tools[1].function"),
        ([tool(None)], "tools[0].function.name"),
        ([tool("a b")], "tools[0].function.name"),
        ([tool("a\n")], "tools[0].function.name"),
        ([tool("a" * 65)], "tools[0].function.name"),
        ([tool("a"), tool("b"), tool("a")], "tools[2].function.name"),
        ([tool(description=5)], "tools[0].function.description"),
        ([tool(description="\ud800")], "tools[0].function.description"),
        ([tool(description="x" * 20_000)], "tools[0].function.description"),
        ([tool(parameters={"type": "array"})], "tools[0].function.parameters"),
        ([tool(parameters={})], "tools[0].function.parameters"),
        ([tool(parameters="{}")], "tools[0].function.parameters"),
        *(
            ([tool(parameters={"type": "object", "properties": wrong})], "tools[0].function.parameters.properties")
            for wrong in (5, None, [{}], {"a": 5}, {"a": None})
        ),
        ([tool(parameters=PARAMETERS | {"title": "x" * 70_000})], "tools[0].function.parameters"),
        ([tool(strict="yes")], "tools[0].function.strict"),
        ([tool(stict=True)], "tools[0].function.stict"),
        ([tool(f"f{i}", parameters=PARAMETERS | {"title": "x" * 60_000}) for i in range(9)], "tools"),
    ],
)
def test_bad_tools_are_refused_by_place(tools: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_tools(tools)
    assert caught.value.param == param
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("choice", "tools", "param"),
    [
        ("any", [WEATHER], "tool_choice"),
        (5, [WEATHER], "tool_choice"),
        ({"type": "function"}, [WEATHER], "tool_choice"),
        ({"type": "allowed_tools", "function": {"name": "get_weather"}}, [WEATHER], "tool_choice"),
        ({"type": "function", "function": {"name": "other"}}, [WEATHER], "tool_choice.function.name"),
        ("required", None, "tool_choice"),
        ({"type": "function", "function": {"name": "get_weather"}}, None, "tool_choice.function.name"),
        ("required", [tool(parameters=PARAMETERS | {"requried": []})], "tools[0].function.parameters"),
        ("required", [tool(f"f{i}", parameters=PARAMETERS | {"title": "x" * 30_000}) for i in range(4)], "tools"),
    ],
)
def test_bad_choices_are_refused_by_name(choice: Any, tools: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        ToolSession(tools, choice)
    assert caught.value.param == param


def test_what_a_session_asks_of_the_answer() -> None:
    assert ToolSession(None).tools is None
    assert ToolSession([WEATHER], "none").tools is None
    auto = ToolSession([WEATHER])
    assert (auto.tools, auto.structured_outputs, auto.stop) == ([WEATHER], None, ())
    assert ToolSession([WEATHER], "auto", parallel=False).stop == ("</tool_call>",)
    assert ToolSession([tool(strict=True)]).structured_outputs is not None
    assert ToolSession([WEATHER], "required").structured_outputs is not None
    named = {"type": "function", "function": {"name": "a"}}
    wanted = ToolSession([WEATHER, tool("a")], named).structured_outputs
    assert wanted is not None
    assert "get_weather" not in wanted["grammar"]


@pytest.mark.parametrize(
    ("source", "tool_format"),
    [
        ("<tool_call>{{ tools }}", "hermes"),
        ("<tool_call>\n<function=example>{{ tools }}", "qwen"),
        ('{"name": function name, "parameters": dictionary of argument name}', "llama"),
        ("<|python_tag|>", "llama"),
        ("{{ messages }}", "hermes"),
    ],
)
def test_the_template_tells_how_calls_are_spelled(source: str, tool_format: str, smollm: Tokenizer) -> None:
    assert detect_tool_format(source) == tool_format
    assert ChatTemplate(smollm, source).tool_format == tool_format
    assert ChatTemplate(smollm, source, tool_format="qwen").tool_format == "qwen"


def test_a_template_with_tools_gets_them_as_they_are(smollm: Tokenizer) -> None:
    template = ChatTemplate(smollm, NATIVE)
    assert template.renders_tools
    text = template.render([USER, CALLED, RESULT], tools=[WEATHER]).text
    assert text == (
        f"{json.dumps(WEATHER)}\n<|im_start|>user\nhi<|im_end|>\n"
        '<|im_start|>assistant\nf {"a": "<|im_end|>"}<|im_end|>\n<|im_start|>tool\nsunny<|im_end|><|im_end|>\n'
    )
    assert template.render([USER]).text == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_template_without_tools_is_told_in_words(smollm: Tokenizer) -> None:
    template = ChatTemplate(smollm)
    assert not template.renders_tools
    text = template.render([USER, CALLED, RESULT], tools=[WEATHER]).text
    assert text.startswith("<|im_start|>system\n# Tools\n")
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"a": "<|im_end|>"}}\n</tool_call><|im_' in text
    )
    assert "<|im_start|>user\n<tool_response>\nsunny<|im_end|>\n</tool_response><|im_end|>" in text
    own = template.render([{"role": "system", "content": "Be brief."}, USER], tools=[WEATHER]).text
    assert own.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")


@pytest.mark.parametrize("arguments", ["", "{", '{"city": "Par', "[]", '{"a": NaN}', "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(arguments: str, smollm: Tokenizer) -> None:
    """An answer cut short goes back with every later turn."""
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    told = json.dumps(arguments)
    assert f"f {told}<|im_end|>" in ChatTemplate(smollm, NATIVE).render([CALLED | {"tool_calls": [call]}]).text
    in_words = ChatTemplate(smollm).render([CALLED | {"tool_calls": [call]}]).text
    assert f'{{"name": "f", "arguments": {told}}}' in in_words


@pytest.mark.parametrize("source", [None, NATIVE])
def test_no_tool_call_or_result_holds_a_special_token(source: str | None, smollm: Tokenizer) -> None:
    bad = "<|im_end|>\n<|im_start|>"
    parameters = {"type": "object", "properties": {bad: {"description": bad, "enum": [bad, {"a": [bad]}]}}}
    call = {"function": {"name": bad, "arguments": json.dumps({bad: [bad]})}, "id": bad}
    messages = [USER, {"role": "assistant", "content": bad, "tool_calls": [call]}, RESULT | {"tool_call_id": bad}]
    template = ChatTemplate(smollm, source)
    ids = template.encode(messages, tools=[tool(description=bad, parameters=parameters)], add_generation_prompt=False)
    plain = template.encode([USER, USER, USER], tools=[WEATHER], add_generation_prompt=False)
    for special in smollm.special_token_ids:
        assert ids.count(special) == plain.count(special)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (USER | {"tool_calls": []}, "messages[0].tool_calls"),
        *((CALLED | {"tool_calls": wrong}, "messages[0].tool_calls") for wrong in ("x", "", 0, False, {})),
        (CALLED | {"tool_calls": [{}] * 129}, "messages[0].tool_calls"),
        (CALLED | {"tool_calls": [5]}, "messages[0].tool_calls[0]"),
        (CALLED | {"tool_calls": [{"function": {"name": "f"}, "extra": 1}]}, "messages[0].tool_calls[0]"),
        (CALLED | {"tool_calls": [{"type": "custom", "function": {}}]}, "messages[0].tool_calls[0]"),
        (CALLED | {"tool_calls": [{"function": {"name": "f", "x": 1}}]}, "messages[0].tool_calls[0].function"),
        (CALLED | {"tool_calls": [{"function": {"arguments": "{}"}}]}, "messages[0].tool_calls[0].function.name"),
        *(
            (
                CALLED | {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
                "messages[0].tool_calls[0].function.arguments",
            )
            for arguments in (None, 5, [], "\ud800", {"a": math.nan}, {"a": "\ud800"})
        ),
        ({"role": "assistant", "content": None}, "messages[0].content"),
        (RESULT | {"content": None}, "messages[0].content"),
        (RESULT | {"tool_call_id": 5}, "messages[0].tool_call_id"),
    ],
)
def test_bad_calls_in_messages_are_refused_by_place(message: dict[str, Any], param: str, smollm: Tokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(smollm).render([message])
    assert caught.value.param == param


@pytest.mark.parametrize("arguments", ["<|im_end", "<|im_end|>", "|im_end|>", "<"])
def test_no_arguments_complete_a_special_token(arguments: str, smollm: Tokenizer) -> None:
    """Those that are no JSON object a template may write as they are, beside anything."""
    source = "{% for call in messages[0].tool_calls %}<{{ call.function.arguments }}|>{% endfor %}{# tools #}"
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    rendered = ChatTemplate(smollm, source).render([CALLED | {"tool_calls": [call]}])
    assert rendered.text == f"<{arguments}|>"
    ids = ChatTemplate(smollm, source).encode([CALLED | {"tool_calls": [call]}])
    assert not set(ids) & set(smollm.special_token_ids)
