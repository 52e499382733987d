"""This module holds how answers look on a terminal. It does not know files or the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .batch import Finished
from .requests import BatchRequest
from .terminal import error_line, show

if TYPE_CHECKING:
    from ..step import RequestOutput

__all__ = ["PrettyAnswers"]


class PrettyAnswers:
    """Prints prompts dimmed and answers beside them, the first one that is not over as it grows."""

    def __init__(self) -> None:
        self._shown: int | None = None
        """Characters of the growing answer that are on the screen; None: not even its prompt."""

    def grow(self, entry: Finished) -> None:
        """Print what is new of a request that is not over."""
        assert entry.output is not None, "it has begun"
        if len(entry.output.outputs) == 1:
            self._show_rest(entry, entry.output)

    def finish(self, entry: Finished) -> None:
        """Print what is left of a request that is over."""
        output = entry.output
        if output is None:
            self.end()
            error_line(str(entry.error))
            return
        if len(output.outputs) == 1:
            self._show_rest(entry, output)
            show("\n")
        else:
            show(_prompt_text(entry), "dim")
            for answer in output.outputs:
                show(f"[{answer.index}]", "dim", end="")
                show(answer.text)
            show("")
        self._shown = None

    def end(self) -> None:
        """End the line of an answer that was left in the middle."""
        if self._shown is not None:
            show("")
            self._shown = None

    def _show_rest(self, entry: Finished, output: RequestOutput) -> None:
        if self._shown is None:
            show(_prompt_text(entry), "dim", end="\n" if _is_chat(entry) else "")
            self._shown = 0
        text = output.outputs[0].text
        show(text[self._shown :], end="")
        self._shown = len(text)


def _is_chat(entry: Finished) -> bool:
    prompt: Any = entry.request.prompt if isinstance(entry.request, BatchRequest) else ()
    return not isinstance(prompt, str) and isinstance(prompt[0], dict)


def _prompt_text(entry: Finished) -> str:
    assert isinstance(entry.request, BatchRequest), "only these have answers"
    prompt: Sequence[Any] = entry.request.prompt
    if isinstance(prompt, str):
        return prompt
    if _is_chat(entry):
        content = prompt[-1].get("content")
        return content if isinstance(content, str) else str(content)
    return f"{list(prompt[:8])}{' …' if len(prompt) > 8 else ''} "
