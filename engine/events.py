"""This module holds what is recorded of an engine's work: one event per step, a few per sequence. It does not know who
listens.

Everything that is shown of a run (metrics, explanations, traces, the live view) is computed from these events, so all
of it agrees. Times are seconds of the engine's clock, `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["EventKind", "Recorder", "RequestEvent", "StepEvent", "WaitReason"]

Int32Array = npt.NDArray[np.int32]


class EventKind(StrEnum):
    """What happened to a sequence."""

    ARRIVED = "arrived"
    """It was queued."""
    WAITS = "waits"
    """As the head of the queue it could not be admitted, for a reason it did not have before."""
    ADMITTED = "admitted"
    """It got a row: started, or resumed after preemption."""
    PREEMPTED = "preempted"
    """It lost its row and blocks, and is queued again."""
    FINISHED = "finished"


class WaitReason(StrEnum):
    """Why the head of the queue is not admitted."""

    NO_ROW = "no row free"
    NO_BUDGET = "token budget spent"
    NO_BLOCKS = "no blocks free"
    PREFIX = "waits for another request to compute the same prefix"


class RequestEvent(NamedTuple):
    """Something that happened to one sequence."""

    kind: EventKind
    time_s: float
    step: int
    """The step that was being scheduled or updated, or the next one."""
    request_id: str
    choice: int
    """Which of the n choices."""
    row: int = -1
    """ADMITTED, PREEMPTED: its row."""
    num_tokens: int = 0
    """ARRIVED, ADMITTED: prompt and output so far; PREEMPTED: tokens whose KV was given up; FINISHED: output."""
    num_cached_tokens: int = 0
    """ADMITTED: tokens found in the prefix cache."""
    detail: str = ""
    """WAITS: the reason; FINISHED: the finish reason."""


class StepEvent(NamedTuple):
    """One step: when, and what ran."""

    step: int
    start_s: float
    """Scheduling began."""
    execute_s: float
    """The runner got it."""
    update_s: float
    """Its output was there."""
    end_s: float
    """The news of it was ready."""
    rows: Int32Array
    """[num_seqs] rows that ran."""
    num_scheduled_tokens: Int32Array
    """[num_seqs] tokens each ran."""
    sampled: Int32Array
    """[num_sampled] positions in `rows` of those that sampled a token."""
    num_waiting: int
    num_free_blocks: int
    """Cached ones included: they are free until somebody needs them."""
    num_cached_blocks: int
    failed: str = ""
    """Why it failed, if it did."""


class Recorder(Protocol):
    """Takes events as they happen; on the thread that runs the engine, so it must be quick and may not raise."""

    def on_request(self, event: RequestEvent) -> None:
        """Take what happened to a sequence."""
        ...

    def on_step(self, event: StepEvent) -> None:
        """Take a step that has ended."""
        ...
