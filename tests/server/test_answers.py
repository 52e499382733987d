"""What the real openai client gets, against the same engine without a server."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from octavo.engine.llm import LLM
from octavo.engine.process.fake import fake_tokenizer
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.server.logprobs import CompletionLogprobs, TokenTexts
from octavo.engine.step import LogprobEntry

from .serving import Running, fake_text

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is there?"}]
PROMPT = "in the"


def test_models(tiny: Running) -> None:
    (model,) = tiny.client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "octavo")
    assert tiny.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as refused:
        tiny.client.models.retrieve("other")
    assert refused.value.code == "model_not_found"


def test_greedy_equals_llm(tiny: Running, tiny_llm: LLM) -> None:
    answer = tiny.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    (alone,) = tiny_llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=20))
    assert answer.choices[0].text == alone.outputs[0].text
    assert answer.choices[0].finish_reason == alone.outputs[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(alone.prompt_token_ids)
    assert answer.usage.completion_tokens == len(alone.outputs[0].token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    chat = tiny.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0)
    (alone,) = tiny_llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=20))
    assert chat.choices[0].message.content == alone.outputs[0].text
    assert chat.choices[0].message.role == "assistant"


def test_default_max_tokens(fake: Running) -> None:
    answer = fake.client.completions.create(model="fake", prompt="abc")
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")
    chat = fake.client.chat.completions.create(model="fake", messages=MESSAGES)
    assert chat.usage is not None
    assert chat.usage.total_tokens == fake.llm.info.max_model_len


@pytest.mark.parametrize("include_usage", [False, True])
def test_streamed_chat_equals_whole(tiny: Running, include_usage: bool) -> None:
    whole = tiny.client.chat.completions.create(model="tiny", messages=MESSAGES, n=2, seed=5, max_tokens=24)
    options: Any = {"stream_options": {"include_usage": True}} if include_usage else {}
    texts, finished = ["", ""], [None, None]
    roles: list[str | None] = [None, None]
    chunks = list(
        tiny.client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=2, seed=5, max_tokens=24, stream=True, **options
        )
    )
    for chunk in chunks:
        assert (chunk.id, chunk.object, chunk.model) == (chunks[0].id, "chat.completion.chunk", "tiny")
        for choice in chunk.choices:
            assert finished[choice.index] is None, "something after the end of a choice"
            roles[choice.index] = roles[choice.index] or choice.delta.role
            assert roles[choice.index] == "assistant"
            texts[choice.index] += choice.delta.content or ""
            finished[choice.index] = choice.finish_reason  # type: ignore[call-overload]
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert finished == [choice.finish_reason for choice in whole.choices]
    usages = [chunk.usage for chunk in chunks]
    assert usages[:-1] == [None] * (len(chunks) - 1)
    if include_usage:
        assert usages[-1] is not None
        assert whole.usage is not None
        assert chunks[-1].choices == []
        assert usages[-1].completion_tokens == whole.usage.completion_tokens
        assert usages[-1].prompt_tokens == whole.usage.prompt_tokens
    else:
        assert usages[-1] is None


def test_streamed_completions_equal_whole(tiny: Running) -> None:
    prompts = ["one", "two and", "three"]
    ask: dict[str, Any] = {"model": "tiny", "prompt": prompts, "n": 2, "seed": 3, "max_tokens": 10, "logprobs": 3}
    whole = tiny.client.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts = [""] * 6
    tokens: list[list[str]] = [[] for _ in range(6)]
    logprobs: list[list[float]] = [[] for _ in range(6)]
    offsets: list[list[int]] = [[] for _ in range(6)]
    for chunk in tiny.client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            assert choice.logprobs is not None
            tokens[choice.index] += choice.logprobs.tokens or []
            logprobs[choice.index] += choice.logprobs.token_logprobs or []
            offsets[choice.index] += choice.logprobs.text_offset or []
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert logprobs[choice.index] == choice.logprobs.token_logprobs
        assert offsets[choice.index] == choice.logprobs.text_offset


def test_prompt_forms(fake: Running) -> None:
    ids = [[0, 5, 93], [7]]
    forms: list[tuple[Any, list[Any]]] = [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        (ids[0], [ids[0]]),
        (ids, ids),
    ]
    for prompt, each in forms:
        answer = fake.client.completions.create(model="fake", prompt=prompt, max_tokens=5, seed=2)
        assert [choice.text for choice in answer.choices] == [fake_text(one, 5, seed=2) for one in each]


def test_completion_logprobs(tiny: Running, tiny_llm: LLM) -> None:
    answer = tiny.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=4)
    (alone,) = tiny_llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8, logprobs=4))
    shown, entries = answer.choices[0].logprobs, alone.outputs[0].logprobs
    assert shown is not None
    assert entries is not None
    assert shown.token_logprobs == [entry.logprob for entry in entries]
    assert shown.top_logprobs is not None
    for token, logprob, top in zip(shown.tokens or [], shown.token_logprobs or [], shown.top_logprobs, strict=True):
        assert max(top.values()) == logprob == top[token]
    offsets = shown.text_offset or []
    assert offsets[0] == 0
    assert offsets == sorted(offsets)


def test_tokens_that_look_the_same() -> None:
    """Bytes that are no character alone share a name, which the likeliest of them has."""
    texts, shown = TokenTexts(fake_tokenizer()), CompletionLogprobs()
    assert texts.text(120) == texts.text(121) == "\ufffd"
    shown.add(texts, [121], [LogprobEntry(-3.0, 7, [120, 5], [-0.5, -1.0])], 2, [0])
    assert shown.top_logprobs == [{"\ufffd": -0.5, texts.text(5): -1.0}]
    assert shown.token_logprobs == [-3.0]
    shown.add(texts, [5], [LogprobEntry(-math.inf, 9, [], [])], 0, [0])
    assert shown.token_logprobs[-1] == -9999.0


def test_echo(tiny: Running, tiny_llm: LLM) -> None:
    answer = tiny.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2, echo=True
    )
    scored = tiny.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=0, temperature=0, logprobs=2, echo=True
    )
    (alone,) = tiny_llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2, logprobs=2))
    assert alone.prompt_logprobs is not None
    assert alone.outputs[0].logprobs is not None
    expected = [None, *(entry.logprob for entry in alone.prompt_logprobs[1:] if entry)]
    for given, num_output in ((answer, 4), (scored, 0)):
        choice, usage = given.choices[0], given.usage
        assert choice.text == PROMPT + (alone.outputs[0].text if num_output else "")
        assert choice.logprobs is not None
        logprobs: list[Any] = choice.logprobs.token_logprobs or []
        assert logprobs == expected + [entry.logprob for entry in alone.outputs[0].logprobs][:num_output]
        assert (choice.logprobs.top_logprobs or [])[0] is None
        offsets, tokens = choice.logprobs.text_offset or [], choice.logprobs.tokens or []
        num_prompt = len(alone.prompt_token_ids)
        assert "".join(tokens[:num_prompt]) == PROMPT
        for offset, token in list(zip(offsets, tokens, strict=True))[:num_prompt]:
            assert choice.text[offset : offset + len(token)] == token
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, num_output)


def test_echo_streams_the_prompt_first(fake: Running) -> None:
    stream = fake.client.completions.create(model="fake", prompt="abc", max_tokens=5, seed=2, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abc" + fake_text("abc", 5, seed=2)


def test_chat_logprobs(tiny: Running) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    answer = tiny.client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    shown = answer.choices[0].logprobs
    assert shown is not None
    assert shown.content is not None
    assert len(shown.content) == 8
    joined = b"".join(bytes(token.bytes or []) for token in shown.content)
    assert joined.decode(errors="replace") == answer.choices[0].message.content
    for token in shown.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert math.fsum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-6
    streamed: list[Any] = []
    for chunk in tiny.client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, stream=True):
        given = chunk.choices[0].logprobs
        streamed += (given.content or []) if given is not None else []
    assert streamed == shown.content


def test_stop_seed_bias(tiny: Running) -> None:
    def ask(**params: Any) -> Any:
        return tiny.client.completions.create(model="tiny", prompt=PROMPT, **({"max_tokens": 24} | params)).choices[0]

    seeded = ask(seed=9)
    assert ask(seed=9).text == seeded.text != ask(seed=10).text
    stop = next(char for char in seeded.text[3:] if char != "�" and seeded.text.index(char) >= 3)
    stopped = ask(seed=9, stop=stop)
    assert stopped.finish_reason == "stop"
    assert stopped.text == seeded.text[: seeded.text.index(stop)]
    assert stopped.stop_reason == stop
    assert ask(seed=9, max_tokens=3, temperature=0, logit_bias={"64": 100}).text == "aaa"


def test_special_tokens_in_messages_stay_text(tiny: Running) -> None:
    ids = tiny.client.post("/../tokenize", body={"messages": [{"role": "user", "content": "<end>"}]}, cast_to=object)
    assert isinstance(ids, dict)
    assert ids["tokens"].count(258) == 1  # the template's own


def test_tokenize(fake: Running) -> None:
    def post(path: str, body: Any) -> Any:
        return fake.client.post(f"/../{path}", body=body, cast_to=object)

    answer = post("tokenize", {"prompt": "a b", "return_token_strs": True})
    assert answer["count"] == len(answer["tokens"]) == 3
    assert answer["token_strs"] == ["a", " ", "b"]
    assert post("detokenize", {"tokens": answer["tokens"]}) == {"prompt": "a b"}
    chat = post("tokenize", {"messages": MESSAGES})
    asked = fake.client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=1).usage
    assert asked is not None
    assert chat["count"] == asked.prompt_tokens


def test_request_id_is_free_again(fake: Running) -> None:
    """A client that has left may come back under the same name at once."""
    headers = {"X-Request-Id": "again"}
    for _ in range(5):
        stream = fake.client.completions.create(
            model="fake", prompt="a", max_tokens=2000, stream=True, extra_headers=headers
        )
        next(iter(stream))
        with pytest.raises(openai.ConflictError) as refused:
            fake.client.completions.create(model="fake", prompt="a", extra_headers=headers)
        assert refused.value.param == "X-Request-Id"
        stream.close()
        fake.eventually(lambda: not fake.server.app.context.admission.is_active("cmpl-again"))


def test_large_whole_answers(fake: Running) -> None:
    answer = fake.client.completions.create(
        model="fake", prompt=[[1] * 1500] * 4, max_tokens=2, echo=True, logprobs=3, seed=1
    )
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or []) == 1502
        assert choice == choice.model_copy(update={"text": answer.choices[0].text})


def test_request_id(fake: Running) -> None:
    headers = {"X-Request-Id": "my-own.id:7"}
    raw = fake.client.completions.with_raw_response.create(model="fake", prompt="a", extra_headers=headers)
    assert raw.headers["x-request-id"] == "my-own.id:7"
    assert raw.parse().id == "cmpl-my-own.id:7"
    with pytest.raises(openai.BadRequestError) as refused:
        fake.client.completions.create(model="fake", prompt="a", extra_headers={"X-Request-Id": "no spaces"})
    assert refused.value.param == "X-Request-Id"
    raw = fake.client.completions.with_raw_response.create(model="fake", prompt="a")
    assert raw.headers["x-request-id"] in raw.parse().id
