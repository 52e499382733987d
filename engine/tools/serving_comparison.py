"""This module holds the comparison of two loads on servers. It does not know how either was run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from .bench.comparison import Difference, difference_lines, of_repeats, of_samples, read_saved
from .serving_result import METRICS, PerRequest

__all__ = ["comparison_lines", "differences", "matching_result", "read_results"]

CAPTION = "intervals: from drawing each run's requests anew; what else differs between two runs they cannot show"
RATES = ("request_throughput", "output_throughput", "total_token_throughput")


def read_results(file: Path) -> list[dict[str, Any]]:
    """Read the results that were saved in a file, ours or vLLM's with its raw values.

    Raises:
        ConfigError: it holds none.
    """
    verb = "bench serve with its raw values"
    results = read_saved(file, verb, "request_rate", *RATES)
    try:
        for result in results:
            PerRequest.of(result)
            _settings(result)
            for name in RATES:
                float(result[name])
    except (ValueError, KeyError, TypeError) as error:
        missing = f" (without {error})" if isinstance(error, KeyError) else ""
        raise ConfigError(f"--compare {file}: is no result of {verb}{missing}") from None
    return results


def matching_result(result: Mapping[str, Any], olds: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the old result of the same rate and concurrency, or None."""
    return next((old for old in olds if _settings(old) == _settings(result)), None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, seed: int = 0) -> Iterator[Difference]:
    """Yield every figure that both runs have.

    Args:
        old, new: results.
        seed: of the drawing.
    """
    for name in RATES:
        if old[name]:
            yield of_repeats(name, [old[name]], [new[name]])
    rng = np.random.default_rng(seed)
    all_old, all_new = PerRequest.of(old), PerRequest.of(new)
    for name in METRICS:
        yield from of_samples(name, getattr(all_old, name), getattr(all_new, name), rng)


def comparison_lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return old and new figures side by side, as a table."""
    return difference_lines(differences(old, new), CAPTION)


def _settings(result: Mapping[str, Any]) -> tuple[Any, Any]:
    rate = result["request_rate"]
    return (float(rate), result.get("max_concurrency"))
