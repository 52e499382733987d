"""This module holds the front's end of the line to an engine: what both kinds of line share. It does not know what is
asked of the engine.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import cast

from ..config import EngineConfig
from ..errors import EngineDeadError
from ..startup import Engine
from ..text import Tokenizer
from .messages import (
    Died,
    EngineInfo,
    FromEngine,
    Heartbeat,
    LogLine,
    News,
    PhaseBegan,
    Ready,
    Reply,
    StartFailed,
    ToEngine,
    WeightsRead,
)

__all__ = ["START_ENGINE", "EngineFactory", "EngineLink", "find_factory"]

_log = logging.getLogger("octavo")

START_ENGINE = "octavo.engine.startup:start_engine"

EngineFactory = Callable[..., Engine]
"""Called as `start_engine` is."""


def find_factory(path: str) -> EngineFactory:
    """Return the function "module:function"; anything but `START_ENGINE` is for tests and benchmarks."""
    module, _, name = path.partition(":")
    return cast(EngineFactory, getattr(importlib.import_module(module), name))


class EngineLink(ABC):
    """A line to one engine. All methods run on the event loop that started it, and so do the callbacks.

    Args:
        on_message: gets every message of the running engine, in order.
        on_pause: called after messages that came together, once the engine runs.
        on_lost: called once, with the reason, when the engine is gone although nobody closed the line.
        on_phase, on_weights: see `start_engine`.
    """

    def __init__(
        self,
        on_message: Callable[[FromEngine], None],
        on_pause: Callable[[], None],
        on_lost: Callable[[str], None],
        on_phase: Callable[[str], None] | None,
        on_weights: Callable[[int, int], None] | None,
    ) -> None:
        self._on_message = on_message
        self._on_pause = on_pause
        self._on_lost = on_lost
        self._on_phase = on_phase
        self._on_weights = on_weights
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._closed = False
        self._is_started = False
        self._early_loss: str | None = None
        """Why the engine was lost after it was ready and before `start` returned."""

    async def start(self, config: EngineConfig, factory: str) -> tuple[EngineInfo, Tokenizer | None]:
        """Start the engine and wait until it takes requests; leaves nothing behind where that fails.

        Raises:
            ConfigError, CheckpointError, CapacityError: it cannot be started.
            EngineDeadError: it died while it started.
        """
        try:
            await self._launch(config, factory)
            ready = await self._ready
            tokenizer = await self._tokenizer(ready)
            if self._early_loss is not None:
                raise _died_early(self._early_loss)
            self._is_started = True
            return ready.info, tokenizer
        except BaseException:
            await self.close(0.0)
            raise

    @abstractmethod
    async def _launch(self, config: EngineConfig, factory: str) -> None:
        """Bring the engine on its way."""

    @abstractmethod
    async def _tokenizer(self, ready: Ready) -> Tokenizer | None:
        """Return a tokenizer for the front."""

    @abstractmethod
    def send(self, message: ToEngine) -> None:
        """Send a message; to an engine that is gone it is lost."""

    @abstractmethod
    async def close(self, timeout_s: float) -> None:
        """End the engine, by force where it has not ended by itself in time; a second call does nothing."""

    def _receive(self, messages: Iterable[FromEngine]) -> None:
        """Act on messages; a fault in doing so ends the start or the line, since what a message said is lost."""
        try:
            for message in messages:
                self._act(message)
            if self._is_started:
                self._on_pause()
        except Exception as error:
            self._broken(error)

    def _broken(self, error: Exception) -> None:
        if self._ready.done():
            _log.error("a message of the engine cannot be taken", exc_info=error)
            self._lost(f"its front has failed: {error!r}")
        else:
            self._ready.set_exception(error)

    def _act(self, message: FromEngine) -> None:
        match message:
            case News() | Heartbeat() | Reply():
                self._on_message(message)
            case LogLine():
                logging.getLogger(message.logger).log(message.level, "%s", message.text)
            case PhaseBegan():
                if self._on_phase is not None:
                    self._on_phase(message.name)
            case WeightsRead():
                if self._on_weights is not None:
                    self._on_weights(message.num_bytes, message.total_bytes)
            case Ready() | StartFailed():
                if self._ready.done():
                    return
                if isinstance(message, Ready):
                    self._ready.set_result(message)
                else:
                    self._ready.set_exception(message.error())
            case Died():
                self._lost(message.reason)

    def _lost(self, reason: str) -> None:
        """Tell whoever waits that the engine is gone; only the first reason counts."""
        if self._closed:
            return
        self._closed = True
        if self._is_started:
            self._on_lost(reason)
        elif self._ready.done():
            self._early_loss = reason
        else:
            self._ready.set_exception(_died_early(reason))


def _died_early(reason: str) -> EngineDeadError:
    return EngineDeadError(f"the engine died while it started: {reason}")
