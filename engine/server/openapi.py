"""This module holds the description of the routes for programs and for people. It does not know what the routes do.

It is made from the tables that check requests, so it says what they do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .fields import CHAT, COMPLETIONS, Field
from .routes import ROUTES, RouteSpec
from .settings import Limits

__all__ = ["DOCS_CSS", "docs_page", "field_table", "limit_table", "openapi_document"]

_ERRORS = {
    400: "The request is not valid; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "Without an API key, only this machine's own programs may ask.",
    404: "There is no such thing.",
    408: "The request came too slowly.",
    409: "A request of the same X-Request-Id is being answered.",
    413: "The body is too large.",
    415: "The body is not declared as JSON, or compressed.",
    429: "The queue is full; `Retry-After` says when to come back.",
    431: "The headers are too large.",
    503: "The server is closing, the engine has died, or the request waited too long.",
    504: "The request took too long.",
}
_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
DOCS_CSS = """:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; } code { font-size: 0.9em; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: 0.3rem 1rem 0.3rem 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
"""


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "octavo", "version": _version(), "summary": "An OpenAI-compatible inference server."},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(route: RouteSpec) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {
        "200": {"description": "The answer.", "content": {route.produces: {}}},
        **{str(status): {"description": words, "content": error} for status, words in _ERRORS.items()},
    }
    operation: dict[str, Any] = {"summary": route.summary, "responses": responses}
    if "{" in route.path:
        name = route.path.partition("{")[2].rstrip("}")
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.fields is not None:
        if "stream" in route.fields:
            responses["200"]["content"]["text/event-stream"] = {}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _body(route.fields)}}}
    return operation


def _body(table: Mapping[str, Field]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {field.name: dict(field.schema) | {"description": field.effect} for field in table.values()},
        "required": [field.name for field in table.values() if field.required],
        "additionalProperties": False,
    }


def _version() -> str:
    try:
        return version("octavo")
    except PackageNotFoundError:
        return "0"


def field_table() -> str:
    """Return the README's table of all fields of both routes that generate."""
    lines = ["| field | chat | completions | what happens |", "|---|---|---|---|"]
    for name in sorted(CHAT.keys() | COMPLETIONS.keys()):
        effects = [table[name].effect for table in (CHAT, COMPLETIONS) if name in table]
        marks = ["yes" if name in table else "" for table in (CHAT, COMPLETIONS)]
        what = effects[0] if len(set(effects)) == 1 else f"chat: {effects[0]}; completions: {effects[1]}"
        lines.append(f"| `{name}` | {' | '.join(marks)} | {what} |")
    return "\n".join(lines) + "\n"


def _marked(text: str) -> str:
    """Return a text for HTML, with what stands between backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def docs_page() -> str:
    """Return the routes and their fields as a page that loads nothing but its own style."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>octavo: routes</title>',
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/docs.css"></head><body>',
        "<h1>octavo</h1><p>An OpenAI-compatible server. <code>/openapi.json</code> has the same for programs.</p>",
    ]
    for route in ROUTES:
        parts.append(f"<h2><code>{route.method} {escape(route.path)}</code></h2><p>{escape(route.summary)}</p>")
        if route.fields is not None:
            rows = "".join(
                f"<tr><td><code>{escape(field.name)}</code></td><td>{_marked(field.effect)}</td></tr>"
                for field in route.fields.values()
            )
            parts.append(f"<table><tr><th>field</th><th>what happens</th></tr>{rows}</table>")
    return "".join(parts) + "</body></html>"


def limit_table() -> str:
    """Return the README's table of all limits."""
    lines = ["| limit | default | what |", "|---|---|---|"]
    lines += [f"| `{each.name}` | {each.default:,} | {each.metadata['words']} |" for each in fields(Limits)]
    return "\n".join(lines) + "\n"
