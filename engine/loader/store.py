"""This module holds what both file formats give: a table of tensors, read by rows. It does not know parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from .files import ByteFile

__all__ = ["Entry", "TensorStore"]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: `num_bytes` bytes from `offset` of `file`, as `dtype` (the format's own name for it)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: ByteFile
    offset: int
    num_bytes: int

    def read_rows(self, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Return the bytes of some rows along the first axis, read to the beginning of a buffer."""
        row_bytes = self.num_bytes // self.shape[0]
        part = buffer[: (stop - start) * row_bytes]
        self.file.read_into(part.numpy(), self.offset + start * row_bytes, self.name)
        return part


class TensorStore(Protocol):
    """The tensors of a checkpoint whose table has been checked against the size of its files."""

    name: str
    """The file or folder, for errors."""
    entries: Mapping[str, Entry]

    def check_loadable(self, entry: Entry) -> None:
        """Raise CheckpointError if the tensor's dtype is not one that weights can have."""

    def read_rows(self, entry: Entry, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """Read rows along the first axis; may run in several threads at once.

        Args:
            buffer: uint8 on the CPU, large enough for the rows as they are in the file; overwritten.

        Returns:
            [stop - start, *entry.shape[1:]] floating point on the CPU, in the buffer or not.
        """
