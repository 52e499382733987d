"""This module holds the output file of a batch, which a later run can take up again. It does not know the engine.

Beside `out.jsonl` lies `out.jsonl.settings.json`: all that decides which tokens come out. A run with other settings is
refused, since the file would then hold answers of two kinds. Each line has a digest of its request for the same reason.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError
from ..strict_json import parse_json
from .answers import to_line
from .requests import RequestId

__all__ = ["ResultFile"]


class ResultFile:
    """Appends records to a file, each flushed at once; nothing is changed before `begin`.

    Args:
        path: of the JSONL file; what a killed run has left there is taken up again.
        settings: what was asked for, as far as tokens depend on it; compared with the earlier run's.
        overwrite: start afresh.

    Raises:
        ConfigError: another run writes to it, it was made with other settings, or it is not ours.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self.path = path
        self.finished: dict[RequestId, str] = {}
        """Id and digest of every request answered by earlier runs."""
        self._settings = dict(settings)
        self._overwrite = overwrite
        self._end = 0
        """Bytes of complete lines."""
        self._has_errors = False
        self._file: IO[bytes] | None = None
        if path.exists() and not path.is_file():
            raise ConfigError(
                f"--output {path} is not a regular file; to write elsewhere, leave it out and pipe stdout"
            )
        if not path.parent.is_dir():
            raise ConfigError(f"--output {path}: there is no folder {path.parent}")
        self._settings_path = path.with_name(path.name + ".settings.json")
        try:
            self._settings_file = self._settings_path.open("a+b")
        except OSError as error:
            raise ConfigError(
                f"--output {path}: {self._settings_path.name}, which is kept beside it, cannot be written: "
                f"{error.strerror}"
            ) from None
        try:
            fcntl.flock(self._settings_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._settings_file.close()
            raise ConfigError(f"--output {path}: another run is writing to it") from None
        try:
            if not overwrite and path.exists() and path.stat().st_size:
                self._read()
        except BaseException:
            self.close()
            raise

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Open the file for writing, repaired, once it is known what the engine really runs with.

        Raises:
            ConfigError: an earlier run's was something else.
        """
        self._settings |= settings
        if self._end:
            self._compare()
        self._settings_file.truncate(0)
        self._settings_file.write(json.dumps(self._settings, indent=2).encode() + b"\n")
        self._settings_file.flush()
        self._file = self.path.open("ab")
        self._file.truncate(self._end)
        if self._has_errors:
            # Their requests are run again.
            self._rewrite(line for line, record in self._records() if "error" not in record)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        assert self._file is not None, "begin comes first"
        self._file.write(to_line(record))
        self._file.flush()

    def put_in_order(self, line_of: Mapping[RequestId, int]) -> None:
        """Bring the lines into the order of the input, after a run that took up another."""
        places: list[tuple[int, int, int]] = []
        offset = 0
        for line, record in self._records():
            number = record.get("line") or line_of.get(record["id"], 0)
            places.append((number, offset, len(line)))
            offset += len(line)
        ordered = sorted(places)
        if ordered == places:
            return
        with self.path.open("rb") as source:

            def lines() -> Iterator[bytes]:
                for _, start, size in ordered:
                    source.seek(start)
                    yield source.read(size)

            self._rewrite(lines())

    def close(self) -> None:
        """Close the file; a run that never began leaves nothing behind."""
        if self._file is not None:
            self._file.close()
        if not self._settings_path.stat().st_size:
            self._settings_path.unlink()
        self._settings_file.close()

    def _read(self) -> None:
        if not self._earlier_settings():
            raise ConfigError(
                f"--output {self.path} exists and is not of an octavo run that could go on; name another file, or "
                "start afresh with --overwrite"
            )
        self._compare()
        for line, record in self._records():
            self._end += len(line)
            if "error" in record:
                self._has_errors = True
            else:
                self.finished[record["id"]] = record["digest"]

    def _records(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yield every complete line and what it holds; a last one cut short by the end of a run is left out."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record = parse_json(line.decode())
                    _check(record)
                except ValueError as error:
                    raise ConfigError(
                        f"--output {self.path}: line {number} is not of octavo ({error}); name another file, or start "
                        "afresh with --overwrite"
                    ) from None
                yield line, record

    def _earlier_settings(self) -> dict[str, Any]:
        self._settings_file.seek(0)
        try:
            found = parse_json(self._settings_file.read().decode())
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _compare(self) -> None:
        earlier = self._earlier_settings()
        different = [
            f"{name} was {json.dumps(earlier.get(name))} and is {json.dumps(value)}"
            for name, value in self._settings.items()
            if earlier.get(name) != value
        ]
        if different:
            raise ConfigError(
                f"--output {self.path} was made with other settings: {'; '.join(different)}. Use the same again, name "
                "another file, or start afresh with --overwrite"
            )

    def _rewrite(self, lines: Iterator[bytes]) -> None:
        """Replace the file's lines in one stroke, so that a crash leaves either the old or the new ones."""
        assert self._file is not None, "begin comes first"
        fresh = self.path.with_name(self.path.name + ".tmp")
        with fresh.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        self._file.close()
        self._file = self.path.open("ab")


def _check(record: Any) -> None:
    if not isinstance(record, dict) or "id" not in record or not isinstance(record["id"], int | str | None):
        raise ValueError("it is no answer")
    if "error" not in record and not isinstance(record.get("digest"), str):
        raise ValueError("it has no digest")
