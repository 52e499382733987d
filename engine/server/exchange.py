"""This module holds one request as it passes through the server. It does not know what is asked."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Exchange", "Message", "Receive", "Scope", "Send"]

from starlette.types import Message, Receive, Scope, Send


@dataclass(slots=True)
class Exchange:
    """What is known of a request, and counted for its line in the log."""

    request_id: str
    cache_domain: str = ""
    """Whose prefix cache it uses."""
    started_s: float = field(default_factory=time.monotonic)
    status: int = 0
    """Of the response; 0: it has not begun."""
    num_body_bytes: int = 0
    """Of the request."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    ended_by: str = ""
    """Why a response that had begun did not end well."""

    @staticmethod
    def of(scope: Scope) -> Exchange:
        """Return the exchange of an ASGI scope that came through the guard."""
        exchange: Any = scope["octavo.exchange"]
        assert isinstance(exchange, Exchange)
        return exchange
