"""This module holds a cost model that is fitted to measured steps. It does not know how they were measured.

The seconds of a step are a sum of what it costs at all, and so much for each token, sequence and token of KV; no part
may be negative, or a model would make some steps free that it has never seen. The fit is least squares under that
condition (Lawson & Hanson 1974, chapter 23), found by trying all sets of parts, of which there are few.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError, describe
from ...events import EventKind
from ...observe.recording import Recording, loads
from ...strict_json import parse_json
from ..profile.history import STEP
from ..report import quantity
from ..roofline import StepWork

__all__ = ["PARTS", "LinearCost", "MeasuredStep", "fit_cost", "measured_steps", "read_cost", "write_cost"]

PARTS = ("step", *StepWork._fields)
WORDS = ("step", "token", "sampled token", "sequence", "token of KV read", "pair of tokens that attend")
VERSION = 1
MIN_STEPS = 20


class MeasuredStep(NamedTuple):
    """A step and what it took."""

    work: StepWork
    seconds: float


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of a step as a sum over its parts."""

    seconds: tuple[float, ...]
    """By `PARTS`."""
    num_steps: int = 0
    """It was fitted to."""
    error: float = 0.0
    """Mean size of the error of a step there, relative to the mean step."""

    def step_s(self, work: StepWork) -> float:
        """Return the seconds of one step."""
        each, (tokens, sampled, seqs, read, pairs) = self.seconds, work
        return each[0] + each[1] * tokens + each[2] * sampled + each[3] * seqs + each[4] * read + each[5] * pairs

    def to_json(self) -> dict[str, Any]:
        """Return what `read_cost` reads."""
        seconds = dict(zip(PARTS, self.seconds, strict=True))
        return {"octavo_cost": VERSION, "seconds": seconds, "num_steps": self.num_steps, "error": self.error}

    def __str__(self) -> str:
        parts = zip(WORDS, self.seconds, strict=True)
        text = " + ".join(f"{quantity(each, 's')} per {word}" for word, each in parts if each)
        if not self.num_steps:
            return text
        return f"{text}; fitted to {self.num_steps:,} measured steps, off by {self.error:.0%} of a step on average"


def fit_cost(steps: Sequence[MeasuredStep]) -> LinearCost:
    """Fit a cost model to measured steps.

    Steps count by the inverse of the square root of their time, between equal in seconds, where a few long prompts
    would decide, and equal in percent, where thousands of decode steps would.

    Raises:
        ConfigError: there are too few.
    """
    if len(steps) < MIN_STEPS:
        raise ConfigError(f"a cost model is fitted to at least {MIN_STEPS} steps; here are {len(steps)}")
    works = np.array([(1, *step.work) for step in steps], dtype=np.float64)
    taken = np.array([step.seconds for step in steps])
    weights = np.maximum(taken, 1e-9) ** -0.5
    seconds = _not_negative(works * weights[:, None], taken * weights)
    error = float(np.abs(works @ seconds - taken).mean() / taken.mean())
    return LinearCost(tuple(seconds.tolist()), len(steps), error)


def _not_negative(columns: npt.NDArray[np.float64], goal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the x >= 0 that minimises |columns x - goal|: the best of the plain fits on all sets of columns."""
    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0] = 1.0
    num = columns.shape[1]
    best, least = np.zeros(num), float(goal @ goal)
    for size in range(1, num + 1):
        for chosen in combinations(range(num), size):
            part = columns[:, chosen] / scale[list(chosen)]
            x = np.linalg.lstsq(part, goal, rcond=None)[0]
            rest = goal - part @ x
            if (x >= 0).all() and float(rest @ rest) < least * (1 - 1e-9):
                least = float(rest @ rest)
                best = np.zeros(num)
                best[list(chosen)] = x / scale[list(chosen)]
    return best


def measured_steps(recording: Recording) -> list[MeasuredStep]:
    """Return the steps of a recording with the time until the next began, or where nothing was left to run, until
    their news was ready and as long after it as usual.

    A step that was scheduled while another ran begins when that one was over. Steps with rows whose beginning is not in
    the recording are left out.
    """
    admitted: dict[int, list[tuple[int, int]]] = {}
    for event in recording.ring.events:
        if event.kind == EventKind.ADMITTED:
            admitted.setdefault(event.step, []).append((event.row, event.num_cached_tokens))
    computed: dict[int, int] = {}
    works: list[StepWork | None] = []
    steps = list(recording.ring.steps)
    for step in steps:
        computed |= dict(admitted.get(step.step, ()))
        rows, counts = step.rows.tolist(), step.num_scheduled_tokens.tolist()
        known = all(row in computed for row in rows) and not step.failed
        pairs = [(count, computed.get(row, 0) + count) for row, count in zip(rows, counts, strict=True)]
        works.append(StepWork.of(pairs, len(step.sampled)) if known else None)
        computed |= {row: end for row, (_, end) in zip(rows, pairs, strict=True) if row in computed}
    ends_s = [0.0, *(step.end_s for step in steps)]
    begin_s = [max(step.start_s, before_s) for step, before_s in zip(steps, ends_s, strict=False)]
    after: list[float | None] = []
    for place, (step, following) in enumerate(zip(steps, [*steps[1:], None], strict=False)):
        new = {row for row, _ in admitted.get(following.step, ())} if following else set()
        goes_on = following is not None and set(following.rows.tolist()) & set(step.rows.tolist()) - new
        after.append(begin_s[place + 1] - step.end_s if goes_on else None)
    usual = float(np.median([each for each in after if each is not None] or [0.0]))
    return [
        MeasuredStep(work, step.end_s - begin + (usual if gap is None else gap))
        for step, work, begin, gap in zip(steps, works, begin_s, after, strict=True)
        if work is not None
    ]


def read_cost(file: Path) -> LinearCost:
    """Read a cost model, or fit one to a recording or to what `octavo profile step --json` has written.

    Raises:
        ConfigError: the file is none of these.
    """
    try:
        text = file.read_text(encoding="utf-8")
        document = parse_json(text)
    except OSError as error:
        raise ConfigError(f"--cost {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--cost {file}: {error}") from None
    if isinstance(document, dict) and "octavo_recording" in document:
        return fit_cost(measured_steps(loads(text)))
    try:
        if isinstance(document, dict) and document.get("format") == STEP:
            return fit_cost([_timed(step) for step in document["steps"]])
        if document["octavo_cost"] != VERSION:
            raise ValueError
        seconds = [float(document["seconds"][name]) for name in PARTS]
        if not all(0 <= each < float("inf") for each in seconds) or not any(seconds):
            raise ValueError
        return LinearCost(tuple(seconds), int(document.get("num_steps", 0)), float(document.get("error", 0.0)))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"--cost {file} is {describe(document)}; allowed: a recording of octavo serve, JSON of octavo "
            "profile step, or what --save-cost wrote"
        ) from None


def _timed(step: Any) -> MeasuredStep:
    return MeasuredStep(StepWork(*(int(step[name]) for name in StepWork._fields)), float(step["seconds"]))


def write_cost(file: Path, cost: LinearCost) -> None:
    """Write what `read_cost` reads."""
    file.write_text(json.dumps(cost.to_json(), indent=1) + "\n", encoding="utf-8")
