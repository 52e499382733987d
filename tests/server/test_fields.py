"""The walk over every field of OpenAI's schemas, and ours: honoured or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import jsonschema_rs
import pytest
from octavo.engine.sampling_params import RULES
from octavo.engine.server.fields import CHAT, COMPLETIONS, DETOKENIZE, MAX_PROMPTS, MAX_TOKEN_IDS, TOKENIZE
from octavo.engine.server.openapi import field_table, limit_table, openapi_document
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from .raw import Response, post
from .serving import Running

README = Path(__file__).parents[2] / "engine" / "server" / "README.md"
MESSAGES = [{"role": "user", "content": "hello there"}]
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
BASE: dict[str, dict[str, Any]] = {
    "chat": {"messages": MESSAGES, "max_tokens": 12, "seed": 7},
    "completions": {"prompt": "hello there", "max_tokens": 12, "seed": 7},
}
LABELS = {"user": "me", "safety_identifier": "me", "prompt_cache_key": "me", "metadata": {"of": "me"}}
"""Documented to change nothing."""
REFUSED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "mp3"},
    "best_of": 2,
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "a"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "service_tier": "flex",
    "store": True,
    "suffix": "end",
    "verbosity": "high",
    "web_search_options": {},
}


def _ask(running: Running, route: str, **fields: Any) -> Response:
    body = {name: value for name, value in (BASE[route] | fields).items() if value is not None}
    # Python's writer would spell infinity as a word that is no JSON.
    return post(running, PATHS[route], json.dumps(body).replace("Infinity", "1e400").encode())


def _answer(running: Running, route: str, **fields: Any) -> Any:
    response = _ask(running, route, **fields)
    assert response.status == 200, response.body
    return json.loads(response.body)


def _text(answer: Any, choice: int = 0) -> str:
    given = answer["choices"][choice]
    text: str = given["message"]["content"] if "message" in given else given["text"]
    return text


def _ids(answer: Any) -> list[int]:
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def test_every_openai_field_is_in_the_table() -> None:
    for params, table in ((chat_create_params, CHAT), (completion_create_params, COMPLETIONS)):
        names = get_type_hints(params.CompletionCreateParamsStreaming).keys()
        assert len(names) > 15
        assert names - table.keys() == set()
    for name in RULES:
        assert name in CHAT or name in ("bad_words_token_ids", "detokenize", "return_hidden_states")


@pytest.mark.parametrize("route", PATHS)
def test_refused_fields(fake: Running, route: str) -> None:
    table = CHAT if route == "chat" else COMPLETIONS
    neutral = {name for name, field in table.items() if field.kind == "neutral"}
    assert neutral <= REFUSED.keys()
    plain = _text(_answer(fake, route))
    for name in neutral:
        response = _ask(fake, route, **{name: REFUSED[name]})
        assert (response.status, response.error["param"]) == (400, name)
        for value in (None, *table[name].neutral):
            body = BASE[route] | {name: value}
            response = post(fake, PATHS[route], body)
            assert response.status == 200, (name, value)
            assert _text(json.loads(response.body)) == plain


@pytest.mark.parametrize("route", PATHS)
def test_labels_change_nothing(fake: Running, route: str) -> None:
    table = CHAT if route == "chat" else COMPLETIONS
    labels = {name for name, field in table.items() if field.kind == "label"}
    assert labels <= LABELS.keys()
    plain = _text(_answer(fake, route))
    for name in labels:
        assert _text(_answer(fake, route, **{name: LABELS[name]})) == plain
        response = _ask(fake, route, **{name: 5})
        assert (response.status, response.error["param"]) == (400, name)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_unknown_fields(fake: Running, path: str) -> None:
    for name in ("temprature", "guided_json", "chat_template", "Prompt", "", "\ud800", "x" * 500):
        response = post(fake, path, {name: 1, "prompt": "a", "messages": MESSAGES, "tokens": []})
        assert response.status == 400
        assert response.error["param"] in (name[:64], "\\ud800", "messages", "prompt", "tokens")


def test_unknown_fields_that_are_nearly_known(fake: Running) -> None:
    response = _ask(fake, "chat", temprature=1)
    assert response.error["param"] == "temprature"
    assert "did you mean temperature?" in response.error["message"]


@pytest.mark.parametrize("route", PATHS)
def test_model(fake: Running, route: str) -> None:
    assert _answer(fake, route, model="fake")["model"] == "fake"
    response = _ask(fake, route, model="other")
    assert (response.status, response.error["param"], response.error["code"]) == (404, "model", "model_not_found")


class TestHonoured:
    """Each field with a value that is not its default changes the answer as it should."""

    @pytest.fixture(params=list(PATHS))
    def route(self, request: pytest.FixtureRequest) -> str:
        route: str = request.param
        return route

    def test_all_are_walked(self) -> None:
        """Every field that is not a label or refused is asked for somewhere in this file."""
        source = Path(__file__).read_text() + (Path(__file__).parent / "test_tools.py").read_text()
        for name, field in (CHAT | COMPLETIONS).items():
            if field.kind in ("sampling", "route"):
                assert f"{name}=" in source or f'"{name}"' in source, name

    def test_prompt(self, tiny: Running) -> None:
        answer = _answer(tiny, "completions", prompt="other", temperature=0)
        assert _text(answer) != _text(_answer(tiny, "completions", temperature=0))

    def test_messages(self, tiny: Running) -> None:
        other = [{"role": "system", "content": "no"}, *MESSAGES]
        assert _text(_answer(tiny, "chat", messages=other)) != _text(_answer(tiny, "chat"))
        parts = [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}]
        assert _text(_answer(tiny, "chat", messages=parts)) == _text(_answer(tiny, "chat"))
        for wrong in ([], [{"role": "nobody", "content": "a"}], [{"role": "user"}], "hello", [5]):
            response = _ask(tiny, "chat", messages=wrong)
            assert response.status == 400
            assert response.error["param"].startswith("messages")

    def test_max_tokens(self, fake: Running, route: str) -> None:
        assert _answer(fake, route, max_tokens=3)["usage"]["completion_tokens"] == 3
        response = _ask(fake, route, max_tokens=0)
        assert (response.status, response.error["param"]) == (400, "max_tokens")

    def test_max_completion_tokens(self, fake: Running) -> None:
        answer = _answer(fake, "chat", max_tokens=None, max_completion_tokens=4)
        assert answer["usage"]["completion_tokens"] == 4
        assert _answer(fake, "chat", max_tokens=4, max_completion_tokens=4)["usage"]["completion_tokens"] == 4
        assert _ask(fake, "chat", max_tokens=4, max_completion_tokens=5).error["param"] == "max_tokens"

    def test_n(self, tiny: Running, route: str) -> None:
        answer = _answer(tiny, route, n=3)
        assert len({_text(answer, choice) for choice in range(3)}) == 3

    def test_temperature(self, tiny: Running, route: str) -> None:
        greedy = {_text(_answer(tiny, route, temperature=0, seed=seed)) for seed in range(3)}
        assert len(greedy) == 1
        assert {_text(_answer(tiny, route, temperature=0.5, seed=seed)) for seed in range(3)} != greedy

    def test_top_p(self, tiny: Running, route: str) -> None:
        assert _text(_answer(tiny, route, top_p=1e-6)) == _text(_answer(tiny, route, temperature=0))

    def test_top_k(self, tiny: Running, route: str) -> None:
        assert _text(_answer(tiny, route, top_k=1)) == _text(_answer(tiny, route, temperature=0))

    def test_min_p(self, tiny: Running, route: str) -> None:
        assert _text(_answer(tiny, route, min_p=1.0)) == _text(_answer(tiny, route, temperature=0))

    def test_penalties(self, tiny: Running, route: str) -> None:
        ask = {"temperature": 0, "return_token_ids": True, "max_tokens": 40}
        for name in ("presence_penalty", "frequency_penalty"):
            plain, changed = (_ids(_answer(tiny, route, **ask, **{name: value})) for value in (-2.0, 2.0))
            assert plain != changed, name
        plain, changed = (_ids(_answer(tiny, route, **ask, repetition_penalty=value)) for value in (0.1, 10.0))
        assert plain != changed

    def test_seed(self, tiny: Running, route: str) -> None:
        assert _text(_answer(tiny, route)) == _text(_answer(tiny, route)) != _text(_answer(tiny, route, seed=8))

    def test_stop(self, fake: Running, route: str) -> None:
        text = _text(_answer(fake, route))
        answer = _answer(fake, route, stop=[text[5:7], "never"])
        assert _text(answer) == text[:5]
        assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("stop", text[5:7])
        assert _text(_answer(fake, route, stop=text[5:7], include_stop_str_in_output=True)) == text[:7]

    def test_stop_token_ids(self, fake: Running, route: str) -> None:
        ids = _ids(_answer(fake, route, return_token_ids=True))
        answer = _answer(fake, route, stop_token_ids=[ids[5]], return_token_ids=True)
        assert _ids(answer) == ids[: ids.index(ids[5]) + 1]
        assert answer["choices"][0]["stop_reason"] == ids[5]

    def test_ignore_eos(self, tiny: Running, route: str) -> None:
        only_eos = {"logit_bias": {"257": 100}, "return_token_ids": True}
        assert _ids(_answer(tiny, route, **only_eos)) == [257]
        assert _ids(_answer(tiny, route, **only_eos, ignore_eos=True)) == [257] * 12

    def test_min_tokens(self, tiny: Running, route: str) -> None:
        ids = _ids(_answer(tiny, route, logit_bias={"257": 100}, return_token_ids=True, min_tokens=3))
        assert len(ids) == 4
        assert ids[3] == 257
        text = _text(_answer(tiny, route))
        assert _text(_answer(tiny, route, stop=list(text[:8]), min_tokens=12)) == text

    def test_skip_special_tokens(self, tiny: Running, route: str) -> None:
        ask: dict[str, Any] = {"logit_bias": {"256": 100}, "max_tokens": 2}
        assert _text(_answer(tiny, route, **ask)) == ""
        assert _text(_answer(tiny, route, **ask, skip_special_tokens=False)) == "<bos><bos>"

    def test_logit_bias(self, tiny: Running, route: str) -> None:
        assert _text(_answer(tiny, route, logit_bias={"64": 100})) == "a" * 12
        for wrong in ({"300": 1}, {"a": 1}, {"1": 101}, {"1": True}, [1], {"01": 1}):
            assert _ask(tiny, route, logit_bias=wrong).error["param"] == "logit_bias"

    def test_allowed_token_ids(self, tiny: Running, route: str) -> None:
        assert set(_text(_answer(tiny, route, allowed_token_ids=[64, 65]))) == {"a", "b"}

    def test_bad_words(self, tiny: Running, route: str) -> None:
        ask: dict[str, Any] = {"allowed_token_ids": [64, 65]}
        assert set(_text(_answer(tiny, route, **ask, bad_words=["a"]))) == {"b"}

    def test_priority(self, fake: Running, route: str) -> None:
        """Its order is the scheduler's matter; here that a number goes through and anything else does not."""
        assert _ask(fake, route, priority=-5).status == 200
        assert _ask(fake, route, priority="high").error["param"] == "priority"

    def test_cache_salt(self, fake: Running, route: str) -> None:
        long = {
            "chat": {"messages": [{"role": "user", "content": f"{route} " * 20}]},
            "completions": {"prompt": [9] * 99},
        }

        def cached(salt: str) -> int:
            details = _answer(fake, route, **long[route], cache_salt=salt)["usage"]["prompt_tokens_details"]
            return int(details["cached_tokens"])

        assert cached("one") == 0
        assert cached("one") > 0
        assert cached("two") == 0

    def test_logprobs(self, tiny: Running) -> None:
        plain = _answer(tiny, "completions")["choices"][0]
        assert plain["logprobs"] is None
        shown = _answer(tiny, "completions", logprobs=2)["choices"][0]["logprobs"]
        assert len(shown["tokens"]) == 12
        assert all(1 <= len(top) <= 3 for top in shown["top_logprobs"])
        chat = _answer(tiny, "chat", logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
        assert [len(token["top_logprobs"]) for token in chat["content"]] == [2] * 12
        assert _answer(tiny, "chat", logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
        assert _ask(tiny, "chat", top_logprobs=2).error["param"] == "top_logprobs"
        assert _ask(tiny, "chat", logprobs=2).error["param"] == "logprobs"
        assert _ask(tiny, "completions", logprobs=True).error["param"] == "logprobs"
        assert _ask(tiny, "completions", logprobs=21).error["param"] == "logprobs"

    def test_prompt_logprobs(self, tiny: Running, route: str) -> None:
        answer = _answer(tiny, route, prompt_logprobs=2)
        shown = answer["prompt_logprobs"] if route == "chat" else answer["choices"][0]["prompt_logprobs"]
        assert len(shown) == answer["usage"]["prompt_tokens"]
        assert shown[0] is None
        assert all(2 <= len(position) <= 3 for position in shown[1:])
        assert _ask(tiny, route, prompt_logprobs=2, stream=True).error["param"] == "prompt_logprobs"

    def test_echo(self, fake: Running) -> None:
        assert _text(_answer(fake, "completions", echo=True)) == "hello there" + _text(_answer(fake, "completions"))
        assert _ask(fake, "completions", echo=True, logprobs=1, stream=True).error["param"] == "echo"

    def test_return_token_ids(self, fake: Running, route: str) -> None:
        answer = _answer(fake, route, return_token_ids=True)
        prompt = answer["prompt_token_ids"] if route == "chat" else answer["choices"][0]["prompt_token_ids"]
        assert len(prompt) == answer["usage"]["prompt_tokens"]
        assert len(_ids(answer)) == 12
        assert "token_ids" not in _answer(fake, route)["choices"][0]

    def test_stream(self, fake: Running, route: str) -> None:
        response = _ask(fake, route, stream=True)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert b"data: [DONE]" in response.body
        assert b'"usage"' not in response.body
        response = _ask(fake, route, stream=True, stream_options={"include_usage": True})
        assert b'"completion_tokens":12' in response.body
        for wrong in ({"include_obfuscation": True}, {"more": True}, {"include_usage": 1}, [], "yes"):
            assert _ask(fake, route, stream=True, stream_options=wrong).error["param"] == "stream_options"
        assert _ask(fake, route, stream_options={"include_usage": True}).error["param"] == "stream_options"

    def test_add_generation_prompt(self, tiny: Running) -> None:
        plain, without = (_answer(tiny, "chat", add_generation_prompt=value) for value in (True, False))
        assert without["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]

    def test_chat_template_kwargs(self, fake: Running) -> None:
        assert _ask(fake, "chat", chat_template_kwargs={"enable_thinking": False}).status == 200
        for wrong in ({"chat_template": "x"}, [], "", 0, False):
            assert _ask(fake, "chat", chat_template_kwargs=wrong).error["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("route", PATHS)
def test_wrong_types(fake: Running, route: str) -> None:
    """No field takes what is not of its kind, and each says so by its own name."""
    table = CHAT if route == "chat" else COMPLETIONS
    wrong: list[Any] = ["no such", [[["x"]]], {"x": {"y": 1}}, 1e400, -1, 10**300, True, 1.5]
    for name, field in table.items():
        refused = 0
        for value in wrong:
            response = _ask(fake, route, **{name: value})
            assert response.status in (200, 400, 404), (name, value)
            if response.status != 200:
                assert (response.error["param"] or "").split(".")[0].split("[")[0] == name, (name, value, response.body)
                refused += 1
        assert refused >= 3 or field.kind == "label", name


def test_openapi_is_what_is_checked() -> None:
    document = openapi_document()
    for path, table in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", COMPLETIONS),
        ("/tokenize", TOKENIZE),
        ("/detokenize", DETOKENIZE),
    ):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"].keys() == table.keys()
        assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("path", "field", "taken", "refused"),
    [
        ("/v1/completions", "prompt", ["a"] * MAX_PROMPTS, ["a"] * (MAX_PROMPTS + 1)),
        ("/v1/completions", "prompt", [[1]] * MAX_PROMPTS, [[1]] * (MAX_PROMPTS + 1)),
        ("/v1/completions", "prompt", [[1]], [[1], [1] * (MAX_TOKEN_IDS + 1)]),
        ("/v1/completions", "prompt", [[1]], [[1], []]),
        ("/detokenize", "tokens", [1] * MAX_TOKEN_IDS, [1] * (MAX_TOKEN_IDS + 1)),
        *(
            (path, "stream_options", {"include_usage": True, name: False}, {name: True})
            for path in PATHS.values()
            for name in ("include_obfuscation", "continuous_usage_stats")
        ),
    ],
)
def test_the_schema_takes_what_is_taken(fake: Running, path: str, field: str, taken: Any, refused: Any) -> None:
    """No tighter and no wider, where they once differed."""
    operation = openapi_document()["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    # Neither a token each, nor rows for all of them, is what this is about.
    body: dict[str, Any] = {} if path == "/detokenize" else {"stream": True, "max_tokens": 1}
    body |= {"messages": MESSAGES} if "chat" in path else {"prompt": "a"} if body else {}
    for value, is_taken in ((taken, True), (refused, False)):
        asked = body | {field: value}
        response = post(fake, path, asked)
        assert (response.status == 200) == is_taken, response.body[:500]
        assert is_taken or response.error["param"] == field
        assert jsonschema_rs.is_valid(schema, asked) == is_taken


@pytest.mark.parametrize(("name", "table"), [("fields", field_table()), ("limits", limit_table())])
def test_readme_has_the_table(name: str, table: str) -> None:
    """To renew one, put what `octavo.engine.server.openapi` makes of it between its marks."""
    text = README.read_text(encoding="utf-8")
    assert text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- end of {name} -->")[0] == table
