"""This module holds the reading of safetensors files, their tables checked first. It does not know models.

The files are parsed here, not by the safetensors library: it maps them, and a file shortened while mapped kills the
process; it also accepts holes between its checks and the same key twice.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .files import ByteFile, child, parse_json, read_json
from .store import Entry

__all__ = ["SafetensorsStore", "open_safetensors"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 32 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_SHARDS = 4096
_WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}


class SafetensorsStore:
    """The tensors of one or several safetensors files, read by byte ranges."""

    def __init__(self, name: str, entries: Mapping[str, Entry]) -> None:
        self.name = name
        self.entries = entries

    def check_loadable(self, entry: Entry) -> None:
        """Raise CheckpointError if the tensor's dtype is not one that weights can have."""
        if entry.dtype not in _WEIGHT_DTYPES:
            allowed = ", ".join(_WEIGHT_DTYPES)
            raise CheckpointError(entry.file.name, f"has dtype {entry.dtype}; weights are {allowed}", entry.name)

    def read_rows(self, entry: Entry, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
        """See `TensorStore`; what is returned lies in the buffer."""
        rows = entry.read_rows(start, stop, buffer)
        return rows.view(_WEIGHT_DTYPES[entry.dtype]).view(stop - start, *entry.shape[1:])

    def read_number(self, entry: Entry) -> float:
        """Read a tensor of one element."""
        self.check_loadable(entry)
        if math.prod(entry.shape) != 1:
            raise CheckpointError(
                entry.file.name, f"has shape {list(entry.shape)}; one number is supported", entry.name
            )
        raw = bytearray(entry.file.read(entry.offset, entry.num_bytes, entry.name))
        return float(torch.frombuffer(raw, dtype=_WEIGHT_DTYPES[entry.dtype])[0])


def open_safetensors(folder: Path) -> SafetensorsStore:
    """Open a folder's `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        CheckpointError: there are none, or a file or its table is damaged or hostile.
    """
    if (folder / SINGLE).exists():
        return SafetensorsStore(SINGLE, read_table(ByteFile(child(folder, SINGLE))))
    if not (folder / INDEX).exists():
        raise CheckpointError(folder.name, f"has neither {SINGLE} nor {INDEX}")
    weight_map = read_json(child(folder, INDEX), MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(INDEX, "weight_map must be an object of tensor name to file name")
    shards = sorted(set(weight_map.values()))
    if not 1 <= len(shards) <= MAX_SHARDS:
        raise CheckpointError(INDEX, f"names {len(shards)} files; 1 to {MAX_SHARDS} are accepted")
    entries: dict[str, Entry] = {}
    for shard in shards:
        if not shard.endswith(".safetensors"):
            raise CheckpointError(INDEX, f"names {shard[:200]!r}, which is not a .safetensors file")
        for name, entry in read_table(ByteFile(child(folder, shard))).items():
            # This also refuses a tensor that is in two shards: the index can name only one of them.
            if weight_map.get(name) != shard:
                listed = weight_map.get(name, "no file")
                raise CheckpointError(shard, f"is here; {INDEX} has it in {listed[:200]!r}", name)
            entries[name] = entry
    absent = next((name for name in weight_map if name not in entries), None)
    if absent is not None:
        raise CheckpointError(weight_map[absent], f"is listed in {INDEX} and not there", absent[:200])
    return SafetensorsStore(INDEX, entries)


def read_table(file: ByteFile) -> dict[str, Entry]:
    """Read and check one file's table: tensors that cover the data exactly, without overlap or hole.

    Raises:
        CheckpointError: the table is damaged or hostile; names the tensor where there is one.
    """
    header_bytes = int.from_bytes(file.read(0, 8), "little")
    limit = min(MAX_HEADER_BYTES, file.size - 8)
    if not 2 <= header_bytes <= limit:
        raise CheckpointError(file.name, f"header of {header_bytes} bytes; 2 to {limit} are possible")
    header = parse_json(file.read(8, header_bytes), file.name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(file.name, "__metadata__ must be an object of strings")
    start = 8 + header_bytes
    entries = {name: _entry(name, fields, file, start) for name, fields in header.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            raise CheckpointError(
                file.name, f"{fault}: it begins at {entry.offset - start}, not {end - start}", entry.name
            )
        end += entry.num_bytes
    if end != file.size:
        raise CheckpointError(file.name, f"has {file.size} bytes where its table says {end}")
    return entries


def _entry(name: str, fields: Any, file: ByteFile, start: int) -> Entry:
    def error(reason: str) -> CheckpointError:
        return CheckpointError(file.name, reason, name[:200])

    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise error("its entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise error(f"dtype {str(dtype)[:40]!r} is not one of {', '.join(_DTYPE_BYTES)}")
    if not (isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 1 <= n < 1 << 48 for n in shape)):
        raise error(f"shape {str(shape)[:80]} is not a list of at most 8 positive sizes")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)):
        raise error(f"data_offsets {str(offsets)[:80]} are not two byte positions")
    begin, end = offsets
    if begin > end or end > file.size - start:
        raise error(f"bytes {begin} to {end} lie outside the file's {file.size - start} bytes of data")
    needed = math.prod(shape) * _DTYPE_BYTES[dtype]
    if end - begin != needed:
        raise error(f"has {end - begin} bytes where {dtype} {shape} needs {needed}")
    return Entry(name, tuple(shape), dtype, file, start + begin, needed)
