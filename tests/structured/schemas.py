"""This module holds JSON schemas of every kind whose answers are short. It does not know who follows them."""

from __future__ import annotations

from typing import Any

__all__ = ["SCHEMAS"]

_CLOSED = {"additionalProperties": False}
_WORD = {"type": "string", "maxLength": 6}
_SMALL = {"type": "integer", "minimum": -9, "maximum": 99}

SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {"type": "object", "properties": {"a": _SMALL, "b": _WORD}, "required": ["a", "b"], **_CLOSED},
    "optional": {"type": "object", "properties": {"a": _SMALL, "b": {"type": "boolean"}}, **_CLOSED},
    "nested": {
        "type": "object",
        "properties": {"x": {"type": "object", "properties": {"y": {"type": "null"}}, "required": ["y"], **_CLOSED}},
        "required": ["x"],
        **_CLOSED,
    },
    "array": {"type": "array", "items": _SMALL, "minItems": 2, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [_WORD, {"type": "boolean"}], "items": False, "minItems": 2},
    "enum": {"enum": ["é", 1, None, {"a": [True]}, "<eos>"]},
    "const": {"const": {"a": "th\n"}},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-\\d$"},
    "date": {"type": "string", "format": "date"},
    "number": {"type": "number", "minimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.25},
    "anyOf": {"anyOf": [_SMALL, {"type": "object", "properties": {"k": _WORD}, "required": ["k"], **_CLOSED}]},
    "oneOf": {"oneOf": [{"const": "a"}, {"const": "b"}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 50}]},
    "ref": {
        "$defs": {"leaf": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 1}},
        **{"type": "object", "properties": {"t": {"$ref": "#/$defs/leaf"}}, "required": ["t"], **_CLOSED},
    },
    "map": {
        "type": "object",
        "patternProperties": {"^[a-z]$": _SMALL},
        "minProperties": 1,
        "maxProperties": 1,
        **_CLOSED,
    },
    "types": {"type": ["boolean", "null"]},
}
