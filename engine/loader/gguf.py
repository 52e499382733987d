"""This module holds the reading of GGUF files, checked against their size first. It does not know models.

The package's own GGUFReader maps the file, trusts its counts and takes 2 s for a vocabulary of 49,152 tokens (2 cores);
this parser takes 0.1 s. Dequantisation is the package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ..errors import CheckpointError
from .files import ByteFile
from .store import Entry

__all__ = ["GGUFStore", "open_gguf"]

MAX_METADATA_BYTES = 64 << 20
MAX_NAME_BYTES = 512
PIECE_BYTES = 1 << 20
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_QUANTISED = frozenset(
    [
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "TQ1_0",
        "TQ2_0",
        "MXFP4",
        "NVFP4",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
        "IQ1_S",
        "IQ1_M",
        "IQ4_NL",
        "IQ4_XS",
    ]
)
_TYPES = {kind.value: kind for kind in GGMLQuantizationType if kind.name in _QUANTISED or kind.name in _PLAIN}
DEQUANTISE_ELEMENTS = 1 << 15


class GGUFStore:
    """The metadata and tensors of one GGUF file. Shapes are [rows, columns], the file's own order reversed."""

    def __init__(self, name: str, metadata: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
        self.name = name
        self.metadata = metadata
        self.entries = entries

    def check_loadable(self, entry: Entry) -> None:
        """Do nothing: opening the file has refused every type that cannot be dequantised."""

    def read_rows(self, entry: Entry, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `TensorStore`; what is dequantised lies in memory of its own."""
        part = entry.read_rows(start, stop, buffer)
        shape = (stop - start, *entry.shape[1:])
        if entry.dtype in _PLAIN:
            return part.view(_PLAIN[entry.dtype]).view(shape)
        kind = GGMLQuantizationType[entry.dtype]
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        # Blocks are independent, so rows can be cut anywhere: gguf works through 16 rows at a time, and this many
        # elements per row keep its temporaries in the cache.
        num_blocks = len(part) // block_bytes
        per_row = math.gcd(num_blocks, DEQUANTISE_ELEMENTS // 16 // block_elements)
        with np.errstate(all="ignore"):  # a damaged scale overflows here and is refused by name by the caller
            values = dequantize(part.numpy().reshape(-1, per_row * block_bytes), kind)
        return torch.from_numpy(values).view(shape)


def open_gguf(path: Path) -> GGUFStore:
    """Open a GGUF file of version 2 or 3, little-endian.

    Raises:
        CheckpointError: it is damaged, hostile or of a type or version not supported.
    """
    file = ByteFile(path)
    cursor = _Cursor(file)
    if cursor.take(4) != b"GGUF":
        raise CheckpointError(file.name, "does not begin with GGUF")
    version = cursor.integer(4)
    if version not in (2, 3):
        raise CheckpointError(file.name, f"GGUF version {version}; 2 and 3, little-endian, are supported")
    num_tensors, num_keys = cursor.integer(8), cursor.integer(8)
    # The least that a tensor and a key can take: a name's length, rank, one size, type and offset; length, type, value.
    cursor.check_count(num_tensors, 32, "tensors")
    cursor.check_count(num_keys, 13, "metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string(MAX_NAME_BYTES)
        if key in metadata:
            raise CheckpointError(file.name, f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.integer(4), key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise CheckpointError(
            file.name, f"general.alignment is {alignment!r}; a power of two from 8 to 65536 is allowed"
        )
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    start = -(-cursor.position // alignment) * alignment
    return GGUFStore(file.name, MappingProxyType(metadata), _place(file, infos, start, alignment))


class _TensorInfo(NamedTuple):
    """One row of the tensor table; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


def _tensor_info(cursor: _Cursor) -> _TensorInfo:
    name = cursor.string(MAX_NAME_BYTES)
    rank = cursor.integer(4)
    if not 1 <= rank <= 4:
        raise CheckpointError(cursor.file.name, f"has {rank} dimensions; 1 to 4 are possible", name)
    sizes = [cursor.integer(8) for _ in range(rank)]
    kind, offset = cursor.integer(4), cursor.integer(8)
    if kind not in _TYPES:
        allowed = ", ".join(sorted(known.name for known in _TYPES.values()))
        raise CheckpointError(cursor.file.name, f"has type {kind}; supported: {allowed}", name)
    if rank == 1 and _TYPES[kind].name in _QUANTISED:
        raise CheckpointError(
            cursor.file.name, f"is a vector of type {_TYPES[kind].name}; vectors are not quantised", name
        )
    block_elements, block_bytes = GGML_QUANT_SIZES[_TYPES[kind]]
    if 0 in sizes or sizes[0] % block_elements:
        raise CheckpointError(cursor.file.name, f"has sizes {sizes}, not rows of {block_elements} elements", name)
    num_bytes = math.prod(sizes) // block_elements * block_bytes
    return _TensorInfo(name, tuple(reversed(sizes)), _TYPES[kind], offset, num_bytes)


def _place(file: ByteFile, infos: list[_TensorInfo], start: int, alignment: int) -> dict[str, Entry]:
    """Check that tensors follow each other in the table's order, padded to the alignment, up to the file's end."""
    entries: dict[str, Entry] = {}
    expected = 0
    for name, shape, kind, offset, num_bytes in infos:
        if name in entries:
            raise CheckpointError(file.name, "is there twice", name)
        if offset != expected:
            raise CheckpointError(file.name, f"begins at byte {offset} of the data, not at {expected}", name)
        end = start + offset + num_bytes
        if end > file.size:
            raise CheckpointError(file.name, f"ends at byte {end}; the file has {file.size}", name)
        entries[name] = Entry(name, shape, kind.name, file, start + offset, num_bytes)
        expected = -(-(offset + num_bytes) // alignment) * alignment
    if file.size > start + expected:
        raise CheckpointError(file.name, f"has {file.size} bytes where its table says {start + expected}")
    return entries


class _Cursor:
    """Reads a file's head front to back, in pieces, with every length checked against what is left of the file."""

    def __init__(self, file: ByteFile) -> None:
        self.file = file
        self._data = b""
        self._base = 0
        self._at = 0

    @property
    def position(self) -> int:
        return self._base + self._at

    def _need(self, num_bytes: int) -> int:
        """Have `num_bytes` more bytes in the buffer, step over them and return where they begin in it."""
        if self._at + num_bytes > len(self._data):
            position = self.position
            if position + num_bytes > min(self.file.size, MAX_METADATA_BYTES):
                limit = "the file's end" if self.file.size <= MAX_METADATA_BYTES else f"{MAX_METADATA_BYTES} bytes"
                raise CheckpointError(self.file.name, f"{num_bytes} bytes at {position} run past {limit}")
            self._data = self.file.read(position, min(max(num_bytes, PIECE_BYTES), self.file.size - position))
            self._base, self._at = position, 0
        at = self._at
        self._at += num_bytes
        return at

    def take(self, num_bytes: int) -> bytes:
        at = self._need(num_bytes)
        return self._data[at : at + num_bytes]

    def integer(self, num_bytes: int) -> int:
        return int.from_bytes(self.take(num_bytes), "little")

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        left = self.file.size - self.position
        if count * least_bytes > left:
            raise CheckpointError(self.file.name, f"{count} {what} cannot fit in the {left} bytes left")

    def string(self, max_bytes: int = MAX_METADATA_BYTES) -> str:
        length = self.integer(8)
        if length > max_bytes:
            raise CheckpointError(self.file.name, f"a text of {length} bytes; at most {max_bytes} are accepted")
        raw = self.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(self.file.name, f"a text at {self.position - length} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        """Read one metadata value of the given type: int, float, bool, str, or a list of one of these."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self._numbers(kind, 1, key)[0]
        kind, count = self.integer(4), self.integer(8)
        if kind == _STRING:
            self.check_count(count, 8, f"texts of {key!r}")
            return [self.string() for _ in range(count)]
        return self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> list[Any]:
        if kind not in _SCALARS:
            raise CheckpointError(self.file.name, f"metadata key {key!r} has type {kind}, which is not supported")
        size = struct.calcsize(_SCALARS[kind])
        self.check_count(count, size, f"numbers of {key!r}")
        array = np.frombuffer(self.take(count * size), _SCALARS[kind])
        if kind == _BOOL:
            if count and array.max() > 1:
                raise CheckpointError(self.file.name, f"metadata key {key!r} holds a truth value above 1")
            return [bool(number) for number in array]
        # A float32 such as 1e-5 is given as the shortest decimal that rounds to it, not as its float64 expansion.
        return [float(str(number)) for number in array] if kind == _FLOAT32 else array.tolist()
