"""This module holds the run of a simulation: the engine's own scheduler and block pool, on a clock that a cost model
moves. It does not know models, files or what is made of the outcome.

A step takes what the cost model says, and nothing else takes time: scheduling, text and transport are free unless the
cost model was fitted to runs in which they were not. Requests that arrive while a step runs are queued when it is over,
as in the engine. Outputs are as long as the workload says; every output token is the same, so two requests share KV
only as far as their prompts are equal.

Stretches in which nothing can happen but one more token for each row are run without the scheduler: nobody arrives, and
no row ends, fills a block or needs one. Who waits goes on waiting: whoever was refused is refused again as long as no
row, no block and no cached prefix has come. `tests/tools/simulate/` holds that this changes nothing, bit by bit.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import RequestError
from ...events import Recorder
from ...request import Request
from ...sampling_params import SamplingParams
from ...scheduler import Scheduler, SchedulerLimits
from ...step import EngineOutput, ModelOutput, SchedulerOutput
from ..roofline import CostModel, StepWork
from .workload import Workload

__all__ = ["Outcome", "Simulation", "work_of"]

TOKEN = 0
"""What every row samples."""
MIN_AHEAD = 4
"""Shorter stretches are not worth looking for."""
MAX_MOMENTS = 1024
"""Of the timeline: beyond that every other one is dropped and the distance doubles."""
FIRST_DISTANCE_S = 2.0**-10
PROGRESS_STEPS = 512

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a simulation. Times in seconds from its start; [num_requests] in the workload's order."""

    workload: Workload
    scheduled_s: FloatArray
    """First time in a step; NaN, as below, where a request was refused."""
    first_token_s: FloatArray
    finished_s: FloatArray
    num_cached_tokens: IntArray
    """Prefix hit of the first admission."""
    num_preemptions: IntArray
    gaps_s: FloatArray
    """Times between two tokens of a request, equal ones that belong together once."""
    num_gaps: IntArray
    """How often each of `gaps_s` counts."""
    moments: IntArray
    """[num_moments, 3] running, waiting, used blocks at multiples of `distance_s`."""
    distance_s: float
    num_steps: int
    num_row_steps: int
    """Sum of the rows of all steps."""
    peak_blocks: int
    prefix_queries: int
    """Tokens looked up at admissions; those found are `prefix_hits`."""
    prefix_hits: int
    busy_s: float
    """Time in which a step ran."""
    refused: Sequence[str]
    """Why the engine refuses some of the requests, one reason each."""

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """[num_requests] which have finished."""
        return ~np.isnan(self.finished_s)


def work_of(step: SchedulerOutput) -> StepWork:
    """Return what a step has to do, as cost models want to know it."""
    num_seqs, num_sampled = len(step.rows), len(step.sampled)
    num_computed = step.num_computed_tokens
    if step.num_tokens == num_seqs:
        num_read = int(num_computed.sum(dtype=np.int64)) + num_seqs
        return StepWork(num_seqs, num_sampled, num_seqs, num_read, num_read)
    counts = step.num_scheduled_tokens.astype(np.int64)
    num_read = int(num_computed.sum(dtype=np.int64)) + step.num_tokens
    pairs = int(counts @ num_computed) + (int(counts @ counts) + step.num_tokens) // 2
    return StepWork(step.num_tokens, num_sampled, num_seqs, num_read, pairs)


class Simulation:
    """One run of a workload, from the first arrival to the last end.

    Args:
        workload: what arrives and when.
        limits: of the scheduler; what the workload may not exceed is refused request by request.
        cost: says how long steps take.
        recorder: takes the scheduler's events; every step is then run by the scheduler.
        run_ahead: use the short cut described above; for tests.
    """

    def __init__(
        self,
        workload: Workload,
        limits: SchedulerLimits,
        cost: CostModel,
        *,
        recorder: Recorder | None = None,
        run_ahead: bool = True,
    ) -> None:
        num = len(workload)
        self.scheduler = Scheduler(limits, lambda: self._now_s, recorder)
        self.num_finished = 0
        self._workload, self._cost = workload, cost
        self._may_run_ahead = run_ahead and recorder is None and limits.faults.preempt_every == 0
        self._arrivals = [*workload.arrival_s.tolist(), math.inf]
        self._num_arrived = 0
        self._now_s = self._busy_s = 0.0
        self._params = SamplingParams()
        self._tokens = np.full(limits.max_num_seqs, TOKEN, dtype=np.int32)
        self._times = np.full((3, num), np.nan)
        self._counts = np.zeros((2, num), dtype=np.int64)
        self._refused: list[str] = []
        self._num_steps = self._num_row_steps = self._peak_blocks = 0
        self._gaps_s, self._num_gaps = array("d"), array("q")
        self._last_s = np.full(limits.max_num_seqs, np.nan)
        """By row: when its last token came; of `_steady` it is `_step_end_s`."""
        self._step_end_s = math.nan
        self._steady: npt.NDArray[np.int32] | None = None
        """The rows of the last step, where all of them decoded and are still there."""
        self._owners: list[Request | None] = [None] * limits.max_num_seqs
        self._kept_s: dict[str, float] = {}
        """When the last token of a preempted request came."""
        self._moments: list[tuple[int, int, int]] = []
        self._distance_s = FIRST_DISTANCE_S
        self._next_moment_s = 0.0
        self._look_again = 0
        """Step before which there is no use in looking for a stretch to run ahead."""

    def run(self, on_progress: Callable[[int], None] | None = None) -> Outcome:
        """Run until all requests have ended.

        Args:
            on_progress: called now and then with the requests that are over; may raise to stop.
        """
        scheduler = self.scheduler
        reported = time.monotonic()
        while True:
            if self._arrivals[self._num_arrived] <= self._now_s:
                self._arrive()
            step = scheduler.schedule()
            if step is None:
                assert not scheduler.has_unfinished, "requests wait and nothing can run"
                if self._num_arrived == len(self._workload):
                    break
                self._moment(self._arrivals[self._num_arrived])
                self._now_s = self._arrivals[self._num_arrived]
                continue
            self._step(step)
            if on_progress is not None and self._num_steps % PROGRESS_STEPS == 0:
                now = time.monotonic()
                if now - reported > 0.1:
                    reported = now
                    on_progress(self.num_finished + len(self._refused))
        return self._outcome()

    def _arrive(self) -> None:
        """Queue what has arrived by now."""
        workload, arrivals = self._workload, self._arrivals
        while (arrived_s := arrivals[self._num_arrived]) <= self._now_s:
            number = self._num_arrived
            self._num_arrived += 1
            tokens = workload.prompt(number, self.scheduler.limits.vocab_size)
            request = Request(
                request_id=str(number),
                index=0,
                token_ids=tokens,
                num_prompt_tokens=len(tokens),
                max_num_tokens=len(tokens) + int(workload.output_tokens[number]),
                params=self._params,
                seed=0,
                arrival=number,
            )
            try:
                self.scheduler.add([request], arrived_s)
            except RequestError as error:
                self._refused.append(str(error))

    def _step(self, step: SchedulerOutput) -> None:
        scheduler, start_s = self.scheduler, self._now_s
        num_seqs = len(step.rows)
        if step.new_sequences or len(step.removed_rows):
            self._follow_rows(step)
        pool = scheduler.kv.pool
        self._peak_blocks = max(self._peak_blocks, pool.num_blocks - pool.num_free)
        seconds = self._cost.step_s(work_of(step))
        self._now_s = end_s = start_s + seconds
        self._busy_s += seconds
        if end_s > self._next_moment_s:
            self._moment(end_s)
        self._num_steps += 1
        self._num_row_steps += num_seqs
        said = scheduler.update(step, ModelOutput(self._tokens[: len(step.sampled)]))
        if step.rows is self._steady:
            self._gaps_s.append(end_s - self._step_end_s)
            self._num_gaps.append(num_seqs)
        else:
            self._note_gaps(step, end_s)
        self._step_end_s = end_s
        if said:
            self._note_ends(said)
        elif self._may_run_ahead and self._steady is not None and self._num_steps >= self._look_again:
            self._run_ahead(self._steady)

    def _follow_rows(self, step: SchedulerOutput) -> None:
        """Note who has which row from this step on, and keep when preempted requests had their last token."""
        self._leave_steady()
        for row in step.removed_rows.tolist():
            owner = self._owners[row]
            if owner is not None and not owner.status.is_finished:
                self._kept_s[owner.request_id] = self._last_s[row]
            self._owners[row] = None
        table = self.scheduler.rows
        for sequence in step.new_sequences:
            row = sequence.row
            request = self._owners[row] = table.request(row)
            self._last_s[row] = self._kept_s.pop(request.request_id, math.nan)
            # Rows that run ahead only count; their tokens are here already.
            table.token_ids[row, len(sequence.token_ids) : request.max_num_tokens] = TOKEN

    def _leave_steady(self) -> None:
        if self._steady is not None:
            self._last_s[self._steady] = self._step_end_s
            self._steady = None

    def _note_gaps(self, step: SchedulerOutput, end_s: float) -> None:
        """Note the times since the last token of rows that may have had theirs in different steps."""
        self._leave_steady()
        rows = step.rows[step.sampled]
        before = self._last_s[rows]
        in_turn = before == self._step_end_s
        if num_in_turn := int(np.count_nonzero(in_turn)):
            self._gaps_s.append(end_s - self._step_end_s)
            self._num_gaps.append(num_in_turn)
        if num_in_turn < len(rows):
            late = end_s - before[~in_turn]
            late = late[~np.isnan(late)].tolist()
            self._gaps_s.extend(late)
            self._num_gaps.extend([1] * len(late))
        self._last_s[rows] = end_s
        # The scheduler hands out the same array as long as the same rows decode.
        num_running = self.scheduler.limits.max_num_seqs - self.scheduler.rows.num_free_rows
        if step.num_tokens == len(rows) == num_running:
            self._steady = step.rows

    def _note_ends(self, said: list[EngineOutput]) -> None:
        self._leave_steady()
        for news in said:
            number, told = int(news.request_id), news.metrics
            assert told is not None, "all news are last news: nothing streams"
            self._times[:, number] = told.first_scheduled_time_s, told.first_token_time_s, told.finish_time_s
            self._counts[:, number] = told.num_cached_tokens, told.num_preemptions
        self.num_finished += len(said)

    def _run_ahead(self, rows: npt.NDArray[np.int32]) -> None:
        """Run the steps in which nothing is decided: every row gets a token, and that is all."""
        scheduler = self.scheduler
        table, kv = scheduler.rows, scheduler.kv
        num_computed = table.num_computed_tokens[rows]
        # The next step runs [num_computed, num_computed + 1): it must fit, fill no block and not be the last.
        most = min(
            int((kv.capacity[rows] - num_computed).min()),
            int((kv.next_full[rows] - num_computed).min()) - 1,
            int((table.max_num_tokens[rows] - num_computed).min()) - 2,
        )
        if most < MIN_AHEAD:
            self._look_again = self._num_steps + most + 1
            return
        num_seqs, num_steps = len(rows), 0
        num_read = int(num_computed.sum(dtype=np.int64)) + num_seqs
        step_s, gaps_s, arrives_s = self._cost.step_s, self._gaps_s, self._arrivals[self._num_arrived]
        start_s = self._now_s
        while num_steps < most and start_s < arrives_s:
            seconds = step_s(StepWork(num_seqs, num_seqs, num_seqs, num_read, num_read))
            end_s = start_s + seconds
            self._busy_s += seconds
            if end_s > self._next_moment_s:
                self._moment(end_s)
            gaps_s.append(end_s - start_s)
            start_s = end_s
            num_read += num_seqs
            num_steps += 1
        self._now_s = self._step_end_s = start_s
        self._num_gaps.extend([num_seqs] * num_steps)
        self._num_steps += num_steps
        self._num_row_steps += num_steps * num_seqs
        for counter in (table.num_computed_tokens, table.num_ahead, table.num_tokens):
            counter[rows] += num_steps

    def _moment(self, until_s: float) -> None:
        """Note for the timeline what the scheduler holds, up to a time before which that does not change."""
        pool, table = self.scheduler.kv.pool, self.scheduler.rows
        num_running = self.scheduler.limits.max_num_seqs - table.num_free_rows
        state = (num_running, len(self.scheduler.waiting), pool.num_blocks - pool.num_free)
        while self._next_moment_s < until_s:
            if len(self._moments) == MAX_MOMENTS:
                del self._moments[1::2]
                self._distance_s *= 2
            else:
                self._moments.append(state)
            self._next_moment_s = len(self._moments) * self._distance_s

    def _outcome(self) -> Outcome:
        stats = self.scheduler.stats
        return Outcome(
            workload=self._workload,
            scheduled_s=self._times[0],
            first_token_s=self._times[1],
            finished_s=self._times[2],
            num_cached_tokens=self._counts[0],
            num_preemptions=self._counts[1],
            gaps_s=np.frombuffer(self._gaps_s, dtype=np.float64),
            num_gaps=np.frombuffer(self._num_gaps, dtype=np.int64),
            moments=np.array(self._moments, dtype=np.int64).reshape(-1, 3),
            distance_s=self._distance_s,
            num_steps=self._num_steps,
            num_row_steps=self._num_row_steps,
            peak_blocks=self._peak_blocks,
            prefix_queries=stats.prefix_cache_queries,
            prefix_hits=stats.prefix_cache_hits,
            busy_s=self._busy_s,
            refused=self._refused,
        )
