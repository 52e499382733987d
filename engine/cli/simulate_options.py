"""This module holds the flags of `octavo simulate` besides the engine's settings, checked. It does not know what is
done with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, describe
from .outputs import check_output

__all__ = ["SimulateOptions"]


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What to simulate on what.

    Raises:
        ConfigError: a value is not allowed.
    """

    gpu: str | None = None
    """The card: h100, a100, l40s, 4090, ... or memory=24GiB,bandwidth=1TB/s,flops=160TFLOP/s. Steps take what its
    data sheet allows, which is a bound; cpu: what this one is measured to reach."""
    cost: Path | None = None
    """What steps take: a recording of octavo serve or JSON of octavo profile step, to which a model is fitted, or what
    --save-cost has written."""
    save_cost: Path | None = None
    """Write the fitted model there."""
    efficiency: float = 1.0
    """Part of the data sheet's bandwidth and rate that is reached."""
    overhead_us: float = 0.0
    """Microseconds of every step on top of that: launches, scheduling, text."""
    num_prompts: int | None = None
    """Requests; not given: all that the workload has."""
    request_rate: float | None = None
    """Requests per second, in place of the workload's own times; inf: all at once."""
    burstiness: float = 1.0
    """Of those arrivals: 1 is a Poisson process, less comes in bursts, inf is a metronome."""
    seed: int = 0
    """Of those arrivals, and of the order in which conversations come."""
    goodput: list[str] | None = None
    """Count the requests that keep within milliseconds: ttft:200 tpot:50 (or e2el)."""
    sweep: list[str] | None = None
    """NAME=A,B,...: simulate each value of a setting, of gpu or of request_rate; several make a grid."""
    output: Path | None = None
    """Keep each result of a sweep there as it is done; a sweep that was stopped goes on from it."""
    jobs: int | None = None
    """Simulations at once; not given: one for each core."""
    html: Path | None = None
    """Write a page with plots there."""
    json: Path | None = None
    """Write all figures there; - is stdout, with no table."""

    def __post_init__(self) -> None:
        self._check("efficiency", "a number above 0 and at most 1", lambda value: 0 < value <= 1)
        self._check("overhead_us", "a number of at least 0", lambda value: 0 <= value < math.inf)
        self._check("burstiness", "a number above 0, or inf", lambda value: value > 0)
        self._check("seed", "an integer from 0 to 2**31 - 1", range(2**31).__contains__)
        for name in ("num_prompts", "jobs"):
            self._check(name, "an integer from 1 to 2**31 - 1", lambda value: value is None or 1 <= value < 2**31)
        self._check("request_rate", "a number above 0, or inf", lambda value: value is None or value > 0)
        for name in ("save_cost", "output", "html", "json"):
            check_output(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.cost is not None and (self.efficiency != 1 or self.overhead_us):
            raise ConfigError("--efficiency and --overhead-us are of a data sheet; --cost has been measured")
        if self.save_cost is not None and self.cost is None:
            raise ConfigError("--save-cost needs a --cost to save")
        if self.gpu == "cpu" and self.output is not None:
            raise ConfigError("--output finds nothing again of --gpu cpu: a CPU is measured anew each time")

    def _check(self, name: str, allowed: str, ok: Callable[[Any], bool]) -> None:
        if not ok(value := getattr(self, name)):
            raise ConfigError(f"--{name.replace('_', '-')} is {describe(value)}; allowed: {allowed}")
