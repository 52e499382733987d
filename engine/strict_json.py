"""This module holds the reading of JSON that means one thing only. It does not know what is in it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["MAX_DEPTH", "parse_json"]

MAX_DEPTH = 64
"""Arrays and objects inside one another; whoever walks a parsed value may recurse."""

_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""One that does not end goes to the end of the text: so no text is looked at twice."""


def parse_json(text: str, *, max_parts: int | None = None) -> Any:
    """Parse JSON without NaN, Infinity, doubled keys, endless integers or bottomless nesting.

    Args:
        text: the JSON.
        max_parts: strings, keys among them, arrays and objects that are taken; None: any number. A few bytes of text
            make each of them, and hundreds of bytes and as many times the work come of it, all in one piece.

    Raises:
        ValueError: it is not such JSON; says why in a few words.
    """
    num_containers = text.count("[") + text.count("{")
    if max_parts is not None and _has_more(text, num_containers, max_parts):
        raise ValueError(f"it has more than {max_parts} strings, arrays and objects")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        # Python's own words about an integer of more digits than it converts name a function of its own.
        raise ValueError("an integer has too many digits" if "limit" in str(error) else str(error)) from None
    # Walking a value costs as much as parsing it, and hardly any text opens so many.
    if num_containers > MAX_DEPTH:
        _check_depth(value)
    return value


def _has_more(text: str, num_brackets: int, max_parts: int) -> bool:
    # Every string begins with a quote that no backslash is before: where these are few, nothing has to be taken apart.
    if num_brackets + text.count('"') - text.count('\\"') <= max_parts:
        return False
    rest, num_strings = _STRING.subn("", text, count=max_parts + 1)
    return num_strings + rest.count("[") + rest.count("{") > max_parts


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        children: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                children += each.values()
            elif isinstance(each, list):
                children += each
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    raise ValueError("nested too deeply")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name[:40]!a} is given twice")
            seen.add(name)
    return values
