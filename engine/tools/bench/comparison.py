"""This module holds the comparison of two measurements: relative changes with intervals, and what they let one say. It
does not know what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError

__all__ = ["Difference", "check_comparable", "difference_lines", "of_repeats", "of_samples", "read_saved"]

NUM_RESAMPLES = 2000
NUM_BLOCKS = 24
"""Requests that run together are slow together. So they are drawn in blocks of neighbours, not one by one."""
CONFIDENCE = 0.95
_NUM_ANGLES = 20_000


class Difference(NamedTuple):
    """One figure of two runs."""

    name: str
    old: float
    new: float
    low: float | None
    """95 % interval of new / old - 1; None: one value per run, so there is none."""
    high: float | None

    @property
    def change(self) -> float:
        """new / old - 1."""
        return self.new / self.old - 1

    @property
    def verdict(self) -> str:
        """What the interval says, in words."""
        if self.low is None or self.high is None:
            return ""
        return "no difference seen" if self.low <= 0 <= self.high else "lower" if self.high < 0 else "higher"


def of_repeats(name: str, old: Sequence[float], new: Sequence[float]) -> Difference:
    """Compare a figure that was measured again and again: geometric means, and Welch's t interval of their ratio.

    Repeats of a whole run are few and vary in proportion to their size, so their logarithms are compared. Degrees of
    freedom: B. L. Welch, Biometrika 34 (1947).

    Args:
        name: of the figure.
        old, new: its values in each run, all above 0; one alone gives no interval.
    """
    logs = [np.log(np.asarray(values, dtype=np.float64)) for values in (old, new)]
    before, after = (float(each.mean()) for each in logs)
    change = after - before
    low: float | None = None
    high: float | None = None
    if min(len(old), len(new)) > 1:
        parts = [float(each.var(ddof=1)) / len(each) for each in logs]
        spread, share = sum(parts), sum(part**2 / (len(each) - 1) for part, each in zip(parts, logs, strict=True))
        reach = t_quantile(spread**2 / share) * math.sqrt(spread) if share else 0.0
        low, high = math.expm1(change - reach), math.expm1(change + reach)
    return Difference(name, math.exp(before), math.exp(after), low, high)


def of_samples(
    name: str, old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], rng: np.random.Generator
) -> Iterator[Difference]:
    """Compare times of single requests: mean and median, with bootstrap intervals; nothing where a run has none.

    Intervals come from drawing blocks of requests anew, 2,000 times: times of one request, and of those beside it, are
    not independent of each other.

    Args:
        name: of the figure.
        old, new: seconds, one list for each request, in order of arrival.
        rng: draws.
    """
    ours = [_Resampled(values, rng) for values in (old, new)]
    for place, statistic in enumerate(("mean", "median")):
        before, after = (each.statistics[place] for each in ours)
        if before > 0 and after > 0:
            ratios = ours[1].draws[:, place] / ours[0].draws[:, place] - 1
            low, high = np.nanpercentile(ratios, (50 - 50 * CONFIDENCE, 50 + 50 * CONFIDENCE)).tolist()
            yield Difference(f"{statistic}_{name}_ms", before * 1000, after * 1000, low, high)


def difference_lines(differences: Iterable[Difference], caption: str) -> list[str]:
    """Return old and new figures side by side, as a table."""
    rows = list(differences)
    width = max([23, *(len(each.name) for each in rows)]) + 1
    lines = [f"{'':<{width}}{'old':>11}{'new':>11}{'change':>9}   95 % interval"]
    for each in rows:
        line = f"{each.name:<{width}}{each.old:>11.2f}{each.new:>11.2f}{each.change:>+9.1%}"
        if each.low is not None and each.high is not None:
            line += f"   {each.low:+.1%} to {each.high:+.1%}: {each.verdict}"
        lines.append(line)
    return [*lines, caption]


def read_saved(file: Path, verb: str, *required: str) -> list[dict[str, Any]]:
    """Read the results that were saved in a file, one or a list of them.

    Args:
        file: to read.
        verb: whose results they should be, for the message.
        required: the keys that every one has.

    Raises:
        ConfigError: it holds none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--compare {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"--compare {file}: is no JSON") from None
    results = content if isinstance(content, list) else [content]
    if not results:
        raise ConfigError(f"--compare {file}: is no result of {verb} (an empty list)")
    for result in results:
        missing = [key for key in required if not isinstance(result, dict) or key not in result]
        if missing:
            raise ConfigError(f"--compare {file}: is no result of {verb} (without {', '.join(missing)})")
    return results


def check_comparable(
    file: Path,
    result: Mapping[str, Any],
    compare: Callable[[Mapping[str, Any], Mapping[str, Any]], Iterable[Difference]],
) -> None:
    """Refuse a saved result that nothing can be compared with.

    Args:
        file: that it is from, for the message.
        result: as `read_saved` returns it.
        compare: old and new result -> their differences.

    Raises:
        ConfigError: a figure is missing, is none, or is not above 0.
    """
    try:
        tables = [result.get(name, {}) for name in ("workload", "machine", "engine")]
        with np.errstate(all="ignore"):
            is_good = all(isinstance(table, dict) for table in tables) and all(
                math.isfinite(each.old) and each.old > 0 for each in compare(result, result)
            )
    except (AttributeError, KeyError, TypeError, ValueError):
        is_good = False
    if not is_good:
        raise ConfigError(f"--compare {file}: is a damaged result: a figure is missing or is no number above 0")


def t_quantile(degrees: float) -> float:
    """Return Student's t that 95 % of the distribution lie below in size.

    With t = sqrt(degrees) tan(angle) the density of the angle is cos(angle) ** (degrees - 1), which is summed up.
    """
    angles = (np.arange(_NUM_ANGLES) + 0.5) * (np.pi / 2 / _NUM_ANGLES)
    mass = np.cumsum(np.cos(angles) ** (degrees - 1))
    angle = np.interp(CONFIDENCE * mass[-1], mass, angles + np.pi / 4 / _NUM_ANGLES)
    return float(math.sqrt(degrees) * math.tan(angle))


class _Resampled:
    """Mean and median of one metric, and the same of requests drawn anew.

    Args:
        values: one list per request, in order of arrival.
        rng: draws.
    """

    def __init__(self, values: Sequence[Sequence[float]], rng: np.random.Generator) -> None:
        flat = np.concatenate([np.asarray(each, dtype=np.float64) for each in (*values, ())])
        num = min(NUM_BLOCKS, len(values))
        owner = np.repeat(np.arange(len(values)) * num // max(len(values), 1), [len(each) for each in values])
        order = np.argsort(flat, kind="stable")
        self._sorted, self._owner = flat[order], owner[order]
        self.statistics = (float(flat.mean()), float(np.median(flat))) if len(flat) else (0.0, 0.0)
        """Mean and median."""
        num_draws = NUM_RESAMPLES if len(flat) else 0
        drawn = [self._drawn(rng.multinomial(num, np.full(num, 1 / num))) for _ in range(num_draws)]
        self.draws: npt.NDArray[np.float64] = np.array(drawn, dtype=np.float64).reshape(-1, 2)
        """[num_resamples, 2] their means and medians."""

    def _drawn(self, times: npt.NDArray[np.int64]) -> tuple[float, float]:
        """Return mean and median where each block counts so many times."""
        weights = times[self._owner]
        below = np.cumsum(weights)
        total = int(below[-1])
        if total == 0:
            return float("nan"), float("nan")
        low, high = np.searchsorted(below, ((total - 1) // 2, total // 2), side="right")
        return float(weights @ self._sorted) / total, float(self._sorted[low] + self._sorted[high]) / 2
