"""This module holds which JSON schemas are honoured, and how JSON is spaced. It does not know grammars.

The grammar's compiler refuses keywords that it knows and does not implement, and says nothing of those it does not
know. Here they are refused, too: a misspelt `requried` would otherwise go unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["json_rule", "unknown_keyword"]

_WHITESPACE = " |\n {0,24}"
"""Between the parts of JSON: nothing, a space, a new line with its indent. Without a bound a weak model stays in it."""

_SCHEMAS = frozenset(("additionalItems", "additionalProperties", "items"))
_LISTS = frozenset(("allOf", "anyOf", "items", "oneOf", "prefixItems"))
_TABLES = frozenset(("$defs", "definitions", "patternProperties", "properties"))
_VALUES = frozenset(
    (
        *("$ref", "const", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "maxItems", "maxLength"),
        *("maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "pattern"),
        *("required", "type"),
    )
)
_NOTES = frozenset(
    (
        *("$anchor", "$comment", "$id", "$schema", "contentEncoding", "contentMediaType", "default", "deprecated"),
        *("description", "discriminator", "example", "examples", "id", "readOnly", "title", "writeOnly"),
    )
)
"""Say something to a reader and nothing of the value."""

_KNOWN = _SCHEMAS | _LISTS | _TABLES | _VALUES | _NOTES


def unknown_keyword(schema: Mapping[str, Any], path: str = "") -> str | None:
    """Return where the schema has a keyword that would be ignored, such as "properties.name.lenght"; None: nowhere.

    Args:
        schema: nested to a bounded depth.
        path: of the schema itself.
    """
    for key in schema:
        # "x-guidance" would configure the compiler; other "x-" keywords are notes by convention.
        if key not in _KNOWN and (not key.startswith("x-") or key == "x-guidance"):
            return path + key
    for where, part in _parts(schema):
        found = unknown_keyword(part, f"{path}{where}.")
        if found is not None:
            return found
    return None


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return what stands for JSON that follows the schema in a rule of a grammar."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}, ensure_ascii=False)


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in schema.items():
        inside: list[tuple[str, Any]] = []
        if key in _SCHEMAS:
            inside.append((key, value))
        if key in _LISTS and isinstance(value, list):
            inside += [(f"{key}[{index}]", part) for index, part in enumerate(value)]
        if key in _TABLES and isinstance(value, dict):
            inside += [(f"{key}.{name}", part) for name, part in value.items()]
        yield from ((where, part) for where, part in inside if isinstance(part, dict))
