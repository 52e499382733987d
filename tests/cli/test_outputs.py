"""This module checks the files that verbs write at their end. It does not know the verbs."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from octavo.engine.cli.outputs import STDOUT, check_output, write_output
from octavo.engine.errors import ConfigError


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file, link = tmp_path / "out.json", tmp_path / "link.json"
    file.write_text("before")
    link.symlink_to(file)
    write_output(link, "after")
    assert (file.read_text(), link.is_symlink()) == ("after", True)
    assert sorted(tmp_path.iterdir()) == [link, file]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_output(file, "half a character: \ud800")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_pipe_is_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_output(tmp_path / "pipe", "text")
    reader.join()
    write_output(STDOUT, "more")
    assert (read, capsys.readouterr().out) == (["text"], "more")


def test_what_could_not_be_written_is_refused(tmp_path: Path) -> None:
    for file in (None, STDOUT, tmp_path / "new.json"):
        check_output("--json", file)
    with pytest.raises(ConfigError, match="there is no folder"):
        check_output("--json", tmp_path / "no" / "where.json")
    with pytest.raises(ConfigError, match=f"--html {tmp_path}: is a folder"):
        check_output("--html", tmp_path)
