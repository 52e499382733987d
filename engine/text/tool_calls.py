"""This module holds the search for tool calls in streamed text. It does not know tokens, prompts or HTTP.

Three spellings are read: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen 2.5 and 3), the same
tags around `<function=name><parameter=key>value</parameter></function>` (Qwen3-Coder), and a bare
`{"name": ..., "parameters": {...}}` at the start of the answer (Llama 3). A call is one once its name is that of a tool
and its arguments have begun: from there on its text is passed on as it comes. Everything else is text.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..strict_json import parse_json

__all__ = ["CallDelta", "TextDelta", "ToolFormat", "ToolStream"]

ToolFormat = Literal["hermes", "llama", "qwen"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([\w-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_MAX_XML_HEAD = len(_FUNCTION) + 65
_XML_HEAD = re.compile(r"<function=([\w-]{1,64})>")
_XML_PARAMETER = re.compile(r"<parameter=([^>\n]{1,256})>\n?")
_XML_PARAMETER_END = "</parameter>"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call: first its name, then its arguments."""

    index: int
    """Which call of the answer, from 0."""
    call_id: str
    name: str | None
    """With the first piece only."""
    arguments: str
    """A piece of JSON text."""


class _ObjectEnd:
    """Looks for the end of a JSON object in text that grows."""

    __slots__ = ("_depth", "_escaped", "_in_string", "_position")

    def __init__(self) -> None:
        self._position = self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """Return the index after the object's last brace, or None; `text` is what was given before, and more."""
        for position in range(self._position, len(text)):
            char = text[position]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                else:
                    self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return position + 1
        self._position = len(text)
        return None


class ToolStream:
    """Tells text from calls in one answer.

    Args:
        tools: name -> the schema of its arguments.
        tool_format: how the model spells a call.
        parallel: several calls are wanted; else what follows the first is text.
        make_id: names a call.
    """

    def __init__(
        self,
        tools: Mapping[str, Mapping[str, Any]],
        tool_format: ToolFormat,
        *,
        parallel: bool = True,
        make_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}",
    ) -> None:
        self._tools = tools
        self._tagged = tool_format != "llama"
        self._parallel = parallel
        self._make_id = make_id
        self._state: Callable[[bool], bool] = self._in_text if self._tagged else self._before_bare_call
        self._buffer = ""
        self._opening = ""
        """What led to the call that is being read, to be given back if it is none."""
        self._end = _ObjectEnd()
        self._searched = 0
        """Characters of the buffer in which what ends a call's head, or the call, is not."""
        self._is_blank = False
        """The buffer is white space: more of it decides nothing."""
        self._space: str | None = ""
        """White space at the start or after a call, kept until text follows; None: text has followed."""
        self._call_id = ""
        self._sent = 0
        """Characters of the buffer that have left as arguments."""
        self._deltas: list[TextDelta | CallDelta] = []
        self.num_calls = 0

    def feed(self, text: str) -> list[TextDelta | CallDelta]:
        """Take the next piece of the answer and return what is certain by now."""
        return self._run(text, is_last=False)

    def finish(self) -> list[TextDelta | CallDelta]:
        """Return what was held back; nothing may follow."""
        deltas = self._run("", is_last=True)
        if self._space and not self.num_calls:
            deltas.append(TextDelta(self._space))
        return deltas

    def _run(self, text: str, *, is_last: bool) -> list[TextDelta | CallDelta]:
        self._buffer += text
        self._deltas = []
        if not (self._is_blank and text.isspace()):
            while self._state(is_last):
                pass
            self._is_blank = self._buffer.isspace()
        return self._deltas

    def _in_text(self, is_last: bool) -> bool:
        """Show text up to the next opening tag; return, as all states do, whether there is more to do."""
        before, tag, after = self._buffer.partition(OPEN)
        if tag and self._takes_calls:
            self._show(before)
            self._begin_call(tag, after)
            return True
        num_held = 0 if is_last or not self._takes_calls else _overlap(self._buffer, OPEN)
        cut = len(self._buffer) - num_held
        self._show(self._buffer[:cut])
        self._buffer = self._buffer[cut:]
        return False

    def _before_bare_call(self, is_last: bool) -> bool:
        """Decide whether a bare call begins here: at the start of the answer, or after another."""
        text = self._buffer.lstrip(" \t\r\n;" if self.num_calls else None)
        if not is_last and (text == "" or (_PYTHON_TAG.startswith(text))):
            return False
        text = text.removeprefix(_PYTHON_TAG).lstrip()
        if text == "" and not is_last:
            return False
        if text.startswith("{") and self._takes_calls:
            self._begin_call(self._buffer[: len(self._buffer) - len(text)], text)
        else:
            self._state = self._in_plain_text
        return True

    def _in_plain_text(self, is_last: bool) -> bool:
        self._show(self._buffer)
        self._buffer = ""
        return False

    def _in_head(self, is_last: bool) -> bool:
        """Wait for the name and the beginning of the arguments."""
        body = self._buffer.lstrip()
        self._opening += self._buffer[: len(self._buffer) - len(body)]
        self._buffer = body
        if body.startswith("{"):
            return self._in_object(body, is_last)
        if self._tagged and _FUNCTION.startswith(body[: len(_FUNCTION)]):
            return self._in_function(body, is_last)
        return self._give_back()

    def _in_object(self, body: str, is_last: bool) -> bool:
        """Wait for the second brace, which is that of the arguments if it follows their name, or else for the end."""
        if self._searched < len(body):
            brace = body.find("{", max(self._searched, 1))
            self._searched = len(body) if brace < 0 else sys.maxsize
            if brace > 0 and (match := _HEAD.match(body)):
                if match[1] not in self._tools:
                    return self._give_back()
                self._start(match[1])
                self._buffer, self._end, self._sent = body[match.end() :], _ObjectEnd(), 0
                self._state = self._in_arguments
                return True
        stop = self._end.find(body)
        if stop is not None:
            return self._take_whole(body[:stop], body[stop:])
        return self._give_back() if is_last else False

    def _in_function(self, body: str, is_last: bool) -> bool:
        """Wait for the end of a call in tags."""
        match = _XML_HEAD.match(body)
        if (match is None and len(body) > _MAX_XML_HEAD) or (match and match[1] not in self._tools):
            return self._give_back()
        if match:
            end = body.find(_FUNCTION_END, max(match.end(), self._searched))
            if end >= 0:
                self._start(match[1])
                self._pass_on(_xml_arguments(body[match.end() : end], self._tools[match[1]]))
                self._leave(body[end + len(_FUNCTION_END) :])
                return True
            self._searched = len(body) - len(_FUNCTION_END)
        return self._give_back() if is_last else False

    def _in_arguments(self, is_last: bool) -> bool:
        stop = self._end.find(self._buffer)
        self._pass_on(self._buffer[self._sent : stop])
        self._sent = len(self._buffer)
        if stop is None:
            return False
        self._buffer = self._buffer[stop:]
        self._state = self._after_arguments
        return True

    def _after_arguments(self, is_last: bool) -> bool:
        """Expect the brace that closes the call."""
        rest = self._buffer.lstrip()
        if rest == "" and not is_last:
            return False
        self._leave(rest.removeprefix("}"))
        return True

    def _after_call(self, is_last: bool) -> bool:
        """Expect the closing tag; a call without one is a call all the same."""
        rest = self._buffer.lstrip()
        if CLOSE.startswith(rest[: len(CLOSE)]):
            if len(rest) < len(CLOSE) and not is_last:
                return False
            self._buffer = rest[len(CLOSE) :]
        self._state = self._in_text
        return True

    @property
    def _takes_calls(self) -> bool:
        return self._parallel or self.num_calls == 0

    def _begin_call(self, opening: str, body: str) -> None:
        self._opening, self._buffer, self._end, self._searched = opening, body, _ObjectEnd(), 0
        self._state = self._in_head

    def _leave(self, rest: str) -> None:
        self._buffer = rest
        self._state = self._after_call if self._tagged else self._before_bare_call

    def _take_whole(self, body: str, rest: str) -> bool:
        """Read a complete object whose keys come in another order, or without arguments."""
        call = _parsed(body)
        if not isinstance(call, dict):
            return self._give_back()
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        if not isinstance(name, str) or name not in self._tools or not isinstance(arguments, dict):
            return self._give_back()
        self._start(name)
        self._pass_on(json.dumps(arguments, ensure_ascii=False))
        self._leave(rest)
        return True

    def _give_back(self) -> bool:
        """Go on behind the opening: what looked like a call is text."""
        self._show(self._opening)
        self._state = self._in_text if self._tagged else self._in_plain_text
        return True

    def _start(self, name: str) -> None:
        self._space = ""
        self._call_id = self._make_id()
        self._deltas.append(CallDelta(self.num_calls, self._call_id, name, ""))
        self.num_calls += 1

    def _pass_on(self, arguments: str) -> None:
        if arguments:
            self._deltas.append(CallDelta(self.num_calls - 1, self._call_id, None, arguments))

    def _show(self, text: str) -> None:
        if self._space is not None:
            if not text.strip():
                self._space += text
                return
            text, self._space = self._space + text, None
        if text:
            self._deltas.append(TextDelta(text))


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of the text begin the tag."""
    return next(
        size for size in range(min(len(text), len(tag) - 1), -1, -1) if tag.startswith(text[len(text) - size :])
    )


def _parsed(text: str) -> Any:
    """Return what the text says in JSON; None where it says nothing."""
    try:
        return parse_json(text)
    except ValueError:
        return None


def _xml_parameters(body: str) -> Iterator[tuple[str, str]]:
    """Yield names and texts up to the first that does not end."""
    position = 0
    while match := _XML_PARAMETER.search(body, position):
        end = body.find(_XML_PARAMETER_END, match.end())
        if end < 0:
            return
        yield match[1], body[match.end() : end].removesuffix("\n")
        position = end + len(_XML_PARAMETER_END)


def _xml_arguments(body: str, schema: Mapping[str, Any]) -> str:
    """Return arguments as JSON: what the schema calls a string is taken as it is, anything else is read as JSON."""
    properties = schema.get("properties")
    arguments: dict[str, Any] = {}
    for name, text in _xml_parameters(body):
        wanted = properties.get(name) if isinstance(properties, Mapping) else None
        is_text = isinstance(wanted, Mapping) and wanted.get("type") == "string"
        value = None if is_text else _parsed(text)
        arguments[name] = text if value is None and text.strip() != "null" else value
    return json.dumps(arguments, ensure_ascii=False)
