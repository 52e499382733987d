"""This module holds how a process tells of its cases: one line of JSON each, written as soon as it is known, so that a
crash loses one case. It does not know what a case does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["POISONED", "Lines", "NotRunError", "StartError", "missing_package"]

POISONED = 70
"""Exit status of a process that an error has left without the use of its GPU: the cases left want a fresh one."""


_MISSING = re.compile(r"ModuleNotFoundError: No module named '(?!octavo|tests|gpu)([\w.]+)'")


def missing_package(text: str) -> str | None:
    """Return the package for want of which something could not run, from what it printed."""
    found = _MISSING.search(text)
    return found[1] if found else None


class NotRunError(Exception):
    """A case that cannot be run here; says why."""


class StartError(Exception):
    """What cases share does not start: to try it again for each of them would take minutes.

    Args:
        cases: the names of all that share it.
    """

    def __init__(self, cases: Iterable[str]) -> None:
        super().__init__("what this case runs on does not start")
        self.cases = frozenset(cases)


class Lines:
    """Writes a case's beginning and its outcome: a dictionary with a `status`."""

    def __init__(self, path: Path | None, skip: Iterable[str] = ()) -> None:
        self._file = path.open("a", encoding="utf-8") if path else sys.stdout
        self._skip, self._left = frozenset(skip), set[str]()

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the options that `from_options` reads."""
        parser.add_argument("--lines", type=Path, help="append results there (default: standard output)")
        parser.add_argument("--skip", type=Path, help="a JSON list of cases to leave out")

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> Lines:
        """Return what the command line asks for."""
        return cls(args.lines, json.loads(args.skip.read_text(encoding="utf-8")) if args.skip else ())

    def write(self, **line: Any) -> None:
        """Write one line, at once."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def plan(self, names: Iterable[str]) -> list[str]:
        """Say which cases there will be; return those that are not to be left out."""
        left = [name for name in names if name not in self._skip]
        self._left = set(left)
        self.write(plan=left)
        return left

    def run(self, cases: dict[str, Callable[[], dict[str, Any]]]) -> None:
        """Run each case and write what it returns; its exceptions are its outcome."""
        left_out: set[str] = set()
        for name in self.plan(cases):
            if name in left_out:
                continue
            self.write(case=name, status="started")
            try:
                facts = {"status": "passed"} | cases[name]()
            except NotRunError as error:
                facts = {"status": "not run", "reason": str(error)}
            except AssertionError as error:
                facts = {"status": "failed", "reason": str(error) or traceback.format_exc(limit=-3)}
            except Exception as error:
                facts = {"status": "failed", "reason": traceback.format_exc(limit=-6)}
                if type(error).__name__ == "OutOfMemoryError":  # torch's; without importing it here
                    facts = {"status": "not run", "reason": f"out of GPU memory: {error}"}
                if isinstance(error, StartError):
                    left_out |= error.cases - {name}
            self.write(case=name, **facts)
            for other in left_out & self._left:
                self.write(case=other, status="not run", reason=f"what it runs on did not start for {name}")
            self._left -= {name, *left_out}
            if is_poisoned():
                sys.exit(POISONED)


def is_poisoned() -> bool:
    """Whether this process can no longer use its GPU.

    A call that is tried and cannot be captured as a graph is no error of a case; but torch 2.11 takes the capture to
    go on, and raises whenever memory is given back.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False
