"""This module holds what a request may ask its output to look like. It does not know grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .strict_json import parse_json

__all__ = ["MAX_OUTPUT_FORMAT_BYTES", "MAX_OUTPUT_FORMAT_DEPTH", "check_output_format"]

MAX_OUTPUT_FORMAT_BYTES = 1 << 16
MAX_OUTPUT_FORMAT_DEPTH = 32
MAX_CHOICES = 1024


def check_output_format(value: Any) -> dict[str, Any]:
    """Return the one format that is asked for, as {its kind: its value}.

    Args:
        value: a mapping with exactly one of json (a schema, or its text), json_object, regex, choice, grammar; others
            may be there as None.

    Raises:
        ValueError: it is anything else, or larger than the limits.
    """
    if not isinstance(value, Mapping) or not value.keys() <= _CHECKS.keys():
        raise ValueError("not a format")
    ((kind, wanted),) = ((kind, wanted) for kind, wanted in value.items() if wanted is not None)
    if kind == "json" and isinstance(wanted, str):
        if len(wanted) > MAX_OUTPUT_FORMAT_BYTES:
            raise ValueError("too large")
        wanted = parse_json(wanted)
    if not _CHECKS[kind](wanted):
        raise ValueError(f"not a {kind}")
    _check_depth(wanted)
    # Refuses NaN, integers without end and lone surrogates as well; the copy is nobody else's to change.
    text = json.dumps(wanted, ensure_ascii=False, allow_nan=False)
    if len(text.encode()) > MAX_OUTPUT_FORMAT_BYTES:
        raise ValueError("too large")
    return {kind: json.loads(text)}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_CHECKS = {
    "json": lambda value: isinstance(value, dict),
    "json_object": lambda value: value is True,
    "regex": _is_text,
    "choice": lambda value: (
        isinstance(value, (list, tuple)) and 1 <= len(value) <= MAX_CHOICES and all(map(_is_text, value))
    ),
    "grammar": _is_text,
}


def _check_depth(value: Any) -> None:
    """Refuse what is nested too deeply, holds anything but JSON, or a key that is no string."""
    level = [value]
    for _ in range(MAX_OUTPUT_FORMAT_DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                if not all(isinstance(key, str) for key in each):
                    raise ValueError("a key is no string")
                inner += each.values()
            elif isinstance(each, (list, tuple)):
                inner += each
        level = [each for each in inner if not (each is None or isinstance(each, (bool, int, float, str)))]
        if not all(isinstance(each, (dict, list, tuple)) for each in level):
            raise ValueError("not JSON")
        if not level:
            return
    raise ValueError("nested too deeply")
