"""This module holds where a server's log goes: one line each to stderr, whatever becomes of that. It does not know
what is logged.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import queue
import threading
import traceback
from types import TracebackType
from typing import IO

from .terminal import printable

__all__ = ["LogLines"]

MAX_WAITING = 10_000
"""Lines that wait while nobody takes them; what comes beyond is lost."""
CLOSE_TIMEOUT_S = 1.0


class LogLines(logging.Handler):
    """Writes records from a thread of its own, so that a full disk, a closed or a stuck pipe stops nobody.

    To be used as a context, which attaches it to all loggers.

    Args:
        stream: where lines go.
        quiet: warnings and worse only.
    """

    def __init__(self, stream: IO[str], *, quiet: bool) -> None:
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self._stream = stream
        self._waiting: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="octavo-log", daemon=True)
        self.setFormatter(_OneLine("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))

    def __enter__(self) -> LogLines:
        self._thread.start()
        logging.getLogger().addHandler(self)
        logging.getLogger("octavo").setLevel(self.level)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger().removeHandler(self)
        logging.getLogger("octavo").setLevel(logging.NOTSET)
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_TIMEOUT_S)
            self._thread.join(CLOSE_TIMEOUT_S)

    def emit(self, record: logging.LogRecord) -> None:
        """Take one record."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(self.format(record))

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                continue  # the next one may fit again


class _OneLine(logging.Formatter):
    """One line for each record, with no control characters and no words of exceptions, which may quote a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        # Another handler may have left its own text of the exception in the record.
        own = copy.copy(record)
        own.exc_text = None
        return printable(super().format(own)).replace("\n", "\\n")

    def formatException(  # noqa: N802 (logging's name)
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        frames = traceback.extract_tb(ei[2])
        where = " < ".join(f"{each.filename.rpartition('/')[2]}:{each.lineno}" for each in reversed(frames))
        return f"{ei[0].__name__} in {where}" if ei[0] is not None else ""
