"""The end of a server: by signals, and by its engine's death. Each trial is a server of its own, in processes."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from .serving import WAIT_S, fake_text

SCRIPT = Path(__file__).with_name("fake_server.py")


class Served:
    """A server's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        url, pid = process.stdout.readline().split()
        self.address = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.engine_pid = int(pid)

    def wait(self) -> int:
        """Return its exit status; the engine must be gone, too."""
        status = self.process.wait(WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while psutil.pid_exists(self.engine_pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not psutil.pid_exists(self.engine_pid)
        return status

    def ask(self, path: str, body: object = None) -> tuple[int, str]:
        """Return the status and the body; 0 where nobody answers."""
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        received = b""
        try:
            with socket.create_connection(self.address, WAIT_S) as sock:
                sock.sendall(head.encode() + data)
                while part := sock.recv(65536):
                    received += part
        except OSError:
            return 0, ""
        return int(received.split(b" ", 2)[1]), received.partition(b"\r\n\r\n")[2].decode()


@contextmanager
def _served(timeout_s: float, *, max_files: int | None = None) -> Iterator[Served]:
    def starve() -> None:
        if max_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))

    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(timeout_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=starve,
    )
    try:
        yield Served(process)
    finally:
        process.kill()
        _, errors = process.communicate()
        assert "Traceback" not in errors, errors


class Stream:
    """A stream that is read on a thread of its own."""

    def __init__(self, served: Served, num_tokens: int, seed: int) -> None:
        self.expected = fake_text("abc", num_tokens, seed)
        self.data = b""
        self.has_begun = threading.Event()
        body = {"prompt": "abc", "max_tokens": num_tokens, "seed": seed, "stream": True}
        self._sock = socket.create_connection(served.address, WAIT_S)
        data = json.dumps(body).encode()
        self._sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with self._sock:
            while part := self._sock.recv(65536):
                self.data += part
                if b"data:" in self.data:
                    self.has_begun.set()
        self.has_begun.set()

    def events(self) -> list[Any]:
        """Return all events, once the server has closed."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        lines = self.data.decode().splitlines()
        return [
            json.loads(line[6:]) if "[DONE]" not in line else "[DONE]" for line in lines if line.startswith("data:")
        ]

    def check_whole(self) -> None:
        """Check that nothing is missing."""
        *events, last = self.events()
        assert last == "[DONE]"
        assert "".join(event["choices"][0]["text"] for event in events) == self.expected

    def check_cut_short(self, code: str) -> None:
        """Check that it says why it ended, and that what came before is right."""
        *events, last = self.events()
        assert last["error"]["code"] == code, last
        assert self.expected.startswith("".join(event["choices"][0]["text"] for event in events))


def test_sigterm_truncates_no_stream(count: Callable[[int, int], int], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count(3, 100)):
        with _served(WAIT_S) as served:
            streams = [Stream(served, rng.randrange(1, 1500), number) for number in range(6)]
            for stream in streams:
                stream.has_begun.wait(WAIT_S)
            time.sleep(rng.random() * 0.1)  # the moment is the case, nothing is waited for
            served.process.send_signal(rng.choice((signal.SIGTERM, signal.SIGINT)))
            for stream in streams:
                stream.check_whole()
            assert served.wait() == 0


def test_what_comes_after_sigterm_is_refused() -> None:
    with _served(1.0) as served:
        stream = Stream(served, 100_000, 1)
        assert stream.has_begun.wait(WAIT_S)
        assert served.ask("/health")[0] == 200
        served.process.send_signal(signal.SIGTERM)
        while (answer := served.ask("/v1/completions", {"prompt": "a", "max_tokens": 1}))[0] == 200:
            pass
        assert (answer[0], json.loads(answer[1])["error"]["code"]) == (503, "shutting_down")
        assert served.ask("/health")[0] == 503
        assert served.ask("/livez")[0] == 200
        stream.check_cut_short("shutting_down")
        assert served.wait() == 0


def test_second_signal_ends_at_once() -> None:
    with _served(1000.0) as served:
        stream = Stream(served, 100_000, 1)
        assert stream.has_begun.wait(WAIT_S)
        served.process.send_signal(signal.SIGTERM)
        while served.ask("/health")[0] == 200:
            pass
        served.process.send_signal(signal.SIGTERM)
        assert served.wait() == 1
        stream.events()


def test_watchers_do_not_hold_it_up() -> None:
    with _served(1000.0) as served:
        with socket.create_connection(served.address, WAIT_S) as sock:
            sock.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
            served.process.send_signal(signal.SIGTERM)
            while sock.recv(65536):
                pass
        assert served.wait() == 0


def test_death_of_the_engine(count: Callable[[int, int], int]) -> None:
    for _ in range(count(1, 10)):
        with _served(1000.0) as served:
            streams = [Stream(served, 100_000, number) for number in range(3)]
            for stream in streams:
                assert stream.has_begun.wait(WAIT_S)
            os.kill(served.engine_pid, signal.SIGKILL)
            for stream in streams:
                stream.check_cut_short("engine_dead")
            assert served.wait() == 1


def test_few_files_and_no_stdout() -> None:
    """More clients than files: they wait or are turned away, and when they have gone all is as before."""
    with _served(5.0, max_files=64) as served:
        assert served.process.stdout is not None
        served.process.stdout.close()
        crowd = [socket.create_connection(served.address, WAIT_S) for _ in range(100)]
        # The first of them are served; the system may throw the word to the others away with their connection.
        assert served.ask("/livez")[0] in (0, 503)
        crowd[0].sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert crowd[0].recv(100).startswith(b"HTTP/1.1 200")
        for sock in crowd:
            sock.close()
        while served.ask("/health")[0] != 200:
            pass
        Stream(served, 50, 1).check_whole()
        served.process.send_signal(signal.SIGTERM)
        assert served.wait() == 0
