"""This module holds the search for the end of a model's thoughts in streamed text. It does not know tokens or HTTP.

Models that think write `<think>...</think>` before their answer; where the chat template has opened the tag already,
the text begins inside of it.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ReasoningStream", "Thought", "thinks"]

OPEN, CLOSE = "<think>", "</think>"


class Thought(NamedTuple):
    """What is new of an answer."""

    reasoning: str
    content: str


def thinks(template: str) -> bool:
    """Whether a model with this chat template marks its thoughts."""
    return CLOSE in template


class ReasoningStream:
    """Tells thoughts from the answer.

    Args:
        prompt_end: the end of the prompt, which may have opened the thoughts.
    """

    def __init__(self, prompt_end: str) -> None:
        self._is_open = prompt_end.rstrip().endswith(OPEN)
        self._is_done = False
        self._at_start = True
        """Nothing but white space has come of the part that is being read."""
        self._held = ""

    def feed(self, text: str) -> Thought:
        """Take the next piece of the answer and return what is certain by now."""
        return self._read(text, is_last=False)

    def finish(self) -> Thought:
        """Return what was held back; nothing may follow."""
        return self._read("", is_last=True)

    def _read(self, text: str, *, is_last: bool) -> Thought:
        text = self._held + text
        self._held = ""
        if not self._is_open and not self._is_done:
            start = text.lstrip()
            if start.startswith(OPEN):
                self._is_open, text = True, start[len(OPEN) :]
            elif OPEN.startswith(start) and not is_last:
                self._held = text
                return Thought("", "")
            else:
                self._is_done, self._at_start = True, False
        if self._is_done:
            return Thought("", self._stripped(text))
        reasoning, tag, content = text.partition(CLOSE)
        if tag:
            # White space around the tag belongs to it.
            reasoning = self._stripped(reasoning).rstrip()
            self._is_done, self._at_start = True, True
            return Thought(reasoning, self._stripped(content))
        end = len(text) if is_last else len(text) - _undecided(text)
        self._held = text[end:]
        return Thought(self._stripped(text[:end]), "")

    def _stripped(self, text: str) -> str:
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        return text


def _undecided(text: str) -> int:
    """Return how many characters at the end may be white space before the tag, or the tag's beginning."""
    longest = min(len(text), len(CLOSE) - 1)
    begun = next(size for size in range(longest, -1, -1) if CLOSE.startswith(text[len(text) - size :]))
    rest = text[: len(text) - begun]
    return begun + len(rest) - len(rest.rstrip())
