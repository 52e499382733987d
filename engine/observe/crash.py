"""This module holds what is left behind when an engine dies: a file of metadata. It does not know prompts, texts, token
ids or keys, so none can be in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ..events import KVSnapshot
from .recording import snapshot_json, to_json
from .ring import EventRing

__all__ = ["write_bundle"]

PACKAGES = ("octavo", "torch", "triton", "numpy", "tokenizers")

log = logging.getLogger(__name__)


def write_bundle(
    folder: str | Path,
    ring: EventRing,
    info: Mapping[str, Any],
    error: BaseException | str,
    *,
    snapshot: KVSnapshot | None = None,
) -> Path | None:
    """Write a crash bundle: the error, versions, the engine's facts, and the latest steps and events by their lengths.

    It is for its owner's eyes only (mode 0600), and is there completely or not at all.

    Args:
        folder: where; must exist.
        ring: what is known of the run.
        info: facts of model and engine; of them numbers, texts and truth values are kept.
        error: what happened.
        snapshot: who held what, if that is known.

    Returns:
        The file, or None where it could not be written: a full disk is no reason to fail twice.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = Path(folder) / f"octavo-crash-{stamp}-{os.getpid()}.json"
    partial = path.with_suffix(".partial")
    bundle = {
        "octavo_crash": 1,
        "time": stamp,
        "error": _error(error),
        "versions": _versions(),
        "snapshot": None if snapshot is None else snapshot_json(snapshot),
        "recording": to_json(ring, info),
    }
    data = json.dumps(bundle, separators=(",", ":"), default=str).encode()
    try:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as failure:
        with contextlib.suppress(OSError):
            partial.unlink()
        log.error("the crash bundle could not be written: %s", failure.strerror)
        return None
    return path


def _error(error: BaseException | str) -> dict[str, Any]:
    if isinstance(error, str):
        return {"message": error}
    # Places in the code, no values of variables.
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return {"type": type(error).__name__, "message": str(error), "traceback": places}


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
