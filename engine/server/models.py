"""This module holds /v1/models and the two answers to "are you well?". It does not know requests."""

from __future__ import annotations

from typing import Any

from .body import send_json, send_response
from .context import Context, check_model
from .exchange import Receive, Scope, Send

__all__ = ["Health", "Liveness", "Model", "Models"]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _model(context: Context, name: str) -> dict[str, Any]:
    """Describe the model; what the checkpoint says of sampling is in force where a request says nothing."""
    info = context.llm.info
    is_used = info.config.generation_config == "auto"
    defaults = {each: getattr(info.generation_config, each) for each in _SAMPLING if is_used}
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "octavo",
        "max_model_len": info.max_model_len,
        "max_num_seqs": info.max_num_seqs,
        "block_size": info.block_size,
        "default_sampling_params": {each: value for each, value in defaults.items() if value is not None},
    }


class Models:
    """The route that lists what is served: one model, by all its names."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        data = [_model(self._context, name) for name in self._context.model_names]
        await send_json(send, {"object": "list", "data": data})


class Model:
    """The route of one name."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        name = scope["path_params"]["model"]
        check_model(self._context, name)
        await send_json(send, _model(self._context, name))


class Health:
    """The route for load balancers: whether requests make progress, not whether a socket answers."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        health, closed = self._context.llm.health, self._context.admission.closed
        reason = health.reason or ("" if closed is None else str(closed))
        value = {
            "status": "unhealthy" if reason else "ok",
            "reason": reason,
            "heartbeat_age_s": health.heartbeat_age_s,
            "last_step_age_s": health.last_step_age_s,
            "num_unfinished": health.num_unfinished,
            "num_waiting": self._context.admission.num_waiting,
        }
        await send_json(send, value, 503 if reason else 200)


class Liveness:
    """The route that answers as long as there is a server."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await send_response(send, 200, b"ok\n", "text/plain; charset=utf-8")
