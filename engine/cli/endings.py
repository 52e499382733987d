"""This module holds how a verb ends: its exit status and the last line of text. It does not know the verbs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from ..errors import CapacityError, CheckpointError, ConfigError, OctavoError, RequestError
from .terminal import error_line

__all__ = ["FAILED", "INTERRUPTED", "OK", "WRONG_USE", "Interrupt", "run_to_end"]

OK = 0
FAILED = 1
"""Requests have failed, or the engine has."""
WRONG_USE = 2
"""Flags, settings or a file cannot be used as they are."""
INTERRUPTED = 128 + signal.SIGINT
READER_GONE = 128 + signal.SIGPIPE


def run_to_end(call: Callable[[], int], *, debug: bool) -> int:
    """Run a verb and return its exit status; errors meant for users become one message on stderr.

    Args:
        call: returns the exit status.
        debug: let exceptions through, with their traceback.
    """
    try:
        return call()
    except BrokenPipeError:
        # Whoever read stdout has left. Python would flush it once more at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except KeyboardInterrupt:
        error_line("interrupted", label="")
        return INTERRUPTED
    except OctavoError as error:
        if debug:
            raise
        error_line(str(error))
        wrong_use = isinstance(error, (CapacityError, CheckpointError, ConfigError, RequestError))
        return WRONG_USE if wrong_use else FAILED
    except OSError as error:
        if debug:
            raise
        error_line(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error))
        return FAILED
    except Exception as error:
        if debug:
            raise
        error_line(f"{type(error).__name__}: {error}\nThis is a bug in octavo; --debug shows where it comes from.")
        return FAILED


class Interrupt:
    """Turns Ctrl-C into a wish to stop: the first is noted, the second raises KeyboardInterrupt.

    A step is then never cut in the middle, where the scheduler's books would be left half written.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._previous: Any = None
        self._here = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupt:
        if self._here:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._here:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
