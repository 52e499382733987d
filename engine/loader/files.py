"""This module holds bounded, checked access to files: byte ranges and strict JSON. It does not know what they hold.

Bytes are read with `preadv` and never through a memory map: touching a map whose file has been shortened kills the
process with SIGBUS, while a short read is an exception.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError

__all__ = ["ByteFile", "child", "parse_json", "read_json"]

MAX_READ_BYTES = 1 << 30
"""Linux moves at most 2 GiB - 4 KiB in one call; larger reads are split."""


class ByteFile:
    """A regular file whose size is fixed when it is opened; every later difference is an error.

    Args:
        path: the file. It stays open until `close` or until the object is collected.

    Raises:
        CheckpointError: it cannot be opened or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        try:
            # Opening a FIFO for reading blocks for ever without O_NONBLOCK.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            self._fd = -1
            raise CheckpointError(self.name, f"cannot be opened: {_why(error)}") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError(self.name, "is not a regular file")
        self.size: int = status.st_size
        self._modified_ns = status.st_mtime_ns

    def close(self) -> None:
        """Close the file; reading it afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file has another size or time of change than when it was opened."""
        status = os.fstat(self._fd)
        if status.st_size != self.size:
            raise CheckpointError(self.name, f"had {self.size} bytes when it was checked and has {status.st_size} now")
        if status.st_mtime_ns != self._modified_ns:
            raise CheckpointError(self.name, "has been written to since it was checked")

    def read_into(self, buffer: npt.NDArray[np.uint8], offset: int, tensor: str | None = None) -> None:
        """Fill `buffer` from `offset`.

        Args:
            buffer: [num_bytes] uint8, contiguous.
            offset: first byte in the file.
            tensor: whose bytes they are, for the error.

        Raises:
            CheckpointError: the file has no such bytes (any more).
        """
        view, done = memoryview(buffer.data), 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done : done + MAX_READ_BYTES]], offset + done)
            except OSError as error:
                raise CheckpointError(self.name, f"cannot be read: {_why(error)}", tensor) from error
            if got == 0:
                raise CheckpointError(
                    self.name, f"ends at byte {offset + done}, {len(view) - done} bytes too early", tensor
                )
            done += got

    def read(self, offset: int, num_bytes: int, tensor: str | None = None) -> bytes:
        """Return `num_bytes` bytes from `offset`; see `read_into`."""
        if num_bytes > self.size - offset:
            raise CheckpointError(
                self.name, f"has {self.size} bytes; bytes {offset} to {offset + num_bytes} are needed", tensor
            )
        buffer = np.empty(num_bytes, np.uint8)
        self.read_into(buffer, offset, tensor)
        return buffer.tobytes()


def child(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint's file, refusing one that lies outside the checkpoint's folder.

    A folder of the hub's cache (`<model>/snapshots/<revision>`) may also link into `<model>/blobs`.

    Raises:
        CheckpointError: the name has a path in it, or a symlink leads out of the folder.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise CheckpointError(folder.name, f"file name {name[:200]!r} is not a plain name inside the folder")
    path = folder / name
    try:
        home, real = folder.resolve(strict=True), path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError up to Python 3.12
        raise CheckpointError(folder.name, f"{name[:200]!r} cannot be resolved: {error}") from error
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in homes):
        raise CheckpointError(name, "is a symbolic link that leaves the checkpoint's folder")
    return path


def parse_json(data: bytes, file: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no NaN or Infinity, no key twice.

    Raises:
        CheckpointError: anything else, however deep or long.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"key {twice[:200]!r} appears twice")
        return found

    def refuse_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and over-long integers are ValueErrors
        raise CheckpointError(file, f"is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(file, f"must hold a JSON object, not {type(value).__name__}")
    return value


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read and parse a JSON object of at most `max_bytes`; see `parse_json`."""
    file = ByteFile(path)
    try:
        if file.size > max_bytes:
            raise CheckpointError(file.name, f"has {file.size} bytes; at most {max_bytes} are accepted")
        return parse_json(file.read(0, file.size), file.name)
    finally:
        file.close()


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
