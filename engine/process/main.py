"""This module holds the engine's own process: what it runs from its first line to its last. It does not know what the
front does with the answers.

Started by `client.py` as `python -m octavo.engine.process.main FD PARENT`, with one end of a socket pair and nothing
else of its parent's. It lives as long as that: when the other end is closed, for whatever reason, it ends at once, in
the middle of a step or of its start-up.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Final, NoReturn

from ..errors import EngineDeadError, OctavoError
from .link import find_factory
from .loop import EngineLoop, EventLog, Inbox
from .messages import (
    Frames,
    FromEngine,
    Heartbeat,
    Hello,
    LogLine,
    PhaseBegan,
    Ready,
    StartFailed,
    ToEngine,
    WeightsRead,
    engine_info,
    to_engine,
    to_frame,
)

SEND_BUFFER_BYTES = 1 << 20
"""Of news that a front has not read; a step of 512 streams is 36 KB of it."""
RECEIVE_BYTES = 1 << 18
_PR_SET_PDEATHSIG: Final = 1


class _Pipe:
    """The engine's end of the line.

    A front that does not read fills the socket's buffer, and then `send` waits: the engine stands still between two
    steps, keeps nothing and uses no time, until the front reads again or is gone.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._frames = Frames()
        self._sending = threading.Lock()
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def send(self, message: FromEngine) -> None:
        frame = to_frame(message)
        with self._sending:
            self._write(frame)

    def beat(self, heartbeat: Heartbeat) -> None:
        # A lock that is held means that news is on its way, which says as much as a heartbeat.
        if self._sending.acquire(blocking=False):
            try:
                self._write(to_frame(heartbeat))
            finally:
                self._sending.release()

    def _write(self, frame: bytearray) -> None:
        try:
            self._socket.sendall(frame)
        except ConnectionError:
            _leave(1)

    def messages(self) -> Iterator[ToEngine]:
        """Yield messages until the front is gone."""
        with contextlib.suppress(ConnectionError):
            while data := self._socket.recv(RECEIVE_BYTES):
                for content in self._frames.feed(data):
                    yield to_engine(content)


class _FrontLog(logging.Handler):
    """Lets the front log what is logged here, as it logs everything."""

    def __init__(self, pipe: _Pipe) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self._pipe.send(LogLine(record.name, record.levelno, record.getMessage()))


def main() -> NoReturn:
    """Run the engine that the first message asks for, and leave with status 0 if it was told to."""
    descriptor, parent = map(int, sys.argv[1:])
    # Who ends the front decides when the engine goes: Ctrl-C and a service manager's SIGTERM reach every process, and
    # the front must still be able to drain. The engine goes when the front closes its end, at the latest by dying.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent(parent)
    pipe = _Pipe(socket.socket(fileno=descriptor))
    messages = pipe.messages()
    hello = next(messages, None)
    if not isinstance(hello, Hello):
        _leave(1)
    inbox: Inbox = SimpleQueue()
    threading.Thread(target=_listen, args=(messages, inbox), name="octavo-inbox", daemon=True).start()
    try:
        _serve(hello, inbox, pipe)
    except OctavoError as error:
        print(f"octavo engine: {error}", file=sys.stderr)
        _leave(1)
    _leave(0)


def _serve(hello: Hello, inbox: Inbox, pipe: _Pipe) -> None:
    log = EventLog()
    logger = logging.getLogger("octavo")
    logger.addHandler(_FrontLog(pipe))
    logger.setLevel(logging.INFO)
    try:
        engine = find_factory(hello.factory)(
            hello.config,
            on_phase=lambda name: pipe.send(PhaseBegan(name)),
            on_weights=lambda num_bytes, total_bytes: pipe.send(WeightsRead(num_bytes, total_bytes)),
            recorder=log,
        )
    except Exception as error:
        failed = StartFailed.of(error)
        if failed.kind == EngineDeadError.__name__:
            traceback.print_exc()
        pipe.send(failed)
        _leave(1)
    parts = engine.tokenizer.parts() if engine.tokenizer is not None else None
    # What has been imported stays: walking over it in search of garbage would stop every request for 0.1 s.
    gc.collect()
    gc.freeze()
    pipe.send(Ready(engine_info(engine, os.getpid()), parts))
    EngineLoop(engine, log, inbox, pipe).run()


def _listen(messages: Iterator[ToEngine], inbox: Inbox) -> None:
    try:
        for message in messages:
            inbox.put(message)
    except BaseException:
        traceback.print_exc()
    _leave(1)


def _die_with_parent(parent: int) -> None:
    """Ask the kernel, where it can, to kill this process with its parent: also while some code holds up all threads."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            _leave(1)


def _leave(status: int) -> NoReturn:
    """End the process now: a step or a library's thread may hang, and nothing here needs to be put away."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
