"""No body whatsoever gives a status of 500 or above, or touches another request."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from octavo.engine.server.openapi import openapi_document
from octavo.engine.strict_json import parse_json
from schemathesis.generation import GenerationMode

from .asgi import Answer, ask
from .serving import Running, serving

SCHEMA: Any = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <|im_end|>?"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]
CORPUS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "hello", "max_tokens": 4}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "stream": True, "seed": 1}),
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 0, "echo": True, "logprobs": 2}),
    ("/v1/completions", {"prompt": [[1], [2, 3]], "logprobs": 1, "logit_bias": {"5": 1.5}, "stop": ["x", "y"]}),
    ("/v1/completions", {"prompt": "a", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 2}),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [1], "allowed_token_ids": [1, 2], "bad_words": ["b"]}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "n": 2}),
    ("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "auto", "max_tokens": 3}),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_tokens": 3,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        },
    ),
    ("/v1/chat/completions", {"messages": MESSAGES, "structured_outputs": {"regex": "a+"}, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": MESSAGES, "user": "me", "metadata": {"a": "b"}, "store": False}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False, "tools": TOOLS}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308, float("inf"), float("nan")),
    *("", "a", "\x00", "\ud800", "\U0001f600" * 10, "x" * 5000, "<|im_start|>", "1", "NaN"),
    *([], {}, [[]], [None], {"": None}, [1, "a"], [[1], "a"], [-1], [2**40], ["a"] * 200, {"type": "x"}),
]
BYTES = [
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"[",
    b"{",
    b'"',
    b"\\u",
    b"1e999",
    b"-",
    b",",
    b":",
    b"9" * 5000,
    b"NaN",
    b"\xef\xbb\xbf",
]
NESTED = [b'{"prompt":' + b"[" * depth + b"]" * depth + b"}" for depth in (2, 60, 70, 900, 100_000)]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(engine={"max_model_len": 256}) as running:
        yield running


def _check(answer: Answer, body: bytes) -> None:
    assert answer.status < 500, (answer, body[:2000])
    assert (answer.status == 200) == (answer.error is None)
    # What was refused as a whole says so with a status, not within a stream.
    assert b'{"error"' not in answer.body or answer.status != 200, (answer.body, body[:2000])


def _mutated(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """Change one or a few places of a value."""
    if depth > 0 and rng.random() < 0.25:
        return rng.choice(VALUES)
    if isinstance(value, dict) and value:
        changed = dict(value)
        key = rng.choice(list(changed))
        act = rng.random()
        if act < 0.1:
            del changed[key]
        elif act < 0.2:
            _, other = rng.choice(CORPUS)
            changed |= {name: other[name] for name in rng.sample(list(other), 1)}
        elif act < 0.25:
            changed[rng.choice(("", "x", key.upper(), key + " "))] = rng.choice(VALUES)
        else:
            changed[key] = _mutated(rng, changed[key], depth + 1)
        return changed
    if isinstance(value, list) and value:
        index = rng.randrange(len(value))
        return [*value[:index], _mutated(rng, value[index], depth + 1), *value[index + rng.randrange(2) :]]
    return rng.choice(VALUES)


def _scrambled(rng: random.Random, body: bytes) -> bytes:
    """Change some bytes."""
    for _ in range(rng.randrange(1, 4)):
        place, end = sorted(rng.randrange(len(body) + 1) for _ in range(2))
        act = rng.random()
        if act < 0.4:
            body = body[:place] + rng.choice(BYTES) + body[place:]
        elif act < 0.6:
            body = body[:place] + body[end:]
        elif act < 0.8:
            body = body[:end] + body[place:end] + body[end:]
        else:
            body = body[:place] + rng.randbytes(rng.randrange(1, 4)) + body[place + 1 :]
    return body


def test_mutated_corpus(running: Running, count: Callable[[int, int], int], seed: int) -> None:
    """A hundred at a time; with the tests below, 100,000 bodies in the full tier."""
    rng = random.Random(seed)

    async def ask_all(cases: list[tuple[str, bytes]]) -> list[Answer]:
        app = running.server.app
        return await asyncio.gather(*(ask(app, *case, num_parts=rng.randrange(1, 4)) for case in cases))

    for _ in range(count(3, 930)):
        cases = [_fuzzed(rng) for _ in range(100)]
        for answer, (_, body) in zip(running.run(ask_all(cases)), cases, strict=True):
            _check(answer, body)
        running.check_canary()


def _fuzzed(rng: random.Random) -> tuple[str, bytes]:
    """Return a path and a body that is nearly right for it."""
    path, value = rng.choice(CORPUS)
    for _ in range(rng.randrange(1, 4)):
        value = _mutated(rng, value)
    body = json.dumps(value).encode()
    return path, _scrambled(rng, body) if rng.random() < 0.3 else body


@pytest.mark.parametrize("body", NESTED)
def test_deep_nesting(running: Running, body: bytes) -> None:
    answer = running.run(ask(running.server.app, "/v1/completions", body))
    assert answer.status == 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "given twice"),
        (b'{"a":1,' + b",".join(b'"k%d":1' % i for i in range(99_000)) + b',"a":2}', "given twice"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"prompt": "a", "temperature": ' + b"9" * 5000 + b".0}", "temperature"),
        (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", "seed"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "JSON"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a"} {}', "JSON"),
        (b"{'prompt': 'a'}", "JSON"),
        (b"", "JSON"),
        (b"[]", "object"),
        (b'"prompt"', "object"),
        (b'{"prompt": "a", "n": 1000000000}', "n is"),
        (b'{"prompt": [' + b"0," * 100_000 + b"0]}", "tokens"),
        (b'{"prompt": [' + b"[]," * 100_000 + b"[]]}", "100000 strings, arrays and objects"),
        (b'{"prompt": [' + b"{}," * 100_000 + b"{}]}", "100000 strings, arrays and objects"),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}", "100000 strings, arrays and objects"),
        (b'{"prompt": [' + b'"",' * 100_000 + b'""]}', "100000 strings, arrays and objects"),
    ],
)
def test_what_is_no_strict_json(running: Running, body: bytes, words: str) -> None:
    answer = running.run(ask(running.server.app, "/v1/completions", body))
    assert answer.status == 400
    assert answer.error is not None
    assert words in answer.error["message"]


_PARTS = st.recursive(
    st.integers() | st.text('a"\\[]{}:,\u00e9'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('ab"\\[{'), inner),
)


@given(_PARTS)
@example("\\" * 9)
@example({'a\\"': "[[[[", "\\": '"""'})
def test_parts_are_counted_as_they_are(value: Any) -> None:
    """Whatever strings look like; and what has too many is refused before it is parsed."""

    def num_parts(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + len(value) + sum(map(num_parts, value.values()))
        return 1 + sum(map(num_parts, value)) if isinstance(value, list) else isinstance(value, str)

    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, separators=(" , ", " : "))):
        assert parse_json(text, max_parts=num_parts(value)) == value
        if num_parts(value) > 0:
            with pytest.raises(ValueError, match="strings, arrays and objects"):
                parse_json(text, max_parts=num_parts(value) - 1)


@pytest.mark.parametrize("text", ['"', '"\\"', '"\\" ', '\\"', '"" ', '"\\\\'])
def test_counting_parts_takes_no_longer_where_strings_do_not_end(text: str) -> None:
    with pytest.raises(ValueError, match=r"strings, arrays and objects|column|control"):
        parse_json(text * 1_000_000, max_parts=1000)


def test_large_bodies_are_parsed_aside(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other clients do not wait for it."""
    threads: list[threading.Thread] = []

    def parse(text: str, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return parse_json(text, **options)

    monkeypatch.setattr("octavo.engine.server.body.parse_json", parse)
    for num_ids in (10, 100_000):
        body = json.dumps({"tokens": [1] * num_ids}).encode()
        assert running.run(ask(running.server.app, "/detokenize", body)).status == 200
    serving_thread = running.call(threading.current_thread)
    assert [thread is serving_thread for thread in threads] == [True, False]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@example([[[]]])
def test_strict_json_is_json(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_schemathesis(running: Running, count: Callable[[int, int], int], path: str, mode: GenerationMode) -> None:
    """Bodies made from the OpenAPI document: valid by it, or not."""
    operation = schemathesis.openapi.from_dict(openapi_document())[path]["POST"]

    num_asked = 0

    @settings(max_examples=count(15, 1000), suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        nonlocal num_asked
        body = case.body if isinstance(case.body, bytes) else json.dumps(case.body, default=str).encode()
        _check(running.run(ask(running.server.app, path, body)), body)
        num_asked += 1
        if num_asked % 100 == 0:
            running.check_canary()

    run()
    running.check_canary()


def test_odd_paths(running: Running, count: Callable[[int, int], int], seed: int) -> None:
    rng = random.Random(seed)
    parts = ["v1", "models", "requests", "..", "%2e", "\x00", "\ud800", "é", "", "completions", "{model}", "x" * 300]
    for _ in range(count(100, 5000)):
        path = "/" + "/".join(rng.choice(parts) for _ in range(rng.randrange(5)))
        method = rng.choice(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "ODD", "get"))
        answer = running.run(ask(running.server.app, path, b"{}", method=method))
        assert answer.status < 500, (method, path, answer)
    running.check_canary()
