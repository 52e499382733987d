"""`octavo serve`: what it can be told, what it says, and that nothing that happens to its output stops it."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import json
import logging
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from octavo.engine.cli import serve as serve_module
from octavo.engine.cli.log_lines import LogLines
from octavo.engine.cli.serve_options import ServeOptions
from octavo.engine.config import EngineConfig
from octavo.engine.server.settings import Limits, ServerSettings

from .conftest import Run

COMMAND = (sys.executable, "-m", "octavo.engine.cli", "serve")
SMALL = ("--load-format", "dummy", "--kv-cache-tokens", "2048", "--max-num-seqs", "4", "--port", "0")
PROMPT = "the password is swordfish"


@pytest.fixture
def told(
    octavo: Run, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[EngineConfig, ServerSettings, str | None]]:
    """Return what the server gets to know of a command's words, which must be right."""

    def run(*words: str | Path) -> tuple[EngineConfig, ServerSettings, str | None]:
        seen: list[Any] = []

        async def serve(*arguments: Any, **_: Any) -> int:
            seen.extend(arguments)
            return 0

        monkeypatch.setattr(serve_module, "_serve", serve)
        ran = octavo("serve", "--port", "0", *words)
        assert ran.status == 0, ran.err
        return seen[0], seen[1], seen[2]

    return run


def test_there_are_at_most_thirty_flags(octavo: Run) -> None:
    flags = re.findall(r"^  -\S+", octavo("serve", "--help").out, re.MULTILINE)
    assert 20 < len(flags) <= 30


FILE = """\
model = "from-file"
block_size = 32

[server]
host = "localhost"
shutdown_timeout = 7
served_model_name = ["a", "b"]
metrics_prefix = "vllm:"

[server.limits]
queue_requests = 5
body_s = 2.5
"""


def test_settings_come_from_the_file_and_flags_win(told: Any, tmp_path: Path) -> None:
    file = tmp_path / "octavo.toml"
    file.write_text(FILE)
    config, settings, template = told("--config", file)
    assert (config.model, config.cache.block_size, template) == ("from-file", 32, None)
    limits = Limits(queue_requests=5, body_s=2.5)
    expected = ServerSettings("localhost", 0, ("a", "b"), (), 7.0, "vllm:", limits)
    assert settings == expected
    words = (
        "--shutdown-timeout",
        "1.5",
        "--metrics-prefix",
        "mine:",
        "--served-model-name",
        "c",
        "--limit",
        "queue_requests=9",
        "--limit",
        "ping_s=1",
    )
    _, settings, _ = told("--config", file, *words)
    limits = Limits(queue_requests=9, body_s=2.5, ping_s=1.0)
    assert settings == dataclasses.replace(
        expected, served_model_names=("c",), shutdown_timeout_s=1.5, metrics_prefix="mine:", limits=limits
    )


@pytest.mark.parametrize("name", Limits.names())
def test_every_limit_can_be_set(told: Any, tmp_path: Path, name: str) -> None:
    assert getattr(told("--limit", f"{name}=77")[1].limits, name) == 77
    (tmp_path / "octavo.toml").write_text(f"[server.limits]\n{name} = 78\n")
    assert getattr(told("--config", tmp_path / "octavo.toml")[1].limits, name) == 78


def test_limits_are_listed(octavo: Run) -> None:
    ran = octavo("serve", "--limit", "help")
    assert ran.status == 0
    assert [line.split()[0] for line in ran.out.splitlines()] == list(Limits.names())


def test_keys_templates_and_the_model_are_read(told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEYS", "from-environment")
    (tmp_path / "keys").write_text("# ours\nfrom-file-1\n\nfrom-file-2\n")
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    words = ("--api-key-file", tmp_path / "keys", "--chat-template", tmp_path / "template.jinja", "--host", "0.0.0.0")
    config, settings, template = told("some/model", *words)
    assert set(settings.api_keys) == {"from-environment", "from-file-1", "from-file-2"}
    assert (config.model, settings.host, template) == ("some/model", "0.0.0.0", "{{ messages }}")
    assert "from-file" not in repr(settings)


REFUSED: list[tuple[tuple[str, ...], str, str]] = [
    (("--host", "0.0.0.0"), "", "host is '0.0.0.0' and there is no API key"),
    (("--host", "192.0.2.1"), "", "allowed: 127.0.0.1, or keys in --api-key-file or OCTAVO_API_KEYS"),
    (("--port", "70000"), "", "port is 70000; allowed: 0 to 65535"),
    (("--api-key-file", "/nowhere/keys"), "", "--api-key-file /nowhere/keys cannot be read: No such file"),
    (("--api-key-file", "/dev/null"), "", "--api-key-file /dev/null holds no key"),
    (("--chat-template", "/nowhere/t"), "", "--chat-template /nowhere/t cannot be read"),
    (("--metrics-prefix", "9x", "--model", "/nowhere"), "", "metrics_prefix is '9x'; allowed: letters, digits"),
    (("--limit", "queue=3"), "", "unknown limit 'queue'; allowed: body_bytes, "),
    (("--limit", "queue_requests"), "", "allowed: NAME=X"),
    (("--limit", "queue_requests=-1"), "", "limit queue_requests is -1"),
    (("--limit", "ping_s=nan"), "", "limit ping_s is nan"),
    (("--shutdown-timeout", "nan"), "", "shutdown_timeout is nan"),
    (("a", "--model", "b"), "", "the model is given twice"),
    ((), "[server]\nhots = 'x'", "unknown setting 'hots' in [server]; allowed: host, port"),
    ((), "[server]\nport = '80'", "port in [server] is '80'; allowed: an integer"),
    ((), "[server]\ncrash_folder = '/nowhere'", "crash_folder in [server] is '/nowhere'; allowed: a folder"),
    ((), "[server]\nport = true", "port in [server] is True"),
    ((), "[server]\nserved_model_name = [1]", "served_model_name in [server]"),
    ((), "[server.limits]\nqueue = 1", "unknown limit 'queue' in [server.limits]"),
    ((), "server = 1", "server is no table"),
    ((), "[sampling]\ntemperature = 0", "[sampling] is given"),
]


@pytest.mark.parametrize(("words", "text", "message"), REFUSED)
def test_what_cannot_be_is_refused(
    octavo: Run, tmp_path: Path, words: tuple[str, ...], text: str, message: str
) -> None:
    file = tmp_path / "octavo.toml"
    file.write_text(text)
    ran = octavo("serve", "--config", file, *words)
    assert (ran.status, ran.out) == (2, "")
    assert message in " ".join(ran.err.split())


def test_a_taken_port_is_said_before_anything_is_loaded(octavo: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = octavo("serve", "--model", "/nowhere", "--port", str(port))
    assert ran.status == 2
    assert f"port {port} cannot be had: Address already in use" in ran.err


class Served:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Callable[[], str]) -> None:
        self.process = process
        self.address = urlsplit(url)
        self.url = url
        self.log = log

    def ask(self, path: str, body: Mapping[str, Any] | None = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(str(self.address.hostname), self.address.port, timeout=60)
        try:
            text = None if body is None else json.dumps(body)
            headers = {"content-type": "application/json"} | headers
            connection.request("GET" if body is None else "POST", path, text, headers)
            response = connection.getresponse()
            data = response.read()
            return response.status, json.loads(data) if data.startswith(b"{") else data
        finally:
            connection.close()

    def complete(self, **headers: str) -> list[int]:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "return_token_ids": True}
        status, answer = self.ask("/v1/completions", body, **headers)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 5
        return list(answer["choices"][0]["token_ids"])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def served(model: Path, *words: str | Path, **options: Any) -> Iterator[Served]:
    """Start a server on a tiny model; its stderr can be read, unless it is sent elsewhere."""
    command = [*COMMAND, str(model), *SMALL, "--served-model-name", "tiny", *map(str, words)]
    log = open(model.parent / f"{os.urandom(4).hex()}.log", "w+b")  # noqa: SIM115 (closed below)
    process = subprocess.Popen(command, **({"stdout": subprocess.PIPE, "stderr": log} | options))
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        found = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:\d+)\n", line)
        assert found is not None, (line, Path(log.name).read_text())
        yield Served(process, found[1], lambda: Path(log.name).read_text())
    finally:
        process.kill()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
        log.close()


def test_it_says_where_the_seconds_went_and_how_to_ask_and_logs_no_prompt(model_folder: Path) -> None:
    with served(model_folder) as server:
        said = server.log()
        for phase in ("import the server", "start the engine's process", "import torch", "load the weights", "ready"):
            assert re.search(rf"^ *\d+\.\d\d s  {phase}", said, re.MULTILINE), said
        assert "kv_cache_tokens" not in said  # that was no choice of the engine's
        assert "backend torch: the CPU's" in said
        for path in ("/", "/docs", "/metrics"):
            assert f" {server.url}{path}\n" in said
            assert server.ask(path)[0] == 200
        # As the snippet is printed it runs.
        snippet = said[said.index("from openai") :]
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        ran = subprocess.run(
            [sys.executable, "-c", snippet], capture_output=True, timeout=120, env=environment, check=False
        )
        assert ran.returncode == 0, ran.stderr
        server.complete(**{"x-request-id": "mine-1"})
        assert server.ask("/v1/no%0a%1b[31m")[0] == 404
        assert server.stop() == 0
        log = server.log()[len(said) :]
    assert re.search(
        r"^\d\d:\d\d:\d\d INFO +mine-1 POST /v1/completions 200, \d+ \+ 5 tokens, \d+\.\d{3} s$", log, re.M
    )
    assert re.search(r"POST /v1/chat/completions 200, \d+ \+ \d+ tokens", log)
    assert "swordfish" not in log
    assert "\x1b" not in log
    assert all(re.match(r"\d\d:\d\d:\d\d [A-Z]+ +\S", line) for line in log.splitlines())


def test_a_dead_engine_ends_it_and_leaves_what_is_known_without_texts(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "octavo.toml").write_text(f"[server]\ncrash_folder = {str(tmp_path)!r}\n")
    with served(model_folder, "--config", tmp_path / "octavo.toml") as server:
        server.complete()
        found = re.search(r"start the engine's process +pid (\d+)", server.log())
        assert found is not None, server.log()
        os.kill(int(found[1]), signal.SIGKILL)
        assert server.process.wait(timeout=60) == 1
        (bundle,) = tmp_path.glob("octavo-crash-*.json")
        assert f"what is known of its end is in {bundle}" in server.log()
    text = bundle.read_text()
    assert bundle.stat().st_mode & 0o777 == 0o600
    assert "was killed by SIGKILL" in json.loads(text)["error"]["message"]
    assert json.loads(text)["recording"]["steps"], "the bundle has no steps"
    assert "swordfish" not in text


def test_a_full_disk_a_closed_stdout_and_few_files_do_not_stop_it(model_folder: Path) -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    with open("/dev/full", "wb") as full, served(model_folder, stderr=full, preexec_fn=few_files) as server:
        assert server.process.stdout is not None
        server.process.stdout.close()
        golden = server.complete()
        crowd = []
        for _ in range(100):
            with contextlib.suppress(OSError):
                crowd.append(socket.create_connection((server.address.hostname, server.address.port), timeout=10))
        assert len(crowd) > 60
        for each in crowd:
            each.close()
        # Until the server has seen them go it may have no place for another.
        deadline = time.monotonic() + 60
        while (status := server.ask("/livez")[0]) == 503 and time.monotonic() < deadline:
            pass
        assert status == 200
        assert server.complete() == golden
        assert server.stop() == 0


def test_a_terminal_sees_it_start(model_folder: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    with served(model_folder, stderr=theirs, env=environment) as server:
        os.close(theirs)
        pieces: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(OSError):  # the other side is closed
                while piece := os.read(ours, 65536):
                    pieces.append(piece)

        reader = threading.Thread(target=read)
        reader.start()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) == 0
    reader.join(30)
    os.close(ours)
    text = b"".join(pieces).decode()
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "ready" in plain
    assert f"{server.url}/docs" in plain
    assert "Traceback" not in plain


def test_the_bundled_model_is_ready_in_time() -> None:
    start = time.monotonic()
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--quiet", "--kv-cache-tokens", "4096"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        ready_s = time.monotonic() - start
        assert line.startswith("serving smollm2-135m at http://127.0.0.1:")
        # On an idle machine, 15; this one may be doing other things.
        assert ready_s < 45
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(60)
    assert (process.returncode, errors) == (0, b"")


class Stuck(io.StringIO):
    """A pipe that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def write(self, text: str) -> int:
        self.go_on.wait(60)
        return super().write(text)


def test_a_log_that_nobody_reads_holds_nobody_up() -> None:
    stream = Stuck()
    with LogLines(stream, quiet=False):
        for number in range(12_000):
            logging.getLogger("octavo.server").info("line %d", number)
        stream.go_on.set()
    lines = stream.getvalue().splitlines()
    assert 10_000 <= len(lines) < 12_000
    assert lines[0].endswith("INFO    line 0")


def test_a_log_line_is_one_line_without_words_of_errors() -> None:
    stream = io.StringIO()
    with LogLines(stream, quiet=True):
        logging.getLogger("octavo.server").info("not told")
        try:
            raise ValueError(f"cannot read {PROMPT}")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("two\nlines \x1b[31m")
    (line,) = stream.getvalue().splitlines()
    assert line.split(maxsplit=1)[1].startswith("ERROR   two\\nlines \\x1b[31m\\nValueError in test_serve.py:")
    assert "swordfish" not in line


def test_options_are_documented_as_they_are() -> None:
    defaults = {each.name: each.default for each in dataclasses.fields(ServeOptions)}
    settings = ServerSettings()
    assert (defaults["host"], defaults["port"]) == (settings.host, settings.port)
    assert defaults["shutdown_timeout"] == settings.shutdown_timeout_s
