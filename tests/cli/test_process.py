"""The command as a process of its own: terminals, killed runs, readers that leave, the bundled model."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Run

COMMAND = (sys.executable, "-m", "octavo.engine.cli")
SMALL = ("--load-format", "dummy", "--kv-cache-tokens", "2048", "--max-num-seqs", "2", "--temperature", "0")


def words_for(model_folder: Path, *words: str | Path) -> list[str]:
    return [*COMMAND, "generate", "--model", str(model_folder), *SMALL, *map(str, words)]


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Run a command with a terminal of 100 columns; return its status and all that it wrote there."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    pieces: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 65536):
                pieces.append(piece)
        except OSError:  # the terminal's other side is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    status = process.wait(timeout=120)
    reader.join(timeout=10)
    os.close(ours)
    return status, b"".join(pieces).decode(errors="replace")


def test_a_terminal_shows_prompts_answers_and_where_the_seconds_went(model_folder: Path) -> None:
    words = ("one[bold]", "two", "--logit-bias", '{"66": 100}', "--max-tokens", "5", "--n", "1")
    status, text = on_a_terminal(words_for(model_folder, *words))
    assert status == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
    letter = re.search(r"^one\[bold\](.)\1{4}$", plain, re.MULTILINE)
    assert letter is not None, plain
    assert f"two{letter[1] * 5}\n" in plain
    assert "\x1b[2mone[bold]\x1b[0m" in text
    assert re.search(r"\d\.\d\d s  load the weights  .*MiB in float32", plain)
    assert re.search(r"\d\.\d\d s  ready", plain)
    assert "dtype float32: the fastest on most CPUs" in plain
    assert re.search(
        r"2 finished: \d+ prompt and 10 output tokens in .*prefill .* tokens/s · decode .* tokens/s", plain
    )
    assert "2 stopped at max_tokens" in plain


def test_a_terminal_gets_jsonl_where_more_than_text_is_wanted(model_folder: Path) -> None:
    status, text = on_a_terminal(words_for(model_folder, "A", "--logprobs", "1", "--max-tokens", "2", "--quiet"))
    assert status == 0
    assert len(json.loads(text)["outputs"][0]["logprobs"]) == 2


def test_escapes_of_a_model_do_not_reach_the_terminal(model_folder: Path) -> None:
    escape = json.loads((model_folder / "tokenizer.json").read_text())["model"]["vocab"]["ě"]
    words = ("A", "--logit-bias", json.dumps({escape: 100}), "--max-tokens", "2", "--quiet")
    status, text = on_a_terminal(words_for(model_folder, *words))
    assert status == 0
    assert r"\x1b\x1b" in text
    assert "\x1b\x1b" not in text


def test_a_killed_run_goes_on(model_folder: Path, tmp_path: Path, count: Callable[[int, int], int]) -> None:
    lines = [{"id": n, "prompt": f"{n}", "ignore_eos": True, "temperature": 1, "max_tokens": 20} for n in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    words = words_for(model_folder, "--input", tmp_path / "in.jsonl", "--output", out, "--quiet")
    for trial in range(count(1, 5)):
        out.unlink(missing_ok=True)
        process = subprocess.Popen(words)
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 2 + 9 * trial):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        num_kept = out.read_bytes().count(b"\n")
        assert 2 <= num_kept < 60, "the run was over before it could be killed"
        subprocess.run(words, check=True, timeout=120)
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert [each["id"] for each in records] == list(range(60))
        assert all(len(each["outputs"][0]["token_ids"]) == 20 for each in records)


def test_a_reader_that_leaves_is_no_error(model_folder: Path) -> None:
    words = words_for(model_folder, *(["x"] * 40), "--quiet", "--ignore-eos")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["id"] == 1
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert errors == b""


def test_requests_on_stdin(model_folder: Path) -> None:
    words = words_for(model_folder, "--input", "-", "--quiet")
    done = subprocess.run(words, input='{"id": "a", "prompt": "A"}\n', capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["id"] == "a"


def test_the_bundled_model_answers(octavo: Run) -> None:
    words = ("--temperature", "0", "--max-tokens", "6", "--kv-cache-tokens", "256")
    ran = octavo("generate", "The capital of France is", "What is the capital of France?", *words)
    assert ran.status == 0
    texts: list[Any] = [each["outputs"][0]["text"] for each in ran.records]
    assert "Paris" in texts[0]
    assert len(texts) == 2
    assert "read the checkpoint's tables" in ran.err


@pytest.mark.parametrize("words", [("--help",), ("chat", "--help")])
def test_help_answers(octavo: Run, words: tuple[str, ...]) -> None:
    ran = octavo(*words)
    assert ran.status == 0
    assert ran.out.startswith("Usage: octavo ")
