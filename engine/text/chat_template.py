"""This module holds the step from messages to a prompt. It does not know the model, HTTP or the tokenizer's format.

A template comes from the model's folder or from the operator, never from a request. Control tokens written inside a
message are hidden from the template behind lone surrogates, which no valid text contains, and put back afterwards.
Where they stand is then known exactly, so that the tokenizer can encode them as text.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from ..errors import CheckpointError, RequestError, describe
from .messages import check_messages
from .reasoning import thinks
from .template_sandbox import BoundedEnvironment, TemplateLimits, TemplateRefusalError
from .tokenizer import Tokenizer
from .tool_calls import CLOSE, OPEN, ToolFormat
from .tools import check_tools, detect_tool_format, tool_preamble

__all__ = ["ChatTemplate", "RenderedPrompt"]

_TEMPLATE_KWARGS: Mapping[str, type] = {"enable_thinking": bool}
_TEMPLATE_FAULTS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError),
    *(MemoryError, RecursionError, TypeError, ValueError),
)
_PLACEHOLDER = re.compile("[\ud800-\udbff][\udc00-\udfff]")


class RenderedPrompt(NamedTuple):
    """A prompt, and the [start, end) spans in characters in which no special token may be parsed."""

    text: str
    plain_spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """Renders messages with a Jinja template.

    Args:
        tokenizer: whose control tokens and names (bos_token, ...) the template uses.
        source: the operator's template; None: the tokenizer's own.
        limits: time and size of one render.
        tool_format: how the model spells calls; None: found out from the template.
        now: today, for templates that print it.
        clock: monotonic seconds, for the time limit.

    Raises:
        CheckpointError: there is no template, or it does not compile.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str | None = None,
        *,
        limits: TemplateLimits | None = None,
        tool_format: ToolFormat | None = None,
        now: Callable[[], datetime] = datetime.now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if source is None:
            source = tokenizer.chat_template
        if source is None:
            raise CheckpointError("chat template", "is missing: the tokenizer has none; give one with --chat-template")
        self._tokenizer = tokenizer
        self._environment = BoundedEnvironment(
            limits or TemplateLimits(), strftime_now=lambda format_: now().strftime(format_[:100]), clock=clock
        )
        try:
            self._template = self._environment.compile_bounded(source)
        except Exception as error:
            # Besides TemplateError, Python's own compiler gives up on what is nested too deeply.
            raise CheckpointError("chat template", f"does not compile: {str(error)[:500]}") from error
        self._guard = _Guard(tokenizer)
        self.tool_format: ToolFormat = tool_format or detect_tool_format(source)
        self.thinks = thinks(source)
        """Whether the model marks its thoughts; see `ReasoningStream`."""
        self.renders_tools = re.search(r"\btools\b", source) is not None
        """Else tools are described in a system message, and calls and their results are messages' text."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Render messages to a prompt.

        Args:
            messages: 1 to 1024 of {"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id"};
                content is a string or a list of {"type": "text", "text": ...}, which are joined by newlines.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: what the model may call; see `check_tools`. None: nothing.
            chat_template_kwargs: `enable_thinking` and no others.

        Raises:
            RequestError: the messages are not valid, or the template refuses them or exceeds its limits.
        """
        checked_tools = None if tools is None else check_tools(tools)
        extra = _check_kwargs({} if chat_template_kwargs is None else chat_template_kwargs)
        checked = check_messages(messages)
        if not self.renders_tools:
            checked = _as_text(checked, checked_tools)
            checked_tools = None
        variables = {
            **self._tokenizer.named_tokens,
            **extra,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = self._render(checked, checked_tools, variables, self._guard.hide)
        if any(self._guard.touches(text) for message in checked for text in _contents(message)):
            # Guarded borders give the same text, unless the template looks at them: then its own view counts.
            guarded = self._render(checked, checked_tools, variables, self._guard.hide_borders)
            if guarded.text == prompt.text:
                return guarded
        return prompt

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        hide: Callable[[str, list[str]], str],
    ) -> RenderedPrompt:
        hidden: list[str] = []

        def shown(key: str, value: Any) -> Any:
            if key == "role":
                return value
            if isinstance(value, str):
                return hide(value, hidden)
            # What stands inside of JSON has quotes around it, so nothing beside it can complete a token.
            calls = _hide_within(value, hidden, self._guard.hide)
            for function in (call["function"] for call in calls):
                if isinstance(function["arguments"], str):  # these a template may write as they are
                    function["arguments"] = self._guard.hide_borders(function["arguments"], hidden)
            return calls

        variables = variables | {
            "messages": [{key: shown(key, value) for key, value in message.items()} for message in messages],
            "tools": _hide_within(tools, hidden, self._guard.hide),
        }
        try:
            text = self._environment.render_bounded(self._template, variables)
        except TemplateRefusalError as error:
            raise RequestError(f"the chat template refuses the messages: {error}", "messages") from None
        except _TEMPLATE_FAULTS as error:
            # The error's text may quote a message, which belongs to the request only.
            raise RequestError(f"the chat template failed: {str(error)[:500]}", "messages") from error
        return _restore(text, hidden)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render messages and encode the prompt as a whole; BOS is the template's to write. See `render`."""
        prompt = self.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._tokenizer.encode(prompt.text, add_bos=False, plain_spans=prompt.plain_spans)


def _contents(message: Mapping[str, Any]) -> list[str]:
    return [value for key, value in message.items() if key != "role" and isinstance(value, str)]


def _hide_within(value: Any, hidden: list[str], hide: Callable[[str, list[str]], str]) -> Any:
    """Return a copy of a JSON value, of bounded depth, with every string and key in it hidden."""
    if isinstance(value, str):
        return hide(value, hidden)
    if isinstance(value, dict):
        return {hide(key, hidden): _hide_within(item, hidden, hide) for key, item in value.items()}
    if isinstance(value, list):
        return [_hide_within(item, hidden, hide) for item in value]
    return value


class _Guard:
    """Hides control tokens in one text of a message, and characters that could complete one with what stands beside."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pattern = tokenizer.control_pattern
        self._tokens = tuple(tokenizer.control_tokens)
        self._longest = max(map(len, self._tokens), default=0)
        self._starts = {token[:end] for token in self._tokens for end in range(1, len(token))}
        self._ends = {token[start:] for token in self._tokens for start in range(1, len(token))}

    def hide(self, text: str, hidden: list[str]) -> str:
        """Return the text with a placeholder per control token; `hidden` gets what each, by its number, stands for."""
        return self._pattern.sub(lambda match: _placeholder(match[0], hidden), text)

    def hide_borders(self, text: str, hidden: list[str]) -> str:
        """Hide the first and last character, too, where they touch; one character is enough to break a token."""
        text = self.hide(text, hidden)
        starts, ends = self._opens(text), self._closes(text)
        if starts and len(text) > 1:
            text = text[:-1] + _placeholder(text[-1], hidden)
        if ends or (starts and len(text) == 1):
            text = _placeholder(text[0], hidden) + text[1:]
        return text

    def touches(self, text: str) -> bool:
        """Say whether the text could be part of a control token that begins before it or ends after it."""
        return self._opens(text) or self._closes(text)

    def _opens(self, text: str) -> bool:
        return any(text[-size:] in self._starts for size in range(1, min(len(text) + 1, self._longest)))

    def _closes(self, text: str) -> bool:
        if text and len(text) < self._longest and any(text in token for token in self._tokens):
            return True
        return any(text[:size] in self._ends for size in range(1, min(len(text) + 1, self._longest)))


def _placeholder(plain: str, hidden: list[str]) -> str:
    high, low = divmod(len(hidden), 1024)
    if high >= 1024:
        raise RequestError(f"the messages hold more than {1024 * 1024} special tokens", "messages")
    hidden.append(plain)
    return chr(0xD800 + high) + chr(0xDC00 + low)


def _restore(text: str, hidden: Sequence[str]) -> RenderedPrompt:
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    position = length = 0
    for match in _PLACEHOLDER.finditer(text):
        high, low = map(ord, match[0])
        index = (high - 0xD800) * 1024 + low - 0xDC00
        if index >= len(hidden):
            raise RequestError("the chat template cuts a special token of a message in pieces", "messages")
        plain = hidden[index]
        length += match.start() - position
        parts += (text[position : match.start()], plain)
        spans.append((length, length + len(plain)))
        length += len(plain)
        position = match.end()
    parts.append(text[position:])
    restored = "".join(parts)
    try:
        restored.encode()
    except UnicodeEncodeError:
        raise RequestError("the chat template cuts a special token of a message in pieces", "messages") from None
    return RenderedPrompt(restored, tuple(spans))


def _check_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(kwargs, Mapping):
        raise RequestError(f"chat_template_kwargs is {describe(kwargs)}; allowed: an object", "chat_template_kwargs")
    for name, value in kwargs.items():
        if name not in _TEMPLATE_KWARGS:
            allowed = ", ".join(_TEMPLATE_KWARGS)
            raise RequestError(
                f"chat_template_kwargs has {str(name)[:80]!r}; allowed: {allowed}", "chat_template_kwargs"
            )
        if not isinstance(value, _TEMPLATE_KWARGS[name]):
            raise RequestError(f"chat_template_kwargs.{name} is no boolean", "chat_template_kwargs")
    return dict(kwargs)


def _as_text(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return messages for a template that knows no tools: they, calls and results are text, in the way of Hermes."""
    told: list[dict[str, Any]] = []
    for message in messages:
        calls = message.get("tool_calls", ())
        bare = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        texts = [bare["content"]] if bare["content"] else []
        for call in calls:
            function = {name: call["function"][name] for name in ("name", "arguments")}
            texts.append(f"{OPEN}\n{json.dumps(function, ensure_ascii=False)}\n{CLOSE}")
        if bare["role"] == "tool":
            bare["role"], texts = "user", [f"<tool_response>\n{bare['content']}\n</tool_response>"]
        told.append(bare | {"content": "\n".join(texts)})
    if tools is not None:
        preamble = tool_preamble(tools)
        if told[0]["role"] in ("system", "developer"):
            told[0] = told[0] | {"content": f"{told[0]['content']}\n\n{preamble}"}
        else:
            told.insert(0, {"role": "system", "content": preamble})
    return told
