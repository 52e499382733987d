"""This module holds the files that a verb writes once it is done. It does not know what stands in them."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import ConfigError

__all__ = ["STDOUT", "check_output", "write_output"]

STDOUT = Path("-")


def check_output(flag: str, file: Path | None) -> None:
    """Refuse a file that could not be written, before minutes go into what shall stand in it.

    Raises:
        ConfigError: there is no such folder, or it is a folder itself.
    """
    if file is None or file == STDOUT:
        return
    if not file.parent.is_dir():
        raise ConfigError(f"{flag} {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise ConfigError(f"{flag} {file}: is a folder; allowed: a file")


def write_output(file: Path, text: str) -> None:
    """Write a file as a whole, so that nobody finds half of one, or to stdout where it is `STDOUT`."""
    if file == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    elif file.exists() and not file.is_file():  # a device or a pipe
        file.write_text(text, encoding="utf-8")
    else:
        whole = file.resolve()  # what a link leads to
        part = whole.with_name(f".{whole.name}.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(whole)
        finally:
            part.unlink(missing_ok=True)
