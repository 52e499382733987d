"""This module holds the front's end of the line to an engine in a process of its own. It does not know what is asked
of it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time

from ..config import EngineConfig
from ..text import Tokenizer
from .link import EngineLink
from .messages import Frames, Hello, Ready, Shutdown, ToEngine, from_engine, to_frame

__all__ = ["ProcessLink"]

WATCH_S = 0.5
"""How often to look whether the process is there, in case something else holds its end of the line open."""
EXIT_S = 1.0
"""How long a process whose line is closed may take to be gone."""


class _Receiver(asyncio.Protocol):
    """Reads messages as they come."""

    def __init__(self, link: ProcessLink) -> None:
        self._link = link
        self._frames = Frames()

    def data_received(self, data: bytes) -> None:
        """Hand on every message that is complete."""
        self._link._receive(map(from_engine, self._frames.feed(data)))

    def connection_lost(self, error: Exception | None) -> None:
        """Look what has become of the process."""
        self._link._line_closed()


class ProcessLink(EngineLink):
    """A line to an engine in a process of its own, spawned with nothing of this one but one end of a socket pair."""

    _process: subprocess.Popen[bytes] | None = None
    _transport: asyncio.WriteTransport | None = None
    _watcher: asyncio.Task[None] | None = None
    _burial: asyncio.Task[None] | None = None

    async def _launch(self, config: EngineConfig, factory: str) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        try:
            self._process = _spawn(theirs)
            ours.setblocking(False)
            self._transport, _ = await loop.create_unix_connection(lambda: _Receiver(self), sock=ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._watcher = asyncio.create_task(self._watch())
        self.send(Hello(config, factory))

    async def _tokenizer(self, ready: Ready) -> Tokenizer | None:
        if ready.tokenizer is None:
            return None
        return await asyncio.to_thread(Tokenizer.from_parts, ready.tokenizer)

    def send(self, message: ToEngine) -> None:
        """Send a message. The engine's end is read at all times, so nothing piles up here."""
        if self._transport is not None:
            self._transport.write(to_frame(message))

    async def close(self, timeout_s: float) -> None:
        """End the process and wait until it is gone."""
        self._closed = True
        process = self._process
        if process is None:
            return
        self.send(Shutdown())
        if not await _gone(process, timeout_s):
            process.kill()
            await _gone(process, EXIT_S)
        if self._watcher is not None:
            self._watcher.cancel()
        if self._transport is not None:
            self._transport.close()

    def _line_closed(self) -> None:
        if not self._closed and self._burial is None:
            self._burial = asyncio.create_task(self._bury())

    async def _watch(self) -> None:
        while self._process is not None and self._process.poll() is None:
            await asyncio.sleep(WATCH_S)
        self._line_closed()

    async def _bury(self) -> None:
        """Make sure that the process is gone, and say how it ended."""
        process = self._process
        assert process is not None, "no process to bury"
        if not await _gone(process, EXIT_S):
            process.kill()
            await _gone(process, EXIT_S)
            self._lost("its process closed the line and was killed")
        else:
            self._lost(f"its process {_how_it_ended(process.returncode)}")
        if self._transport is not None:
            self._transport.close()


def _spawn(line: socket.socket) -> subprocess.Popen[bytes]:
    """Start the engine's process.

    The kernel kills it with the thread that calls this, so that must be the event loop's own. A session of its own
    keeps a terminal's signals from it. It finds modules where this process does.
    """
    paths = [path or os.getcwd() for path in sys.path]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "octavo.engine.process.main", str(line.fileno()), str(os.getpid())],
        pass_fds=(line.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=2,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )


async def _gone(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for a process without holding up the event loop; whether it has ended."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
