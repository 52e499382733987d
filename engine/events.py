"""This module holds what is recorded of an engine's work: one event per step, a few per sequence. It does not know who
listens.

Everything that is shown of a run (metrics, explanations, traces, the live view) is computed from these events, so all
of it agrees. Times are seconds of the engine's clock, `time.monotonic`, which all processes of a machine share.

Events come in this order: what happens to sequences while step N is scheduled, step N itself, then the ends of the
sequences that it finished. So whoever reads along knows the owner of every row of a step that got a token: the sequence
that was last ADMITTED to it. Where two steps overlap, what happens while N + 1 is scheduled comes before N, and the
owner of any row of N is who was last ADMITTED to it in N or before.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "OWES_LOGPROBS",
    "BlockState",
    "EventKind",
    "KVSnapshot",
    "Moment",
    "Recorder",
    "RequestEvent",
    "RunningSequence",
    "StepEvent",
    "WaitReason",
    "WaitingSequence",
]

Int32Array = npt.NDArray[np.int32]

OWES_LOGPROBS = "prompt logprobs"
"""Of a sequence that finds nothing in the prefix cache before the log-probabilities of its prompt are computed."""


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
    """It ended, wherever it was."""


class WaitReason(StrEnum):
    """Why a sequence is not admitted; the last two are never told in an event."""

    NO_ROW = "no row free"
    NO_BUDGET = "token budget spent"
    NO_BLOCKS = "no blocks free"
    PREFIX = "another request is computing the same prefix"
    BEHIND = "behind others in the queue"
    NEXT_STEP = "on its way into a step"
    """Nothing is in its way: its text was encoded, it was sent to the engine, a step was running."""


class Moment(StrEnum):
    """When something came from outside, or an end came about, as seen from the steps."""

    BETWEEN = ""
    """After one step was over and before the next was scheduled."""
    FLIGHT = "flight"
    """While a step was out."""
    FLIGHTS = "flights"
    """While two were."""
    UPDATE = "update"
    """As the output of a step was taken over: a stop token, a limit, a failure."""


class RequestEvent(NamedTuple):
    """Something that happened to one sequence."""

    kind: EventKind
    time_s: float
    step: int
    """ADMITTED: the first step it runs in; PREEMPTED: the first it does not; FINISHED: the last that was handed out, so
    the last it may have run in, or -1, but at the moment UPDATE the one whose output ended it; ARRIVED, WAITS: the next
    to be handed out."""
    request_id: str
    choice: int
    """Which of the n choices."""
    row: int = -1
    """ADMITTED, PREEMPTED: its row; FINISHED: its row, or -1 where it was waiting."""
    num_tokens: int = 0
    """ARRIVED: the prompt's; ADMITTED: prompt and output so far; PREEMPTED: those whose KV was given up; FINISHED: of
    the output, as far as it counts: a stop string found by the front takes some back."""
    num_cached_tokens: int = 0
    """ADMITTED: tokens found in the prefix cache."""
    max_tokens: int = 0
    """ARRIVED: the most it may generate."""
    detail: str = ""
    """ARRIVED: `OWES_LOGPROBS` or nothing; WAITS: the reason; FINISHED: the finish reason."""
    moment: Moment = Moment.BETWEEN
    """ARRIVED, FINISHED: when."""
    serial: int = -1
    """ARRIVED: its number in the run, from 0."""
    priority: int = 0
    """ARRIVED: smaller is served earlier; 0 for all where the policy is first come, first served."""
    kin: tuple[int, ...] = ()
    """WAITS, ADMITTED: which of the full blocks of its tokens somebody else had before, as (serial, first, end) after
    one another: blocks [first, end) are those of the sequence `serial`. Left out where it was told before. It says who
    shares a prefix, and nothing about what is in it. In a recording that was made small all of it is with ARRIVED."""


class StepEvent(NamedTuple):
    """One step: when, and what ran."""

    step: int
    start_s: float
    """Scheduling began."""
    execute_s: float
    """The runner got it; where steps overlap, it has the device once the step before is over."""
    update_s: float
    """Its output was there."""
    end_s: float
    """The news of it was ready."""
    rows: Int32Array
    """[num_seqs] rows that ran."""
    num_scheduled_tokens: Int32Array
    """[num_seqs] tokens each ran."""
    sampled: Int32Array
    """[num_sampled] positions in `rows` of those that got a token: not those that left or failed meanwhile."""
    num_waiting: int
    num_free_blocks: int
    """Cached ones included: they are free until somebody needs them."""
    num_cached_blocks: int
    failed: str = ""
    """Why it failed, if it did."""
    num_cache_resets: int = 0
    """How often the prefix cache was emptied on purpose since the step before was over."""
    kin: tuple[int, ...] = ()
    """Blocks that became full of output which somebody else had before, as (serial, other serial, first, end) after one
    another; see `RequestEvent.kin`."""
    num_wasted_tokens: int = 0
    """Sampled by rows that had been left by then."""


class BlockState(IntEnum):
    """What a block of the KV pool is used for."""

    FREE = 0
    CACHED = 1
    """Free, and what is in it can still be found."""
    PRIVATE = 2
    """One sequence uses it."""
    SHARED = 3
    """Several do."""


class WaitingSequence(NamedTuple):
    """A sequence in the queue."""

    request_id: str
    choice: int
    reason: WaitReason
    waited_s: float
    """Since it arrived; preempted ones count from there, too."""


class RunningSequence(NamedTuple):
    """A sequence that has a row."""

    request_id: str
    choice: int
    row: int
    num_tokens: int
    """Prompt and output so far."""
    num_computed_tokens: int


class KVSnapshot(NamedTuple):
    """Who holds what at one moment, between two steps."""

    time_s: float
    blocks: npt.NDArray[np.uint8]
    """[num_blocks] `BlockState` of blocks 1 to num_blocks."""
    num_waiting: int
    waiting: list[WaitingSequence]
    """The first of the queue, in order."""
    running: list[RunningSequence]
    """In service order."""


class Recorder(Protocol):
    """Takes events as they happen; on the thread that runs the engine, so it must be quick and may not raise."""

    def on_request(self, event: RequestEvent) -> None:
        """Take what happened to a sequence."""
        ...

    def on_step(self, event: StepEvent) -> None:
        """Take a step that has ended."""
        ...
