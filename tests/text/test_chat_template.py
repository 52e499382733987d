"""Chat prompts: equal to transformers', special tokens in messages are text, and templates are bounded."""

from __future__ import annotations

import itertools
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.errors import CheckpointError, RequestError
from octavo.engine.text import ChatTemplate, TemplateLimits, Tokenizer

HEADERS = """{{- bos_token }}
{%- set first = messages[0] %}
{%- if first['role'] == 'system' %}
    {%- set system = first['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = "" %}
    {%- set rest = messages %}
{%- endif %}
{{- "<|im_start|>system\\n\\nToday is " ~ ("%s" % "known") ~ ".\\n" + system + "<|im_end|>" }}
{%- for message in rest %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"""

THINKING = """{%- set ns = namespace(last=0, seen=[]) %}
{%- for message in messages[::-1] %}
  {%- set index = (messages | length - 1) - loop.index0 %}
  {%- if message.role == "user" and not ns.last %}{% set ns.last = index %}{% endif %}
  {%- set ns.seen = ns.seen + [message.role] %}
{%- endfor %}
{%- macro turn(role, text) -%}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{%- for message in messages %}
  {%- if message.role == 'tool' %}{% continue %}{% endif %}
  {%- set text = message.content %}
  {%- if message.role == 'assistant' and '</think>' in text %}
    {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
  {%- endif %}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{ turn(message.role, text) }}{% endgeneration %}
  {%- else %}{{ turn(message.role, text) }}
  {%- endif %}
{%- endfor %}
{{- ns.seen | join(',') }}{{ {"a": [1, 2.5, none, "é<"]} | tojson(indent=2) }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

ALTERNATING = """{{ bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' ~ message['content'].strip() ~ eos_token }}{% endif %}
{%- endfor %}"""

CHATS = [
    [{"role": "user", "content": "Hi, it's 12  o'clock\n"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "<think>a</think>\n\nb "}],
    [
        {"role": "system", "content": " Be brief.\n{{ 7*7 }} {% raw %} "},
        {"role": "user", "content": "你好 🦜 > quote <"},
        {"role": "assistant", "content": "ok\x00\x1b[0m"},
        {"role": "user", "content": "|>"},
    ],
]
TEMPLATES = [None, HEADERS, THINKING, ALTERNATING]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(
    source: str | None, messages: list[dict[str, str]], prompt: bool, smollm: Tokenizer, hf_smollm: Any
) -> None:
    template = ChatTemplate(smollm, source)
    if source == ALTERNATING and messages[0]["role"] == "system":
        with pytest.raises(RequestError, match="roles must alternate"):
            template.render(messages)
        return
    for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        options: dict[str, Any] = {"chat_template": source, "add_generation_prompt": prompt, **kwargs}
        rendered = template.render(messages, add_generation_prompt=prompt, chat_template_kwargs=kwargs)
        assert rendered.text == hf_smollm.apply_chat_template(messages, tokenize=False, **options)
        ids = template.encode(messages, add_generation_prompt=prompt, chat_template_kwargs=kwargs)
        assert ids == hf_smollm.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def split_oracle(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
    """SmolLM2's format by hand: tokens 1 and 2 around turns, everything between encoded as plain text."""
    ids: list[int] = []
    for message in messages:
        body = tokenizer.encode(f"{message['role']}\n{message['content']}", parse_special=False)
        ids += [1, *body, 2, *tokenizer.encode("\n")]
    return [*ids, 1, *tokenizer.encode("assistant\n")]


def test_special_tokens_in_messages_are_text(smollm: Tokenizer, examples: Any) -> None:
    template = ChatTemplate(smollm)
    parts = [
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "<|im_",
        "end|>",
        "<",
        ">",
        "|",
        "i",
        "\n",
        " x 12",
        "🦜",
        "",
    ]
    contents = st.lists(st.sampled_from(parts), max_size=6).map("".join)

    @examples(200, 5000)
    @given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), contents), min_size=1, max_size=3))
    def check(turns: list[tuple[str, str]]) -> None:
        messages = [{"role": "system", "content": "s"}, *({"role": role, "content": text} for role, text in turns)]
        ids = template.encode(messages)
        assert ids == split_oracle(messages, smollm)
        rendered = template.render(messages)
        assert smollm.decode(ids, skip_special_tokens=False) == rendered.text
        assert all(rendered.text[start:end] for start, end in rendered.plain_spans)
        if not any(token in text for _, text in turns for token in smollm.control_tokens):
            assert ids == smollm.encode(rendered.text, add_bos=False)

    check()


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("<|im_{{ messages[0].content }}", "end|>"),
        ("{{ messages[0].content }}im_end|>", "<|"),
        ("<|im_{{ messages[0].content }}|>", "end"),
        ("<|im_en{{ messages[0].content }}|>", "d"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "<|im_end|>"),
        ("{{ messages[0].content | upper | lower | trim | tojson }}", " <|im_end|>"),
        ("{{ messages[0].name }}", "<|im_end|>"),
    ],
)
def test_no_message_completes_a_special_token(source: str, content: str, smollm: Tokenizer) -> None:
    messages = [{"role": "user", "content": content, "name": content}]
    template = ChatTemplate(smollm, source)
    assert not smollm.special_token_ids & set(template.encode(messages))
    assert content.strip() in template.render(messages).text


def test_a_template_cannot_cut_a_hidden_token(smollm: Tokenizer) -> None:
    template = ChatTemplate(smollm, "{{ messages[0].content[:1] }}")
    with pytest.raises(RequestError, match="in pieces"):
        template.render([{"role": "user", "content": "<|im_end|>"}])


def test_bos_is_the_templates_to_write(spm: Any) -> None:
    tokenizer = Tokenizer.from_gguf(spm())
    messages = [{"role": "user", "content": "<s>a"}]
    assert ChatTemplate(tokenizer, "{{ bos_token }}{{ messages[0].content }}").encode(messages).count(1) == 1
    assert 1 not in ChatTemplate(tokenizer, "{{ messages[0].content }}").encode(messages)


def test_the_date_is_injected(smollm: Tokenizer) -> None:
    template = ChatTemplate(smollm, "{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render(CHATS[0]).text == "26 Jul 2024"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "user", "content": "x"}] * 1025, "messages"),
        (["x"], "messages[0]"),
        ([{"role": "root", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "image_url"}]}],
            "messages[1].content",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "name": 1}], "messages[0].name"),
        ([{"role": "assistant", "content": "x", "refusal": "no"}], "messages[0].refusal"),
        ([{"role": "assistant", "content": "x", "refusal": ""}], "messages[0].refusal"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "a"}}], "messages[0].audio"),
        ([{"role": "assistant", "content": "x", "function_call": {}}], "messages[0].function_call"),
        ([{"role": "assistant", "content": "x", "annotations": [{}]}], "messages[0].annotations"),
        ([{"role": "assistant", "content": "x", "annotations": 0}], "messages[0].annotations"),
    ],
)
def test_bad_messages_are_refused(messages: Any, param: str, smollm: Tokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(smollm).render(messages)
    assert caught.value.param == param


def test_what_answers_carry_besides_says_nothing(smollm: Tokenizer) -> None:
    template = ChatTemplate(smollm, "{{ messages }}")
    bare = {"role": "assistant", "content": "x"}
    for none in (None, []):
        given = bare | {"refusal": None, "audio": None, "function_call": None, "annotations": none}
        assert template.render([given]) == template.render([bare])


def test_content_may_be_a_list_of_texts(smollm: Tokenizer) -> None:
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    template = ChatTemplate(smollm, "{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": parts}]).text == "<|im_\nend|>"


@pytest.mark.parametrize(
    "kwargs", [{"chat_template": "x"}, {"enable_thinking": "yes"}, {"messages": True}, "x", "", [], 0, False]
)
def test_other_template_arguments_are_refused(kwargs: Any, smollm: Tokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(smollm).render(CHATS[0], chat_template_kwargs=kwargs)
    assert caught.value.param == "chat_template_kwargs"


def test_an_empty_list_of_tools_is_refused(smollm: Tokenizer) -> None:
    with pytest.raises(RequestError, match="tools"):
        ChatTemplate(smollm).render(CHATS[0], tools=[])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for", "does not compile"),
        ("{{ 'a' | center(10**9) }}", "No filter named 'center'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile"),
        ("x" * (1 << 19), "characters; allowed"),
        ("{{ ('a' * 10**9) | length }}{% set x %}", "does not compile"),
    ],
)
def test_templates_that_do_not_compile(source: str, reason: str, smollm: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=reason):
        ChatTemplate(smollm, source)


def test_a_missing_template_is_named(byte_level_backend: Any) -> None:
    with pytest.raises(CheckpointError, match="--chat-template"):
        ChatTemplate(Tokenizer(byte_level_backend))


DOUBLING = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(23) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x | length }}"
)
LOOPS = "{% set xs = range(200) | list %}" + "{% for x in xs %}" * 3 + "{% endfor %}" * 3
HOSTILE = {
    "loops": (LOOPS, "longer than"),
    "lazy filters": ("{{ range(9999)|select('in', range(99999)|list)|list|length }}", "longer than"),
    "skipped items": (
        "{% for x in range(99999) if range(999)|list|sort|length and false %}{% endfor %}",
        "longer than",
    ),
    "wide recursion": (
        "{% macro m(n) %}{% for i in 'ab' %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(0) }}",
        "recursion",
    ),
    "product": ("{{ 'a' * 10**15 }}", "value of more than"),
    "product of lists": ("{{ [1] * 10**15 }}", "value of more than"),
    "doubled text": (DOUBLING % ("'ab'", "ns.x ~ ns.x"), "value of more than"),
    "added text": (DOUBLING % ("'ab'", "ns.x + ns.x"), "value of more than"),
    "nested lists": (DOUBLING % ("[1]", "[ns.x, ns.x]"), "value of more than"),
    "nested dicts": (DOUBLING % ("[1]", "{'a': ns.x, 'b': ns.x}"), "value of more than"),
    "squares": (DOUBLING % ("3", "ns.x * ns.x"), "too large a number"),
    "power": ("{{ 7 ** 99999999 }}", "too large a power"),
    "format": ("{{ '%1000000000d' % 1 }}", "too large a width"),
    "str.format": ("{{ '{:1000000000d}'.format(1) }}", "not available"),
    "ljust": ("{{ 'a'.ljust(1000000000) }}", "not available"),
    "to_bytes": ("{{ (1).to_bytes(1000000000, 'big') | length }}", "not available"),
    "replace method": ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", "value of more than"),
    "replace filter": ("{{ ('a' * 100000) | replace('a', 'b' * 100000) }}", "value of more than"),
    "join method": ("{{ ('b' * 100000).join('a' * 100000) }}", "value of more than"),
    "join filter": ("{{ range(99999) | join('b' * 100000) }}", "value of more than"),
    "indent": ("{{ ('a\\n' * 100000) | indent(1000) }}", "value of more than"),
    "tojson": ("{{ messages | tojson(indent=999999) }}", "0 to 16"),
    "output": ("{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}", "value of more than"),
    "block set": (
        "{% set x %}{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}{% endset %}",
        "builds more than",
    ),
    "python": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "namespace": ("{{ namespace(__html__=1) }}", "underscore"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "lipsum": ("{{ lipsum(n=1000000) }}", "undefined"),
    "mutation": ("{{ messages.append(1) }}", "append"),
    "wrong type": ("{{ 1 + 'a' }}", "unsupported operand"),
    "printed object": ("{{ range }}", "cannot be printed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_fail_within_their_limits(case: str, smollm: Tokenizer) -> None:
    """The clock moves 1 ms per look, so that what a template may do is the same on every machine."""
    source, reason = HOSTILE[case]
    ticks = itertools.count()
    limits = TemplateLimits(time_s=20.0)
    template = ChatTemplate(smollm, source, limits=limits, clock=lambda: next(ticks) * 1e-3)
    with pytest.raises(RequestError, match=reason):
        template.render(CHATS[2])
    if case in ("loops", "lazy filters", "skipped items"):
        assert next(ticks) <= 20_000 + 100


def test_a_template_may_look_at_the_borders_of_a_message(smollm: Tokenizer) -> None:
    template = ChatTemplate(smollm, "{{ 'yes' if messages[0].content == 'end' else 'no' }}")
    assert template.render([{"role": "user", "content": "end"}]).text == "yes"


def test_a_failed_render_leaves_the_template_usable(smollm: Tokenizer) -> None:
    template = ChatTemplate(smollm, "{{ messages[0].content * (10**8 if messages[0].content == 'x' else 1) }}")
    with pytest.raises(RequestError):
        template.render([{"role": "user", "content": "x"}])
    assert template.render([{"role": "user", "content": "y"}]).text == "y"
