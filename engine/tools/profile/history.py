"""This module holds runs beside earlier ones: the trend of every figure, and which have become worse. It does not know
what was measured.

A time counts as worse where the 95 % interval of its change since the run before (`of_repeats`) lies above 5 %, and
above what the machine itself has slowed down by, as its yardsticks (copies, a matrix product) say. The last run is also
compared with the first, as many small steps make a large one. A figure that is read, not timed, counts from the first
unit.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..bench.comparison import of_repeats

__all__ = ["KERNELS", "STEP", "Finding", "Run", "Trend", "machine_note", "read_runs", "trends"]

KERNELS, STEP = "octavo profile kernels 1", "octavo profile step 1"
"""What the `format` of a document may be."""

MIN_CHANGE = 0.05
"""Rounds of one run share what disturbs it, so that two runs of the same code differ by more than their intervals say:
up to 3 % where other processes worked beside them."""


@dataclass(frozen=True, slots=True)
class Run:
    """One document and where it came from."""

    name: str
    document: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> {"unit", "kind": "timed" or "exact", "values": one for each round}."""
        metrics: Mapping[str, Mapping[str, Any]] = self.document["metrics"]
        return metrics

    @property
    def slowness(self) -> float:
        """The seconds of the yardsticks, as one geometric mean; 1 where nothing was timed."""
        yardsticks = self.document.get("yardsticks_s") or {}
        return statistics.geometric_mean([statistics.median(each) for each in yardsticks.values()] or [1.0])


@dataclass(frozen=True, slots=True)
class Finding:
    """A figure that is worse than in the run before."""

    metric: str
    at: int
    """Index of the run."""
    before: str
    """Name of the one that it is compared with."""
    old: float
    new: float
    low: float | None
    """Of the interval of the change; None: a figure that is read."""
    high: float | None


@dataclass(frozen=True, slots=True)
class Trend:
    """One figure over the runs that have it."""

    metric: str
    unit: str
    points: tuple[tuple[int, float], ...]
    """(run, median of its rounds)."""
    spread: tuple[tuple[float, float], ...]
    """Least and largest round of each."""
    findings: tuple[Finding, ...]

    @property
    def moves(self) -> bool:
        """Whether it is a time, or a figure that has changed."""
        return self.unit == "s" or len({value for _, value in self.points}) > 1

    @property
    def bad(self) -> set[int]:
        """Indices of the points that are worse than an earlier one."""
        worse = {finding.at for finding in self.findings}
        return {i for i, (at, _) in enumerate(self.points) if at in worse}


def read_runs(files: Sequence[Path], document: Mapping[str, Any]) -> list[Run]:
    """Return earlier runs, in the order given, and this one last.

    Raises:
        ConfigError: a file is no such document, or of something else.
    """
    runs = []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--history {file}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise ConfigError(f"--history {file}: is no JSON") from None
        is_one = isinstance(found, dict) and found.get("format") == document["format"]
        if not is_one or not all(isinstance(found.get(name), dict) for name in ("about", "metrics")):
            raise ConfigError(f"--history {file}: is no JSON of {document['format']}")
        for name, value in document["about"].items():
            if found["about"].get(name) != value:
                other = found["about"].get(name)
                raise ConfigError(f"--history {file}: its {name} is {other}, of this run {value}; they do not compare")
        runs.append(Run(file.stem, found))
    return [*runs, Run("this run", document)]


def machine_note(runs: Sequence[Run]) -> str:
    """Return which runs are of another machine, in words; "" where all are of one."""
    here = runs[-1].document.get("machine")
    others = [run.name for run in runs if run.document.get("machine") != here]
    return f"Drawn but not compared, as timed on another machine: {', '.join(others)}." if others else ""


def trends(runs: Sequence[Run]) -> list[Trend]:
    """Return the trend of every figure that this run has and at least one before it."""
    return [trend for name in runs[-1].metrics if len((trend := _trend(name, runs)).points) > 1]


def _trend(name: str, runs: Sequence[Run]) -> Trend:
    known = [(i, run) for i, run in enumerate(runs) if name in run.metrics]
    values = [run.metrics[name]["values"] for _, run in known]
    pairs = list(pairwise(known))
    if len(known) > 2 and not _compared(name, *pairs[-1]):
        pairs.append((known[0], known[-1]))  # many small steps
    findings = [finding for pair in pairs if (finding := _compared(name, *pair)) is not None]
    return Trend(
        name,
        runs[-1].metrics[name]["unit"],
        tuple((i, statistics.median(each)) for (i, _), each in zip(known, values, strict=True)),
        tuple((min(each), max(each)) for each in values),
        tuple(findings),
    )


def _compared(name: str, earlier: tuple[int, Run], later: tuple[int, Run]) -> Finding | None:
    """Return what has become worse, None where nothing has or where the two do not compare."""
    (_, old), (at, new) = earlier, later
    before, after = old.metrics[name], new.metrics[name]
    if after["kind"] == "exact":
        (was,), (now,) = before["values"], after["values"]
        return Finding(name, at, old.name, was, now, None, None) if now > was else None
    if old.document.get("machine") != new.document.get("machine"):
        return None
    found = of_repeats(name, before["values"], after["values"])
    slower = new.slowness / old.slowness - 1
    if found.low is None or found.low <= max(MIN_CHANGE, slower):
        return None
    return Finding(name, at, old.name, found.old, found.new, found.low, found.high)
