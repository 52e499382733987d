"""This module holds the life of a server: bound, serving, draining, gone. It does not know what it serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from ..async_llm import AsyncLLM
from ..errors import ConfigError
from .app import create_app
from .connection import connection_class
from .errors import HTTPError
from .settings import ServerSettings

__all__ = ["Server", "bind", "run_server"]

_WATCH_S = 0.25
_LAST_WORDS_S = 2.0
"""For clients to read how their streams ended."""
_SEND_BUFFER_BYTES = 1 << 18
_LOG = logging.getLogger("octavo.server")


def bind(settings: ServerSettings) -> socket.socket:
    """Return a socket that listens; before a model is loaded, so that a taken port costs no time.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. asyncio sets it on sockets that name their protocol, which accepted ones do not;
        # without it a first token waits 40 ms for the client to acknowledge the headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Connections inherit it. By itself the kernel keeps megabytes for a client that does not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"host {settings.host}, port {settings.port} cannot be had: {error.strerror}; "
            "allowed: a free port, or 0 for any"
        ) from None
    listener.setblocking(False)
    return listener


class Server:
    """Serves one engine until it is told to stop or the engine dies.

    Args:
        llm: the engine's front; shut down with the server.
        settings: of the server.
        listener: as `bind` returns it; None: bind.
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings, listener: socket.socket | None = None) -> None:
        self._llm = llm
        self._settings = settings
        self._listener = listener or bind(settings)
        self.app = create_app(llm, settings)
        self._uvicorn = _Uvicorn(self.app, settings)
        self._stopping = asyncio.Event()

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def stop(self) -> None:
        """Begin to drain."""
        self._stopping.set()

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            # Open streams, threads and the engine end with the process: the engine sees its pipe close.
            os._exit(1)
        self.stop()

    async def run(self, on_ready: Callable[[str], None] | None = None) -> int:
        """Serve.

        Args:
            on_ready: called with the address once it answers.

        Returns:
            The exit status: 0 after a stop, 1 after the engine's death.
        """
        admission = self.app.context.admission
        asyncio.get_running_loop().set_exception_handler(_on_loop_error)
        with _signals(self._on_signal):
            serving = asyncio.create_task(self._uvicorn.serve([self._listener]))
            while not self._uvicorn.started and not serving.done():
                await asyncio.sleep(0.01)
            if on_ready is not None and not serving.done():
                on_ready(self.url)
            status = 0
            while not self._stopping.is_set() and not serving.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), _WATCH_S)
                if self._llm.is_dead:
                    status = 1
                    break
            if status:
                self.app.context.metrics.engine_died()
                admission.close(HTTPError(503, self._llm.health.reason, code="engine_dead"))
                await self._until_idle(_LAST_WORDS_S)
            else:
                await self._drain()
            self.app.context.ending.set()
            self._uvicorn.should_exit = True
            await serving
            await self._llm.shutdown(0.0)
        return status

    async def _drain(self) -> None:
        admission, grace_s = self.app.context.admission, self._settings.shutdown_timeout_s
        admission.close(HTTPError(503, "the server is shutting down", code="shutting_down"))
        _LOG.info("stopping: %d requests have %g s to finish", admission.num_active, grace_s)
        await self._until_idle(grace_s)
        if admission.num_active:
            _LOG.info("stopping: %d requests are ended", admission.num_active)
            admission.end_all(HTTPError(503, "the server has shut down before the end", code="shutting_down"))
            await self._until_idle(_LAST_WORDS_S)

    async def _until_idle(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while self.app.context.admission.num_active and loop.time() < end_s:
            await asyncio.sleep(0.02)


async def run_server(
    llm: AsyncLLM,
    settings: ServerSettings,
    *,
    listener: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Serve an engine until SIGTERM or SIGINT, or its death; see `Server`."""
    return await Server(llm, settings, listener).run(on_ready)


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what goes wrong outside of requests; a lack of files in few words, as asyncio says it thousands of times."""
    error = context.get("exception")
    if isinstance(error, OSError) and "socket" in context and "accept" in context["message"]:
        _LOG.debug("no connection can be taken: %s", error.strerror)
    else:
        loop.default_exception_handler(context)


class _Uvicorn(uvicorn.Server):
    """uvicorn, which leaves signals to us: it would stop to listen before the last request is answered."""

    def __init__(self, app: object, settings: ServerSettings) -> None:
        limits = settings.limits
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                http=connection_class(limits),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=limits.header_bytes,
                timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=_LAST_WORDS_S,  # type: ignore[arg-type]
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _signals(handler: Callable[[], None]) -> Iterator[None]:
    """Call a handler for the signals that ask to stop, where this is the thread that may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
