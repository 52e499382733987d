"""This module holds how a scheduler tells what happens, in order. It does not know who listens, and decides nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..events import EventKind, Recorder, RequestEvent, StepEvent, WaitReason
from ..request import Request
from ..step import SchedulerOutput
from .block_pool import BlockPool

__all__ = ["Emitter"]


class Emitter:
    """Makes events of what a scheduler does; a scheduler nobody listens to has none.

    Per step it costs four readings of the clock and one tuple, whatever runs: arrays are handed on as they are.

    Args:
        recorder: takes the events.
        clock: the scheduler's.
    """

    def __init__(self, recorder: Recorder, clock: Callable[[], float]) -> None:
        self._recorder = recorder
        self._clock = clock
        self._start_s = self._execute_s = self._update_s = 0.0
        self._in_flight = False
        self._ends: list[RequestEvent] = []
        """Of sequences that ended while a step was out: told after it, since it may have run them."""

    def arrived(self, request: Request, step: int) -> None:
        """Tell that a sequence was queued."""
        num_tokens = request.num_prompt_tokens
        max_tokens = request.max_num_tokens - num_tokens
        time_s, request_id, choice = request.arrival_time_s, request.request_id, request.index
        event = RequestEvent(EventKind.ARRIVED, time_s, step, request_id, choice, -1, num_tokens, 0, max_tokens)
        self._recorder.on_request(event)

    def waits(self, request: Request, reason: WaitReason, step: int) -> None:
        """Tell why the head of the queue is not admitted."""
        request_id, choice = request.request_id, request.index
        event = RequestEvent(EventKind.WAITS, self._clock(), step, request_id, choice, detail=reason.value)
        self._recorder.on_request(event)

    def admitted(self, request: Request, step: int, time_s: float, num_cached_tokens: int) -> None:
        """Tell that a sequence got a row."""
        num_tokens, row = len(request.token_ids), request.row
        request_id, choice = request.request_id, request.index
        event = RequestEvent(EventKind.ADMITTED, time_s, step, request_id, choice, row, num_tokens, num_cached_tokens)
        self._recorder.on_request(event)

    def preempted(self, request: Request, step: int, num_tokens: int) -> None:
        """Tell that a sequence is about to lose its row, and so many tokens' KV with it."""
        request_id, choice, row = request.request_id, request.index, request.row
        event = RequestEvent(EventKind.PREEMPTED, self._clock(), step, request_id, choice, row, num_tokens)
        self._recorder.on_request(event)

    def finished(self, request: Request, step: int, row: int, num_tokens: int) -> None:
        """Tell that a sequence has ended, or do so once the step that is out is over."""
        time_s, reason = request.finish_time_s, request.status.finish_reason
        assert time_s is not None, f"{request.request_id} has not ended"
        assert reason is not None, f"{request.request_id} is {request.status.name}"
        event = RequestEvent(
            EventKind.FINISHED,
            time_s,
            step,
            request.request_id,
            request.index,
            row,
            num_tokens,
            detail=reason.value,
        )
        if self._in_flight:
            self._ends.append(event)
        else:
            self._recorder.on_request(event)

    def begin(self) -> None:
        """Note that scheduling begins."""
        self._start_s = self._clock()

    def handed_out(self) -> None:
        """Note that the runner gets the step."""
        self._in_flight = True
        self._execute_s = self._clock()

    def landed(self) -> None:
        """Note that the step is back, with or without its output."""
        self._update_s = self._clock()

    def ended(
        self,
        work: SchedulerOutput,
        sampled: npt.NDArray[np.int32],
        num_waiting: int,
        pool: BlockPool,
        failed: str = "",
    ) -> None:
        """Tell of a step that is over, then of the sequences that ended with it.

        Args:
            work: the step.
            sampled: positions in its rows of those that got a token.
            num_waiting: sequences in the queue.
            pool: as it is now.
            failed: why it failed, if it did.
        """
        recorder = self._recorder
        event = StepEvent(
            work.step,
            self._start_s,
            self._execute_s,
            self._update_s,
            self._clock(),
            work.rows,
            work.num_scheduled_tokens,
            sampled,
            num_waiting,
            pool.num_free,
            pool.num_cached,
            failed,
        )
        recorder.on_step(event)
        self._in_flight = False
        if self._ends:
            for end in self._ends:
                recorder.on_request(end)
            self._ends.clear()
