"""This module holds what a message of a conversation may be. It does not know templates or tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError, describe
from ..strict_json import parse_json

__all__ = ["check_messages"]

_MAX_MESSAGES = 1024
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_KEYS = frozenset(("role", "content", "name", "reasoning_content", "tool_call_id", "tool_calls"))
_SAYS_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "refusal": (None,),
    "audio": (None,),
    "function_call": (None,),
    "annotations": (None, []),
}
"""What answers carry besides, as OpenAI's do: clients send it back, and it is let through while it says nothing."""
_READ_BY_CLIENT = frozenset(("parsed", "parsed_arguments"))
"""OpenAI's client notes beside content and arguments what it read in them, and sends that along: they count."""
_MAX_CALLS = 128


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return plain copies of a conversation's messages, so that a template sees strings and JSON only.

    Raises:
        RequestError: one is not allowed; `param` is its place, such as messages[0].role.
    """
    if not isinstance(messages, list | tuple):
        raise RequestError("messages is not a list", "messages")
    if not 1 <= len(messages) <= _MAX_MESSAGES:
        raise RequestError(f"messages has {len(messages)} entries; allowed: 1 to {_MAX_MESSAGES}", "messages")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is not an object", where)
    for key, value in message.items():
        if key in _SAYS_NOTHING:
            if value not in _SAYS_NOTHING[key]:
                raise RequestError(f"{where}.{key} is {describe(value)}; allowed: null", f"{where}.{key}")
        elif key not in _MESSAGE_KEYS | _READ_BY_CLIENT:
            raise RequestError(f"{where} has {str(key)[:80]!r}; allowed: {', '.join(sorted(_MESSAGE_KEYS))}", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"{where}.role is {str(role)[:80]!r}; allowed: {', '.join(_ROLES)}", f"{where}.role")
    calls = message.get("tool_calls")
    if calls is not None and role != "assistant":
        raise RequestError(
            f"{where}.tool_calls is given for a {role}; allowed: for an assistant", f"{where}.tool_calls"
        )
    calls = None if calls == [] else calls
    content = message.get("content")
    checked: dict[str, Any] = {"role": role}
    # An assistant that calls need not say anything.
    checked["content"] = "" if content is None and calls is not None else _check_content(content, f"{where}.content")
    for key in ("name", "reasoning_content", "tool_call_id"):
        if message.get(key) is not None:
            checked[key] = _check_string(message[key], f"{where}.{key}")
    if calls is not None:
        checked["tool_calls"] = _check_calls(calls, f"{where}.tool_calls")
    return checked


def _check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls of an assistant with their arguments as objects: templates write them out as JSON.

    Arguments that are none, such as those of an answer cut short, stay the text that they are.
    """
    if not isinstance(calls, list | tuple) or len(calls) > _MAX_CALLS:
        raise RequestError(f"{where} is not a list of at most {_MAX_CALLS} calls", where)
    checked: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        place = f"{where}[{index}]"
        if not isinstance(call, Mapping) or not call.keys() <= {"id", "type", "function", "index"}:
            raise RequestError(f'{place} is not {{"id": ..., "type": "function", "function": ...}}', place)
        function = call.get("function")
        if call.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise RequestError(f"{place} is no call of a function", place)
        if not function.keys() <= {"name", "arguments"} | _READ_BY_CLIENT:
            raise RequestError(f"{place}.function has more than name and arguments", f"{place}.function")
        name = _check_string(function.get("name"), f"{place}.function.name")
        arguments = _check_arguments(function.get("arguments"), f"{place}.function.arguments")
        checked.append({"type": "function", "function": {"name": name, "arguments": arguments}})
        if call.get("id") is not None:
            checked[-1]["id"] = _check_string(call["id"], f"{place}.id")
    return checked


def _check_arguments(arguments: Any, where: str) -> dict[str, Any] | str:
    try:
        value = parse_json(arguments) if isinstance(arguments, str) else arguments
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        value = parse_json(text)
    except (ValueError, TypeError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    return _check_string(arguments, where)


def _check_content(content: Any, where: str) -> str:
    if not isinstance(content, list | tuple):
        return _check_string(content, where)
    texts: list[str] = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or part.keys() != {"type", "text"}:
            raise RequestError(f'{where}[{index}] is not {{"type": "text", "text": ...}}', where)
        texts.append(_check_string(part["text"], f"{where}[{index}].text"))
    return "\n".join(texts)


def _check_string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} is not a string", where)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} holds a lone surrogate at character {error.start}", where) from None
    return value
