"""This module holds an engine on a thread of this process: for tests, notebooks and small tools. It does not know what
is asked of it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

from ..config import EngineConfig
from ..errors import EngineDeadError
from ..text import Tokenizer
from .link import EngineLink, find_factory
from .loop import EngineLoop, EventLog, Inbox
from .messages import (
    FromEngine,
    Heartbeat,
    PhaseBegan,
    Ready,
    Shutdown,
    StartFailed,
    ToEngine,
    WeightsRead,
    engine_info,
)

__all__ = ["ThreadLink"]

MAX_UNREAD = 64
"""Messages that wait for the event loop; the engine's thread waits with more."""
MAX_EXIT_S = 60.0
"""How long the interpreter waits for a step when it exits: it would kill the thread, and in torch that is an abort."""


class _Outbox:
    """Hands messages to an event loop, waking it once for all that have come together."""

    def __init__(self, receive: Callable[[list[FromEngine]], None]) -> None:
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._unread: list[FromEngine] = []
        self._changed = threading.Condition()
        self._closed = False

    def send(self, message: FromEngine) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._unread) < MAX_UNREAD or self._closed)
            self._put(message)

    def beat(self, heartbeat: Heartbeat) -> None:
        with self._changed:
            if not self._unread:
                self._put(heartbeat)

    def close(self) -> None:
        """Let messages be lost from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _put(self, message: FromEngine) -> None:
        if self._closed:
            return
        self._unread.append(message)
        if len(self._unread) == 1:
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the event loop was closed, and nobody will ever listen again
                self._closed = True

    def _deliver(self) -> None:
        with self._changed:
            unread, self._unread = self._unread, []
            self._changed.notify_all()
        self._receive(unread)


class ThreadLink(EngineLink):
    """A line to an engine on a thread. What ends a process, ends this one."""

    async def _launch(self, config: EngineConfig, factory: str) -> None:
        self._inbox: Inbox = SimpleQueue()
        self._outbox = _Outbox(self._receive)
        self._engine_tokenizer: Tokenizer | None = None
        self._ended = asyncio.Event()
        arguments = (config, factory, asyncio.get_running_loop())
        self._thread = threading.Thread(target=self._run, args=arguments, name="octavo-engine", daemon=True)
        atexit.register(self._end_at_exit)
        self._thread.start()

    def _run(self, config: EngineConfig, factory: str, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._run_engine(config, factory)
        finally:
            # The engine is freed, which takes its time: of nobody's but this thread.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._ended.set)

    def _run_engine(self, config: EngineConfig, factory: str) -> None:
        outbox, log = self._outbox, EventLog()
        try:
            engine = find_factory(factory)(
                config,
                on_phase=lambda name: outbox.send(PhaseBegan(name)),
                on_weights=lambda done, total: outbox.send(WeightsRead(done, total)),
                recorder=log,
            )
            self._engine_tokenizer = engine.tokenizer
            outbox.send(Ready(engine_info(engine, os.getpid()), None))
            EngineLoop(engine, log, self._inbox, outbox).run()
        except EngineDeadError:
            pass  # the loop has told the front
        except Exception as error:
            outbox.send(StartFailed.of(error))

    async def _tokenizer(self, ready: Ready) -> Tokenizer | None:
        return self._engine_tokenizer

    def send(self, message: ToEngine) -> None:
        """Send a message."""
        self._inbox.put(message)

    async def close(self, timeout_s: float) -> None:
        """End the engine; a step cannot be ended by force, and keeps its thread until it is over."""
        self._closed = True
        self._tell_to_end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout_s)
            self._thread.join()
            atexit.unregister(self._end_at_exit)

    def _tell_to_end(self) -> None:
        self._inbox.put(Shutdown())
        self._outbox.close()

    def _end_at_exit(self) -> None:
        self._tell_to_end()
        self._thread.join(MAX_EXIT_S)
