"""This module holds the flags of `octavo plan` besides the engine's settings. It does not know what is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, describe
from .outputs import check_output

__all__ = ["PlanOptions", "numbers"]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Where a model would run, and what to predict.

    Raises:
        ConfigError: a value is not allowed.
    """

    gpu: str = "cpu"
    """A card by name (h100, a100, l40s, 4090, ...; a wrong name lists all), a name with changes (h100,memory=40GiB), or
    memory=24GiB,bandwidth=1TB/s,flops=160TFLOP/s of any other; cpu is this machine's, measured."""
    context: list[str] | None = None
    """Lengths to predict, as in 2048,32768; not given: some, and the longest there is room for."""
    batch: list[str] | None = None
    """Sequences that decode together, to predict; not given: some, and the most that run."""
    json: Path | None = None
    """Write everything there as JSON too; - is stdout, and then the only thing there."""

    def __post_init__(self) -> None:
        check_output("--json", self.json)


def numbers(flag: str, words: Sequence[str] | None) -> list[int] | None:
    """Return the numbers of a flag that is given several times, or once with commas; None where it is not given.

    Raises:
        ConfigError: one is no integer above 0.
    """
    if words is None:
        return None
    found = ",".join(words).split(",")
    for word in found:
        if not word.strip().isdecimal() or not 0 < int(word) < 2**31:
            raise ConfigError(f"{flag} is {describe(word)}; allowed: integers above 0, with commas between")
    return [int(word) for word in found]
