"""This module holds small workloads and machines to simulate. It does not know what is tested with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from octavo.engine.scheduler import SchedulerLimits
from octavo.engine.tools.roofline import StepWork
from octavo.engine.tools.simulate.workload import DrawnPrompts, Workload

LIMITS = SchedulerLimits(
    vocab_size=1000, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64, num_blocks=64, block_size=16
)


@dataclass(frozen=True)
class Constant:
    """Every step takes the same."""

    seconds: float

    def step_s(self, work: StepWork) -> float:
        return self.seconds


class Uneven:
    """Every part of a step takes a time that no sum of floats makes round."""

    def step_s(self, work: StepWork) -> float:
        tokens, sampled, seqs, read, pairs = work
        return 0.0103 + 1.7e-4 * tokens + 1.1e-4 * sampled + 3.3e-5 * seqs + 1.3e-6 * read + 7.7e-9 * pairs


def draw(num: int, rate: float, *, seed: int = 0, prompt: int = 60, output: int = 60, prefix: int = 0) -> Workload:
    """Requests of 1 to twice the given tokens, at random times."""
    rng = np.random.default_rng(seed)
    workload = Workload(
        "drawn",
        np.zeros(num),
        prefix + rng.integers(1, 2 * prompt, num),
        rng.integers(1, 2 * output, num),
        DrawnPrompts(prefix, rng.integers(0, 3, num)),
    )
    return workload.at_rate(rate, 1.0, seed)


def limits(**changes: Any) -> SchedulerLimits:
    return replace(LIMITS, **changes)
