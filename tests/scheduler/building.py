"""This module holds small schedulers, requests and hand-made outputs for tests. It does not know a runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from octavo.engine.request import Request
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler, SchedulerLimits
from octavo.engine.step import EngineOutput, ModelOutput, SchedulerOutput

__all__ = ["Clock", "limits", "make_request", "make_scheduler", "output_for", "step"]


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def limits(**changes: Any) -> SchedulerLimits:
    sizes: dict[str, Any] = {
        "vocab_size": 1000,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "num_blocks": 32,
        "block_size": 4,
    }
    return SchedulerLimits(**(sizes | changes))


def make_scheduler(**changes: Any) -> Scheduler:
    return Scheduler(limits(**changes), Clock())


_arrivals = iter(range(1, 1 << 30))


def make_request(request_id: str, prompt: Sequence[int] | int, max_tokens: int = 10, **options: Any) -> Request:
    """Return a request; a number for the prompt means so many tokens that no other prompt begins with."""
    if isinstance(prompt, int):
        prompt = [sum(request_id.encode()) % 900 + 1, *range(2, prompt + 1)]
    params = SamplingParams(**options.pop("params", {}))
    return Request(
        request_id=request_id,
        index=options.pop("index", 0),
        token_ids=np.array(prompt, dtype=np.int32),
        num_prompt_tokens=len(prompt),
        max_num_tokens=len(prompt) + max_tokens,
        params=params,
        seed=0,
        arrival=next(_arrivals),
        **options,
    )


def output_for(work: SchedulerOutput, token: int = 7, **options: Any) -> ModelOutput:
    """Return an output in which every row that samples gets the same token."""
    return ModelOutput(token_ids=np.full(len(work.sampled), token, dtype=np.int32), **options)


def step(scheduler: Scheduler, token: int = 7, **options: Any) -> tuple[SchedulerOutput, list[EngineOutput]]:
    """Run one step that must have work, and check everything before and after it."""
    work = scheduler.schedule()
    assert work is not None, "nothing can run"
    scheduler.check_integrity()
    said = scheduler.update(work, output_for(work, token, **options))
    scheduler.check_integrity()
    return work, said
