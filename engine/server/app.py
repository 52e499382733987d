"""This module holds the application: every route behind one guard. It does not know sockets or signals."""

from __future__ import annotations

import time

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import ASGIApp

from ..async_llm import AsyncLLM
from ..observe.metrics import Metrics
from .access import Access
from .admission import Admission
from .body import send_json
from .chat import Chat
from .completions import Completions
from .context import Context, model_names
from .exchange import Receive, Scope, Send
from .guard import Guard
from .models import Health, Liveness, Model, Models
from .observing import Explanation, Live, MetricsText, Recording, Requests, Trace
from .openapi import openapi_document
from .routes import ROUTES
from .settings import ServerSettings
from .static import StaticFiles
from .tokens import Detokenize, Tokenize

__all__ = ["App", "create_app"]


class App(FastAPI):
    """The ASGI application and what its server has to know of it."""

    context: Context


def create_app(llm: AsyncLLM, settings: ServerSettings | None = None) -> App:
    """Build the application around a running engine.

    Args:
        llm: the engine's front; must belong to the event loop that serves.
        settings: None: the defaults.
    """
    settings = settings or ServerSettings()
    names = model_names(settings, llm.info.model)
    context = Context(
        llm=llm,
        settings=settings,
        admission=Admission(settings.limits),
        model_names=names,
        ring=llm.ring,
        metrics=Metrics(
            model_name=names[0],
            num_blocks=llm.info.num_blocks,
            max_model_len=llm.info.max_model_len,
            prefix=settings.metrics_prefix,
            clock=time.monotonic,
        ),
        system_fingerprint=f"octavo-{llm.info.fingerprint[:12]}",
    )
    for recorder in (context.admission, context.metrics):
        llm.subscribe(recorder)
    app = App(openapi_url=None, docs_url=None, redoc_url=None)
    app.context = context
    static = StaticFiles()
    router = app.router
    router.redirect_slashes = False
    endpoints = _endpoints(context) | {"/docs": static}
    handlers: dict[int, str] = {id(static): "/{file}"}
    for spec in ROUTES:
        path = spec.path.replace("{model}", "{model:path}")
        router.routes.append(Route(path, endpoints[spec.path], methods=[spec.method]))
        handlers.setdefault(id(endpoints[spec.path]), spec.path)
    for path in static.paths:
        if path not in endpoints:
            router.routes.append(Route(path, static, methods=["GET"]))
    open_paths = {*static.paths, *(spec.path for spec in ROUTES if not spec.needs_key)}
    # The guard stands in the place of FastAPI's own stack, whose error handling answers in another form.
    app.middleware_stack = Guard(
        router,
        limits=settings.limits,
        access=Access(settings),
        is_open=open_paths.__contains__,
        handler_of=lambda scope: handlers.get(id(scope.get("endpoint")), "other"),
        metrics=context.metrics,
    )
    return app


def _endpoints(context: Context) -> dict[str, ASGIApp]:
    return {
        "/v1/models": Models(context),
        "/v1/models/{model}": Model(context),
        "/v1/completions": Completions(context),
        "/v1/chat/completions": Chat(context),
        "/tokenize": Tokenize(context),
        "/detokenize": Detokenize(context),
        "/v1/requests": Requests(context),
        "/v1/requests/{request_id}": Explanation(context),
        "/live": Live(context),
        "/recording": Recording(context),
        "/trace": Trace(context),
        "/metrics": MetricsText(context),
        "/health": Health(context),
        "/livez": Liveness(),
        "/openapi.json": _OpenAPI(),
    }


class _OpenAPI:
    """The route that describes all others."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        await send_json(send, openapi_document())
