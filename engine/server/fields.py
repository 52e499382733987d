"""This module holds every field that the routes take, and what becomes of each. It does not know how a route works.

One table per route decides what is taken, what the OpenAPI document says and what the README lists. A field is given to
the sampler, handled by the route, a label that changes nothing, or accepted only at the value that asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from ..errors import RequestError, describe
from ..sampling_params import RULES

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "DETOKENIZE",
    "MAX_PROMPTS",
    "MAX_TOKEN_IDS",
    "TOKENIZE",
    "Field",
    "Given",
    "read_fields",
]

MAX_PROMPTS = 1024
"""Of one completion."""
MAX_TOKEN_IDS = 1 << 20
"""Of one prompt or text, whatever the model takes."""

Kind = Literal["sampling", "route", "label", "neutral"]
Schema = Mapping[str, Any]


class Field(NamedTuple):
    """One key of a request's body."""

    name: str
    kind: Kind
    effect: str
    """What it does, for readers."""
    schema: Schema
    """Its JSON schema."""
    allowed: str = ""
    """Of a route's own field, in words."""
    accept: Callable[[Any], bool] | None = None
    """Whether a route's own field, or a label, takes a value; None leaves the check to whoever uses it."""
    neutral: tuple[Any, ...] = ()
    """Besides null: the values that ask for nothing."""
    required: bool = False


class Given(NamedTuple):
    """What a body holds, null taken for absent."""

    sampling: dict[str, Any]
    """For `SamplingParams.from_mapping`."""
    route: dict[str, Any]


def read_fields(table: Mapping[str, Field], body: Mapping[str, Any]) -> Given:
    """Sort the keys of a body by what becomes of them.

    Raises:
        RequestError: a key is unknown, a value is not allowed, or a required one is missing; `param` is the key.
    """
    given = Given({}, {})
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            near = get_close_matches(name[:64], table, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise RequestError(
                f"unknown field {describe(name)}; {hint}allowed: those that /docs lists", param=name[:64]
            )
        if value is None:
            continue
        if field.kind == "sampling":
            given.sampling[name] = value
        elif field.kind == "neutral":
            if not any(_same(value, neutral) for neutral in field.neutral):
                raise RequestError(f"{name} is {describe(value)}; allowed: {_neutral_words(field)}", param=name)
        elif field.accept is not None and not field.accept(value):
            raise RequestError(f"{name} is {describe(value)}; allowed: {field.allowed}", param=name)
        elif field.kind == "route":
            given.route[name] = value
    for field in table.values():
        if field.required and body.get(field.name) is None:
            raise RequestError(f"{field.name} is missing", param=field.name)
    return given


def _same(value: Any, neutral: Any) -> bool:
    """Equal and of one type: 1 is not true, and 1.0 is not 1."""
    return type(value) is type(neutral) and bool(value == neutral)


def _neutral_words(field: Field) -> str:
    values = " or ".join(map(json.dumps, field.neutral))
    return f"{values}, or nothing: octavo does not have this" if values else "nothing: octavo does not have this"


def _is_int(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 512


def _is_labels(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 16 and all(map(_is_text, (*value, *value.values())))


_STREAM_EXTRAS = ("include_obfuscation", "continuous_usage_stats")


def _is_stream_options(value: Any) -> bool:
    known = ("include_usage", *_STREAM_EXTRAS)
    if not isinstance(value, dict) or not all(key in known and _is_flag(flag) for key, flag in value.items()):
        return False
    return not any(map(value.get, _STREAM_EXTRAS))


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_TOKEN_IDS


def _nullable(schema: Schema) -> Schema:
    kind = schema.get("type")
    return {**schema, "type": [kind, "null"]} if isinstance(kind, str) else {"anyOf": [schema, {"type": "null"}]}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _list(items: Schema, low: int, high: int) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


_TOKEN_ID = _integer(0, 2**31 - 1)
_TEXT = {"type": "string", "minLength": 1, "maxLength": 256}
_FLAG: Schema = {"type": "boolean"}
_LABEL: Schema = {"type": "string", "maxLength": 512}
_OBJECT: Schema = {"type": "object"}

_SAMPLING: dict[str, tuple[str, Schema]] = {
    "n": ("answers to one prompt", _integer(1, 128)),
    "temperature": ("divides the logits", _number(0, 2)),
    "top_p": ("keep the likeliest tokens up to this mass", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": ("keep so many likeliest tokens", _integer(-1, 2**31 - 1)),
    "min_p": ("drop tokens less likely than this part of the likeliest", _number(0, 1)),
    "presence_penalty": ("taken from tokens that were generated", _number(-2, 2)),
    "frequency_penalty": ("taken from tokens for each time they were generated", _number(-2, 2)),
    "repetition_penalty": (
        "divides what was in prompt or output",
        {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
    ),
    "seed": ("same seed, same tokens", _integer(0, 2**63 - 1)),
    "stop": ("strings that end the output", {"anyOf": [_TEXT, _list(_TEXT, 0, 16)]}),
    "stop_token_ids": ("token ids that end it", _list(_TOKEN_ID, 0, 256)),
    "include_stop_str_in_output": ("keep what ended the output in the text", _FLAG),
    "ignore_eos": ("go on after the end-of-sequence token", _FLAG),
    "min_tokens": ("no end before so many tokens, but where a format lets nothing follow", _integer(0, 2**31 - 1)),
    "prompt_logprobs": ("log-probabilities of the prompt, and of so many top tokens", _integer(0, 20)),
    "logit_bias": (
        "added to the logits of tokens",
        {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
            "additionalProperties": _number(-100, 100),
            "maxProperties": 1024,
        },
    ),
    "allowed_token_ids": ("sample nothing else", _list(_TOKEN_ID, 1, 1 << 20)),
    "bad_words": ("words never to generate", _list(_TEXT, 0, 256)),
    "skip_special_tokens": ("leave special tokens out of the text", _FLAG),
    "priority": ("runs first, with `--policy priority`", _integer(-(2**31), 2**31 - 1)),
    "cache_salt": ("share cached prefixes only with requests of the same salt", _TEXT),
    "structured_outputs": ("what the output must look like", _OBJECT),
}
"""What the sampler's own table takes: what it does, and its JSON schema."""


def _sampling_fields() -> list[Field]:
    return [
        Field(name, "sampling", f"{words}: {RULES[name].allowed}", _nullable(schema))
        for name, (words, schema) in _SAMPLING.items()
    ]


def _label(name: str) -> Field:
    return Field(name, "label", "a label: accepted, changes nothing", _nullable(_LABEL), "a short text", _is_text)


def _neutral(name: str, *neutral: Any, why: str = "octavo does not have this") -> Field:
    words = " or ".join(f"`{json.dumps(value)}`" for value in neutral)
    effect = f"refused, but for {words}: {why}" if neutral else f"refused: {why}"
    return Field(name, "neutral", effect, {"enum": [None, *neutral]}, neutral=neutral)


def _flag(name: str, effect: str) -> Field:
    return Field(name, "route", effect, _nullable(_FLAG), "true or false", _is_flag)


def _count(name: str, effect: str, low: int, high: int, allowed: str) -> Field:
    return Field(name, "route", effect, _nullable(_integer(low, high)), allowed, _is_int(low, high))


_MODEL = Field("model", "route", "one of the served names", _nullable({"type": "string"}), "a name", _is_text)
_STREAMING = [
    _flag("stream", "answer as server-sent events"),
    Field(
        "stream_options",
        "route",
        "`include_usage`: a last chunk with the usage; `include_obfuscation` and `continuous_usage_stats` only false",
        _nullable(
            {
                "type": "object",
                "properties": {"include_usage": _FLAG} | {key: {"enum": [False]} for key in _STREAM_EXTRAS},
                "additionalProperties": False,
            }
        ),
        f"include_usage true or false; {' and '.join(_STREAM_EXTRAS)} only false",
        _is_stream_options,
    ),
    _flag("return_token_ids", "token ids beside the texts"),
]
_MAX_TOKENS = "an integer from 1 to the context left"
_TEMPLATE_KWARGS = Field(
    "chat_template_kwargs", "route", "passed to the chat template: `enable_thinking`", _nullable(_OBJECT)
)
_GENERATION_PROMPT = _flag("add_generation_prompt", "end the prompt with the opening of the assistant's turn")
_PROMPT_SCHEMA: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _list({"type": "string", "minLength": 1}, 1, MAX_PROMPTS),
        _list(_TOKEN_ID, 1, MAX_TOKEN_IDS),
        _list(_list(_TOKEN_ID, 1, MAX_TOKEN_IDS), 1, MAX_PROMPTS),
    ]
}
_MESSAGES_SCHEMA = _list(
    {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"type": ["string", "array", "null"]},
        },
        "required": ["role"],
    },
    1,
    1024,
)
_MESSAGES = Field("messages", "route", "the conversation", _MESSAGES_SCHEMA, required=True)
_TOOLS = Field("tools", "route", "functions the model may call", _nullable(_list(_OBJECT, 0, 128)))
_TOOL_CHOICE = Field(
    "tool_choice",
    "route",
    "`none`, `auto`, `required` or one function; the last two make a valid call certain",
    _nullable({"anyOf": [{"enum": ["none", "auto", "required"]}, _OBJECT]}),
)
_RESPONSE_FORMAT = Field(
    "response_format",
    "route",
    "`text`, `json_object` or `json_schema`; always strict",
    _nullable({"type": "object", "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}}}),
)


def _table(*fields: Field) -> dict[str, Field]:
    return {field.name: field for field in fields}


COMPLETIONS: dict[str, Field] = _table(
    _MODEL,
    Field("prompt", "route", "a text, token ids, or a list of either", _PROMPT_SCHEMA, required=True),
    _count("max_tokens", f"{_MAX_TOKENS}; 16; 0 with `echo` scores the prompt", 0, 2**31 - 1, _MAX_TOKENS),
    _count("logprobs", "log-probabilities of tokens, and of so many top ones", 0, 20, "an integer from 0 to 20"),
    _flag("echo", "the prompt before the answer, with its log-probabilities where `logprobs` is given"),
    *_STREAMING,
    *_sampling_fields(),
    _label("user"),
    _neutral("best_of", 1),
    _neutral("suffix", ""),
)
CHAT: dict[str, Field] = _table(
    _MODEL,
    _MESSAGES,
    _count("max_completion_tokens", f"{_MAX_TOKENS}, which is the default", 1, 2**31 - 1, _MAX_TOKENS),
    _count("max_tokens", "the older name of `max_completion_tokens`", 1, 2**31 - 1, _MAX_TOKENS),
    _flag("logprobs", "log-probabilities of tokens"),
    _count("top_logprobs", "those of so many top tokens, with `logprobs`", 0, 20, "an integer from 0 to 20"),
    *_STREAMING,
    *_sampling_fields(),
    _TOOLS,
    _TOOL_CHOICE,
    _flag("parallel_tool_calls", "several calls in one answer; true"),
    _RESPONSE_FORMAT,
    _GENERATION_PROMPT,
    _TEMPLATE_KWARGS,
    _label("user"),
    _label("safety_identifier"),
    _label("prompt_cache_key"),
    Field("metadata", "label", "labels: accepted, change nothing", _nullable(_OBJECT), "16 short texts", _is_labels),
    _neutral("audio"),
    _neutral("function_call", "none", why="`tool_choice` has taken its place"),
    _neutral("functions", [], why="`tools` has taken its place"),
    _neutral("modalities", ["text"]),
    _neutral("moderation"),
    _neutral("prediction"),
    _neutral("prompt_cache_options", {"mode": "implicit"}, why="every prompt is cached"),
    _neutral("prompt_cache_retention", "in_memory", why="every prompt is cached while there is room"),
    _neutral("reasoning_effort"),
    _neutral("service_tier", "auto", "default", why="there is one; see `priority`"),
    _neutral("store", False),
    _neutral("verbosity", "medium"),
    _neutral("web_search_options"),
)
TOKENIZE: dict[str, Field] = _table(
    _MODEL,
    Field("prompt", "route", "a text", _nullable({"type": "string"}), "a text", lambda value: isinstance(value, str)),
    Field("messages", "route", "or a conversation", _nullable(_MESSAGES_SCHEMA)),
    _flag("add_special_tokens", "add what the tokenizer puts around a text; true"),
    _flag("return_token_strs", "also the text of each token"),
    _TOOLS,
    _GENERATION_PROMPT,
    _TEMPLATE_KWARGS,
)
DETOKENIZE: dict[str, Field] = _table(
    _MODEL,
    Field(
        "tokens",
        "route",
        "token ids",
        _list(_TOKEN_ID, 0, MAX_TOKEN_IDS),
        f"at most {MAX_TOKEN_IDS} token ids",
        _is_ids,
        required=True,
    ),
)

# What a request may say of sampling without HTTP, it says here by another name, or not at all.
_ELSEWHERE = {"max_tokens", "logprobs", "bad_words_token_ids", "detokenize", "return_hidden_states"}
assert set(RULES) <= _SAMPLING.keys() | _ELSEWHERE, "a sampling parameter is missing here"
