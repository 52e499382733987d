"""This module holds launch settings that were measured to beat the launchers' own choice. It does not know how they are
measured, which is for `scripts/tune.py`.

A table is a file per architecture, `kernels/tuned/sm_90.json`: `{"arch": 90, "entries": {key: {"settings": {...},
"measured": {...}}}}`. A key is a kernel with its geometry, "decode head_dim=128 dtype=bfloat16 cache_bits=16": a
model's, never a batch's, for settings decide in which order a row is summed, and its bits must not depend on its
neighbours. What has no entry keeps the launcher's choice; nothing is tuned while serving.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

__all__ = ["FOLDER", "MEASURED", "SETTINGS", "key", "read_table", "trying", "tuned"]

FOLDER: Final = Path(__file__).parents[1] / "tuned"
SETTINGS: Final[dict[str, dict[str, tuple[int, ...]]]] = {
    # Tiles of 16 and of 32 rows sum alike only over more keys than rows.
    "decode": {"block_n": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4), "programs_per_sm": (1, 2, 3, 4)},
    "prefill": {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
}
"""Kernel -> what an entry says, all of it, and the values that the kernel can be launched with."""
MEASURED: Final = ("command", "gpu", "date", "versions", "us", "default_us")
"""What an entry says of how it was found."""
_GEOMETRY: Final = r"head_dim=\d+ dtype=(bfloat16|float16) cache_bits=(8|16)"
_KEYS: Final = {"decode": f"decode {_GEOMETRY}", "prefill": f"prefill {_GEOMETRY} plain=(True|False)"}

Table = dict[str, dict[str, Any]]
_trying: dict[str, Mapping[str, int]] = {}


def key(kernel: str, **geometry: object) -> str:
    """Return an entry's key."""
    return " ".join([kernel, *(f"{name}={str(value).removeprefix('torch.')}" for name, value in geometry.items())])


@functools.cache
def tuned(
    kernel: str, arch: int, *, head_dim: int, dtype: torch.dtype, quantised: bool, **more: bool
) -> Mapping[str, int]:
    """Return the settings to be put in place of the launcher's own; none where nothing was measured.

    Raises:
        ValueError: the architecture's table is damaged.
    """
    name = key(kernel, head_dim=head_dim, dtype=dtype, cache_bits=8 if quantised else 16, **more)
    if name in _trying:
        return _trying[name]
    path = FOLDER / f"sm_{arch}.json"
    entries = read_table(path) if path.exists() else {}
    settings: dict[str, int] = entries[name]["settings"] if name in entries else {}
    return settings


@contextmanager
def trying(name: str, settings: Mapping[str, int]) -> Iterator[None]:
    """Let an entry be what is said here until the end of the `with` statement."""
    _trying[name] = settings
    tuned.cache_clear()
    try:
        yield
    finally:
        del _trying[name]
        tuned.cache_clear()


def read_table(path: Path) -> Table:
    """Return a table's entries.

    Raises:
        ValueError: names the file, the entry and what is wrong with it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    entries = data.get("entries") if isinstance(data, dict) else None
    if not isinstance(entries, dict) or f"sm_{data.get('arch')}" != path.stem:
        raise ValueError(f"{path}: no table; it must have arch, that of the file's name, and entries")
    for name, entry in entries.items():
        kernel = name.partition(" ")[0]
        if not re.fullmatch(_KEYS.get(kernel, "(?!)"), name):
            raise ValueError(f"{path}: unknown entry {name!r}; known: {', '.join(_KEYS.values())}")
        settings = entry.get("settings") if isinstance(entry, dict) else None
        allowed = SETTINGS[kernel]
        if not isinstance(settings, dict) or settings.keys() != allowed.keys():
            raise ValueError(f"{path}: entry {name!r} must have the settings {', '.join(allowed)}, and only these")
        for setting, value in settings.items():
            if type(value) is not int or value not in allowed[setting]:
                raise ValueError(f"{path}: entry {name!r}: {setting} is {value!r}; allowed: {allowed[setting]}")
        measured = entry.get("measured")
        if not isinstance(measured, dict) or not measured.keys() >= set(MEASURED):
            raise ValueError(f"{path}: entry {name!r} must say how it was measured: {', '.join(MEASURED)}")
    return dict(entries)
