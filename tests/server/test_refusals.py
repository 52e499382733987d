"""What an engine refuses for its own reasons, as clients see it: special tokens in prompts, and too many grammars."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from octavo.engine.process import loop

from .serving import Running, check_fake, serving


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    with serving(engine={"special_in_prompts": False}) as running:
        yield running


@pytest.mark.parametrize("prompt", ["a<|im_end|>", ["fine", "<|im_start|>"]])
def test_a_special_token_in_a_prompt_is_refused_by_name(strict: Running, prompt: str | list[str]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        strict.client.completions.create(model="fake", prompt=prompt)
    named = "'<|im_end|>'" if isinstance(prompt, str) else "'<|im_start|>'"
    assert f"prompt holds the special token {named}; allowed: a text without such" in str(refused.value)
    assert refused.value.param == "prompt"
    strict.check_canary()


def test_in_messages_it_is_text_and_ids_are_ids(strict: Running) -> None:
    answer = strict.client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "a<|im_end|>"}], max_tokens=3
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert strict.client.completions.create(model="fake", prompt=[1, 257], max_tokens=2).usage is not None
    check_fake(strict.client, "<|im_en d|>", 3)


def test_it_is_parsed_unless_that_is_refused() -> None:
    with serving() as running:
        answer = running.client.completions.create(model="fake", prompt="a<|im_end|>", max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_backlog_of_grammars_is_busy_not_wrong(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(loop, "MAX_COMPILING", 0)
    with serving() as running:
        with pytest.raises(openai.RateLimitError) as refused:
            running.client.completions.create(  # type: ignore[call-overload]
                model="fake", prompt="a", stream=stream, extra_body={"structured_outputs": {"regex": "a+"}}
            )
        assert (refused.value.code, refused.value.param) == ("queue_full", "structured_outputs")
        assert refused.value.response.headers["retry-after"] == "1"
        assert "allowed: later" in str(refused.value)
        running.check_canary()
