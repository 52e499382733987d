"""This module holds the list of all routes: what they take and what they are for. It does not serve them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .fields import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, Field

__all__ = ["ROUTES", "RouteSpec"]


class RouteSpec(NamedTuple):
    """One route."""

    method: str
    path: str
    summary: str
    fields: Mapping[str, Field] | None = None
    """Of the body, where it takes one."""
    produces: str = "application/json"
    needs_key: bool = True


ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec("GET", "/v1/models", "The model that is served."),
    RouteSpec("GET", "/v1/models/{model}", "The same, by name."),
    RouteSpec("POST", "/v1/completions", "Continue texts.", COMPLETIONS),
    RouteSpec("POST", "/v1/chat/completions", "Answer a conversation.", CHAT),
    RouteSpec("POST", "/tokenize", "Token ids of a text or a conversation.", TOKENIZE),
    RouteSpec("POST", "/detokenize", "The text of token ids.", DETOKENIZE),
    RouteSpec("GET", "/v1/requests", "Recent requests, the newest first."),
    RouteSpec("GET", "/v1/requests/{request_id}", "Where the time of one request went."),
    RouteSpec("GET", "/live", "What the engine does, five times a second.", produces="text/event-stream"),
    RouteSpec("GET", "/recording", "The latest steps and requests, for the page to open later."),
    RouteSpec("GET", "/trace", "The same as a Chrome trace, for Perfetto."),
    RouteSpec("GET", "/metrics", "Metrics for Prometheus.", produces="text/plain"),
    RouteSpec("GET", "/health", "Whether requests make progress: 200, or 503 with the reason."),
    RouteSpec("GET", "/livez", "Whether the server answers at all.", needs_key=False),
    RouteSpec("GET", "/openapi.json", "This list for programs.", needs_key=False),
    RouteSpec("GET", "/docs", "This list for people.", produces="text/html", needs_key=False),
)
"""All but the files of the page, which need no key."""
