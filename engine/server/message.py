"""This module holds the reading of an answer's text: thoughts, words and calls. It does not know how it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..text.reasoning import ReasoningStream
from ..text.tool_calls import CallDelta, TextDelta
from ..text.tools import ToolSession

__all__ = ["Delta", "MessageReader", "whole_message"]


class Delta(msgspec.Struct, omit_defaults=True):
    """A piece of a message, as OpenAI's chunks have it."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class MessageReader:
    """Reads one answer, piece by piece or at once.

    Args:
        session: the tools it may call; None: none, and all is text.
        prompt_end: the end of the prompt, of a model that marks its thoughts; None: of one that does not.
    """

    def __init__(self, session: ToolSession | None, prompt_end: str | None) -> None:
        self._calls = None if session is None else session.stream()
        self._thoughts = None if prompt_end is None else ReasoningStream(prompt_end)

    @property
    def has_called(self) -> bool:
        """Whether something was called."""
        return self._calls is not None and self._calls.num_calls > 0

    def feed(self, text: str, *, is_last: bool) -> list[Delta]:
        """Take the next piece of the text; return what is certain by now."""
        if self._calls is None and self._thoughts is None:
            return [Delta(content=text)] if text else []
        deltas: list[Delta] = []
        if self._thoughts is not None:
            reasoning, text = self._thoughts.feed(text)
            if is_last:
                last = self._thoughts.finish()
                reasoning, text = reasoning + last.reasoning, text + last.content
            if reasoning:
                deltas.append(Delta(reasoning_content=reasoning))
        if self._calls is None:
            return deltas + ([Delta(content=text)] if text else [])
        pieces = self._calls.feed(text)
        if is_last:
            pieces += self._calls.finish()
        for piece in pieces:
            if isinstance(piece, TextDelta):
                deltas.append(Delta(content=piece.text))
            else:
                deltas.append(Delta(tool_calls=[_call_piece(piece)]))
        return deltas


def _call_piece(piece: CallDelta) -> dict[str, Any]:
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.call_id, "type": "function", "function": function}


def whole_message(deltas: Sequence[Delta]) -> dict[str, Any]:
    """Return the message that the pieces make."""
    calls: list[dict[str, Any]] = []
    for piece in (piece for delta in deltas for piece in delta.tool_calls or ()):
        if "id" in piece:
            calls.append({"id": piece["id"], "type": "function", "function": piece["function"]})
        else:
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    content = "".join(delta.content or "" for delta in deltas)
    reasoning = "".join(delta.reasoning_content or "" for delta in deltas)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    return message
