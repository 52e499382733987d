"""Thoughts told from answers, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.text.reasoning import ReasoningStream


def _read(prompt_end: str, pieces: list[str]) -> tuple[str, str]:
    stream = ReasoningStream(prompt_end)
    thoughts = [stream.feed(piece) for piece in pieces] + [stream.finish()]
    return "".join(thought.reasoning for thought in thoughts), "".join(thought.content for thought in thoughts)


@pytest.mark.parametrize(
    ("prompt_end", "text", "expected"),
    [
        ("assistant\n", "<think>\nTwo and two.\n</think>\n\nFour.", ("Two and two.", "Four.")),
        ("assistant\n", "\n<think>a</think>b", ("a", "b")),
        ("<think>\n", "Two and two.\n</think>\n\nFour.", ("Two and two.", "Four.")),
        ("<think>\n\n</think>\n\n", "Four.", ("", "Four.")),
        ("assistant\n", "Four. <think>no</think>", ("", "Four. <think>no</think>")),
        ("assistant\n", " Four.", ("", " Four.")),
        ("assistant\n", "<thin", ("", "<thin")),
        ("assistant\n", "<think>cut sho", ("cut sho", "")),
        ("assistant\n", "<think>cut sho</thi", ("cut sho</thi", "")),
        ("assistant\n", "<think></think>", ("", "")),
        ("assistant\n", "", ("", "")),
    ],
)
def test_however_it_is_cut(prompt_end: str, text: str, expected: tuple[str, str]) -> None:
    assert _read(prompt_end, [text]) == expected
    assert _read(prompt_end, list(text)) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "a", "</thi"]), max_size=12))
def test_pieces_equal_the_whole(pieces: list[str]) -> None:
    for prompt_end in ("", "<think>"):
        whole = _read(prompt_end, ["".join(pieces)])
        assert _read(prompt_end, pieces) == whole
        assert _read(prompt_end, list("".join(pieces))) == whole
