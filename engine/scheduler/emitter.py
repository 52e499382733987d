"""This module holds how a scheduler tells what happens, in order. It does not know who listens, and decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..events import OWES_LOGPROBS, EventKind, Moment, Recorder, RequestEvent, StepEvent, WaitReason
from ..request import Request
from ..step import SchedulerOutput
from .block_owners import BlockOwners
from .kv_cache_manager import KVCacheManager

__all__ = ["Emitter"]

_MOMENTS = (Moment.BETWEEN, Moment.FLIGHT, Moment.FLIGHTS)
"""By the number of steps that are out."""


class Emitter:
    """Makes events of what a scheduler does; a scheduler nobody listens to has none.

    Per step it costs four readings of the clock and one tuple, whatever runs: arrays are handed on as they are.

    Args:
        recorder: takes the events.
        clock: the scheduler's.
        kv: the scheduler's.
    """

    def __init__(self, recorder: Recorder, clock: Callable[[], float], kv: KVCacheManager) -> None:
        self._recorder = recorder
        self._clock = clock
        self._pool = kv.pool
        self._owners = BlockOwners(kv)
        self._kin: list[int] = []
        self._num_resets = 0
        self._start_s = self._update_s = 0.0
        self._flights: deque[tuple[float, float]] = deque()
        """Of each step that is out: when it began, and when it was handed out."""
        self._landing = -1
        """The step whose output is taken over, or -1."""
        self._may_tell_ends = True
        self._ends: list[RequestEvent] = []
        """Of sequences that ended after a step was handed out and before one is over: told after that, as it may have
        run them."""

    def arrived(self, request: Request, step: int) -> None:
        """Tell that a sequence was queued."""
        num_tokens = request.num_prompt_tokens
        max_tokens = request.max_num_tokens - num_tokens
        time_s, request_id, choice = request.arrival_time_s, request.request_id, request.index
        event = RequestEvent(
            EventKind.ARRIVED,
            time_s,
            step,
            request_id,
            choice,
            num_tokens=num_tokens,
            max_tokens=max_tokens,
            detail=OWES_LOGPROBS if request.owes_prompt_logprobs else "",
            moment=self._moment,
            serial=self._owners.enter(request),
            priority=request.priority,
        )
        self._recorder.on_request(event)

    def waits(self, request: Request, reason: WaitReason, step: int) -> None:
        """Tell why the head of the queue is not admitted."""
        request_id, choice = request.request_id, request.index
        kin = self._owners.kin(request)
        event = RequestEvent(EventKind.WAITS, self._clock(), step, request_id, choice, detail=reason.value, kin=kin)
        self._recorder.on_request(event)

    def admitted(self, request: Request, step: int, time_s: float, num_cached_tokens: int) -> None:
        """Tell that a sequence got a row."""
        num_tokens, row = len(request.token_ids), request.row
        request_id, choice, kin = request.request_id, request.index, self._owners.kin(request)
        self._recorder.on_request(
            RequestEvent(
                EventKind.ADMITTED,
                time_s,
                step,
                request_id,
                choice,
                row,
                num_tokens,
                num_cached_tokens,
                kin=kin,
            )
        )

    def preempted(self, request: Request, step: int, num_tokens: int) -> None:
        """Tell that a sequence is about to lose its row, and so many tokens' KV with it."""
        request_id, choice, row = request.request_id, request.index, request.row
        event = RequestEvent(EventKind.PREEMPTED, self._clock(), step, request_id, choice, row, num_tokens)
        self._recorder.on_request(event)

    def finished(self, request: Request, step: int, row: int, num_tokens: int) -> None:
        """Tell that a sequence has ended, or do so once the next step is over."""
        time_s, reason = request.finish_time_s, request.status.finish_reason
        assert time_s is not None, f"{request.request_id} has not ended"
        assert reason is not None, f"{request.request_id} is {request.status.name}"
        event = RequestEvent(
            EventKind.FINISHED,
            time_s,
            step if self._landing < 0 else self._landing,
            request.request_id,
            request.index,
            row,
            num_tokens,
            detail=reason.value,
            moment=self._moment,
        )
        self._owners.leave(request)
        if self._may_tell_ends:
            self._recorder.on_request(event)
        else:
            self._ends.append(event)

    def filled(self, request: Request) -> None:
        """Note that a block of a running sequence has become full."""
        for kin in self._owners.filled(request):
            self._kin += kin

    def reset(self) -> None:
        """Note that the prefix cache was emptied."""
        self._num_resets += 1

    def begin(self) -> None:
        """Note that scheduling begins."""
        self._tell_ends()  # their rows may be given away now
        self._start_s = self._clock()

    def handed_out(self) -> None:
        """Note that the runner gets the step."""
        self._may_tell_ends = False
        self._flights.append((self._start_s, self._clock()))

    def landed(self, step: int) -> None:
        """Note that a step is back, with or without its output."""
        self._landing = step
        self._may_tell_ends = False
        self._update_s = self._clock()

    def ended(
        self,
        work: SchedulerOutput,
        sampled: npt.NDArray[np.int32],
        num_waiting: int,
        failed: str = "",
        num_wasted: int = 0,
    ) -> None:
        """Tell of a step that is over, then of the sequences that ended with it.

        Args:
            work: the step.
            sampled: positions in its rows of those that got a token.
            num_waiting: sequences in the queue.
            failed: why it failed, if it did.
            num_wasted: tokens that were sampled for nobody.
        """
        start_s, execute_s = self._flights.popleft()
        event = StepEvent(
            work.step,
            start_s,
            execute_s,
            self._update_s,
            self._clock(),
            work.rows,
            work.num_scheduled_tokens,
            sampled,
            num_waiting,
            self._pool.num_free,
            self._pool.num_cached,
            failed,
            self._num_resets,
            tuple(self._kin),
            num_wasted,
        )
        self._recorder.on_step(event)
        self._kin.clear()
        self._num_resets = 0
        self._landing = -1
        self._tell_ends()

    def _tell_ends(self) -> None:
        self._may_tell_ends = True
        for end in self._ends:
            self._recorder.on_request(end)
        self._ends.clear()

    @property
    def _moment(self) -> Moment:
        return Moment.UPDATE if self._landing >= 0 else _MOMENTS[len(self._flights)]
