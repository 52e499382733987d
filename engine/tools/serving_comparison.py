"""This module holds the comparison of two loads on servers: relative changes with bootstrap intervals. It does not know
how either was run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .serving_result import METRICS, PerRequest

__all__ = ["Difference", "comparison_lines", "differences", "matching_result", "read_results"]

NUM_RESAMPLES = 2000
NUM_BLOCKS = 24
"""Requests that run together are slow together. So they are drawn in blocks of neighbours, not one by one."""
CAPTION = "intervals: from drawing each run's requests anew; what else differs between two runs they cannot show"
RATES = ("request_throughput", "output_throughput", "total_token_throughput")


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


def read_results(file: Path) -> list[dict[str, Any]]:
    """Read the results that were saved in a file, ours or vLLM's with its raw values.

    Raises:
        ConfigError: it holds none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        results = content if isinstance(content, list) else [content]
        for result in results:
            PerRequest.of(result)
            _settings(result)
            for name in RATES:
                float(result[name])
    except OSError as error:
        raise ConfigError(f"--compare {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        missing = f" (without {error})" if isinstance(error, KeyError) else ""
        raise ConfigError(f"--compare {file}: is no result of bench serve with its raw values{missing}") from None
    return results


def matching_result(result: Mapping[str, Any], olds: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the old result of the same rate and concurrency, or None."""
    return next((old for old in olds if _settings(old) == _settings(result)), None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, seed: int = 0) -> Iterator[Difference]:
    """Yield every figure that both runs have.

    Intervals come from drawing blocks of requests anew, 2,000 times: times of one request, and of those beside it, are
    not independent of each other.

    Args:
        old, new: results.
        seed: of the drawing.
    """
    for name in RATES:
        if old[name]:
            yield Difference(name, old[name], new[name], None, None)
    rng = np.random.default_rng(seed)
    all_old, all_new = PerRequest.of(old), PerRequest.of(new)
    for name in METRICS:
        ours = [_Resampled(getattr(each, name), rng) for each in (all_old, all_new)]
        for place, statistic in enumerate(("mean", "median")):
            before, after = (each.statistics[place] for each in ours)
            if before > 0 and after > 0:
                ratios = ours[1].draws[:, place] / ours[0].draws[:, place] - 1
                low, high = np.nanpercentile(ratios, (2.5, 97.5)).tolist()
                yield Difference(f"{statistic}_{name}_ms", before * 1000, after * 1000, low, high)


def comparison_lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return old and new figures side by side, as a table."""
    lines = [f"{'':<24}{'old':>11}{'new':>11}{'change':>9}   95 % interval"]
    for each in differences(old, new):
        line = f"{each.name:<24}{each.old:>11.2f}{each.new:>11.2f}{each.change:>+9.1%}"
        if each.low is not None and each.high is not None:
            line += f"   {each.low:+.1%} to {each.high:+.1%}: {each.verdict}"
        lines.append(line)
    return [*lines, CAPTION]


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


def _settings(result: Mapping[str, Any]) -> tuple[Any, Any]:
    rate = result["request_rate"]
    return (float(rate), result.get("max_concurrency"))
