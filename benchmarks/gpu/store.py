"""This module holds a run's results as one JSON file, whole at every moment, and what of an earlier run still counts.
It does not know what is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

__all__ = ["BAD", "FINAL", "Store", "source_hash"]

FINAL: Final = ("passed", "failed", "measured", "predicted")
"""Outcomes that the same sources would have again; all others are tried again."""
BAD: Final = ("failed", "crashed", "timed out")
SAVE_EVERY_S: Final = 0.5
"""A test may take a millisecond: writing the file after each would take longer than the tests."""


def source_hash(root: Path, folders: Iterable[str]) -> str:
    """Return a name for the sources, and the tuned tables among them, as they are."""
    found, kinds = hashlib.sha256(), ("*.py", "tuned/*.json")
    for path in sorted(path for folder in folders for kind in kinds for path in (root / folder).rglob(kind)):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


class Store:
    """`{"run": {...}, "sections": {section: {"status", "reason", "level", "seconds", "cases": {case: {...}}}}}`.

    Args:
        path: the file.
        run: what this run is; its `identity` decides whether an earlier run's results still count.
        resume: whether to take over what the file has; it is put aside where nothing of it counts.
        by_level: sections in which a case of another `level` of run is kept, but is no reason not to run it.
    """

    def __init__(self, path: Path, run: dict[str, Any], *, resume: bool = False, by_level: Iterable[str] = ()) -> None:
        self._path, self._lock, self._saved = path, threading.Lock(), 0.0
        self._level, self._by_level = run["level"], frozenset(by_level)
        self.put_aside: Path | None = None
        """Where the results are that were to be taken over and do not count."""
        self.data: dict[str, Any] = {"run": run, "sections": {}}
        if resume and path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if earlier["run"]["identity"] == run["identity"]:
                parts = earlier["sections"].items()
                self.data["sections"] = {name: _what_counts(part, self._level) for name, part in parts}
            else:
                self.put_aside = path.with_name(f"{path.stem}-{earlier['run']['started'].replace(':', '')}.json")
                path.replace(self.put_aside)
        self.save()

    def cases(self, section: str) -> dict[str, dict[str, Any]]:
        """Return a section's cases."""
        found: dict[str, dict[str, Any]] = self._section(section)["cases"]
        return found

    def _section(self, section: str) -> dict[str, Any]:
        blank = {"status": "not run", "reason": None, "level": self._level, "seconds": 0.0, "cases": {}}
        part: dict[str, Any] = self.data["sections"].setdefault(section, blank)
        return part

    def finished(self, section: str) -> list[str]:
        """Return the cases that need not be run again."""
        return [
            name
            for name, facts in self.cases(section).items()
            if facts["status"] in FINAL and facts.get("level", self._level) == self._level
        ]

    def add(self, section: str, case: str, facts: dict[str, Any]) -> None:
        """Enter one case; the file has it at once, or within half a second where cases are many."""
        with self._lock:
            self.cases(section)[case] = facts | ({"level": self._level} if section in self._by_level else {})
            if facts["status"] != "passed" or time.monotonic() - self._saved > SAVE_EVERY_S:
                self._write()

    def is_done(self, section: str) -> bool:
        """Whether an earlier run has finished a section, so that nothing is left of it."""
        return bool(self._section(section)["status"] == "done")

    def close(self, section: str, status: str, reason: str | None, seconds: float) -> None:
        """Enter how a section ended; its time adds up over resumed runs."""
        with self._lock:
            part = self._section(section)
            part |= {"status": status, "reason": reason, "level": self._level}
            part["seconds"] = round(part["seconds"] + seconds, 1)
            self._write()

    def save(self) -> None:
        """Write the file."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self._path)
        self._saved = time.monotonic()

    @property
    def num_bad(self) -> int:
        """How many cases of all sections went wrong."""
        return sum(
            facts["status"] in BAD for part in self.data["sections"].values() for facts in part["cases"].values()
        )


def _what_counts(part: dict[str, Any], level: str) -> dict[str, Any]:
    cases = part["cases"].values()
    lacks = any(str(facts.get("reason")).startswith("needs the package") for facts in cases)  # which may be there now
    is_whole = not lacks and not any(facts["status"] in ("crashed", "timed out") for facts in cases)
    if (part["status"], part["level"]) == ("done", level) and is_whole:
        return part
    kept = {name: facts for name, facts in part["cases"].items() if facts["status"] in FINAL}
    return part | {"status": "not run", "reason": None, "cases": kept}
