"""octavo chat over pipes: history, commands, Ctrl-C, a context that is full."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.llm import LLM

from .conftest import Ran, Run

Chat = Callable[..., Ran]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The messages of every request, in order."""
    found: list[list[dict[str, str]]] = []
    stream = LLM.stream

    def noting(llm: LLM, messages: Any, params: Any) -> Any:
        found.append([dict(message) for message in messages])
        return stream(llm, messages, params)

    monkeypatch.setattr(LLM, "stream", noting)
    return found


@pytest.fixture
def chat(octavo: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Return `chat(lines, *words)`: say lines to the tiny model."""

    def run(lines: str, *words: str) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        small = ("--load-format", "dummy", "--kv-cache-tokens", "1024", "-q", "--ignore-eos", "--temperature", "0")
        return octavo("chat", "--model", model_folder, *small, *words)

    return run


def roles(messages: list[dict[str, str]]) -> str:
    return " ".join(message["role"][0] for message in messages)


def test_history_is_kept_until_reset(chat: Chat, asked: list[list[dict[str, str]]]) -> None:
    ran = chat("one\ntwo\n/reset\nthree\n/exit\nnever said\n", "--max-tokens", "4")
    assert ran.status == 0
    assert [roles(messages) for messages in asked] == ["u", "u a u", "u"]
    assert asked[1][0]["content"] == "one"
    assert ran.out.startswith(asked[1][1]["content"] + "\n")


def test_the_system_message(chat: Chat, asked: list[list[dict[str, str]]]) -> None:
    chat("a\n/system Be kind.\nb\n/system\nc\n", "--system", "Be brief.", "--max-tokens", "2")
    assert [roles(messages) for messages in asked] == ["s u", "s u", "u"]
    assert [messages[0]["content"] for messages in asked[:2]] == ["Be brief.", "Be kind."]


def test_params_are_set_shown_and_taken_back(chat: Chat) -> None:
    ran = chat(
        "/params\n/params temperature=0.5\n/params temperature=\n/params heat=1\n"
        "/params top_k\n/params top_p=7\n/params hot=\n"
    )
    shown = ran.err.splitlines()
    assert shown[0].startswith("temperature=0.0  top_p=1.0")
    assert shown[1].startswith("temperature=0.5")
    assert shown[2].startswith("temperature=1.0")
    assert "unknown parameter 'heat'" in shown[3]
    assert "write /params temperature=0.7" in shown[4]
    assert "top_p is 7" in shown[5]
    assert "unknown parameter 'hot'" in shown[6]
    assert len(shown) == 7


def test_params_change_the_answer(chat: Chat) -> None:
    ran = chat('/params logit_bias={"66": 100}\n/params max_tokens=3\nhi\n')
    letter = ran.out.strip()
    assert len(letter) == 3
    assert len(set(letter)) == 1


@pytest.mark.parametrize("words", [("--n", "2"), ("--logprobs", "1"), ("--no-detokenize",)])
def test_what_a_chat_cannot_show_is_refused(chat: Chat, words: tuple[str, ...]) -> None:
    ran = chat("hi\n", *words)
    assert (ran.status, ran.out) == (2, "")
    assert f"cannot show {words[0].removeprefix('--').replace('-', ' ')}; use octavo generate --chat" in ran.err


def test_what_a_chat_cannot_show_is_not_set(chat: Chat) -> None:
    ran = chat("/params n=2\n/params\nhi\n", "--max-tokens", "2")
    assert ran.status == 0
    assert "cannot show n;" in ran.err.splitlines()[0]
    assert "n=2" not in ran.err.splitlines()[1]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_spoil_one_message(
    chat: Chat, asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"one\nx\xffy\ntwo\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(io, "StringIO", lambda lines: stdin)
    ran = chat("", "--max-tokens", "2")
    assert ran.status == 1
    assert "error: the message is not UTF-8" in ran.err
    assert [messages[-1]["content"] for messages in asked] == ["one", "two"]


def test_help_and_unknown_commands(chat: Chat) -> None:
    ran = chat("/help\n/sing\n")
    assert "/system TEXT" in ran.err
    assert "there is no /sing; allowed: /reset" in ran.err
    assert ran.out == ""


def test_a_full_context_names_the_way_out(chat: Chat, asked: list[list[dict[str, str]]]) -> None:
    ran = chat(f"short\n{'long ' * 30}\nand\n/reset\nshort\n", "--max-tokens", "6")
    assert ran.status == 1
    assert "/reset forgets it" in ran.err
    assert "allowed: 1 to 127" in ran.err
    assert [roles(messages) for messages in asked] == ["u", "u a u", "u a u", "u"]


def test_an_answer_cut_by_the_context_says_so(chat: Chat) -> None:
    ran = chat("short\n")
    assert "the context of 128 tokens is full; /reset starts afresh" in ran.err
    assert "cut at max_tokens" in chat("short\n", "--max-tokens", "2").err


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    chat: Chat, asked: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, steps = LLM.stream, iter(range(1000))
    llms: list[LLM] = []

    def interrupted(llm: LLM, messages: Any, params: Any) -> Generator[Any, None, None]:
        llms.append(llm)
        for output in (answers := stream(llm, messages, params)):
            if next(steps) == 5:
                signal.raise_signal(signal.SIGINT)
            try:
                yield output
            except GeneratorExit:
                answers.close()
                raise

    monkeypatch.setattr(LLM, "stream", interrupted)
    ran = chat("one\ntwo\n", "--max-tokens", "20")
    assert ran.status == 0
    assert "(stopped)" in ran.err
    assert [roles(messages) for messages in asked] == ["u", "u a u"]
    assert llms[0].stats.num_running == 0
    # Six tokens of the first answer, all twenty of the second.
    assert llms[0].stats.num_output_tokens == 26
