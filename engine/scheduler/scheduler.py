"""This module holds the decision of what runs in each step. It does not know tensors, text or which device runs.

Charter. Two things are decided here and nowhere else: how a token budget is split, and who comes, goes on and goes; the
roster brings the latter about. What may never be added: torch, a clock that is not injected, a random number, iteration
over a set, a Python loop over all running rows, work per step that grows with the length of a sequence. Loops run only
over rows that are admitted, need a block, fill a block, stream, fail or finish.

No phases. There is no prefill phase and no decode phase: a row has `num_computed_tokens` and `num_tokens`, and every
step schedules tokens so that the first catches up with the second. A row that catches up samples one token, which puts
it one behind again. A prompt in chunks, a prefix hit, a resume after preemption are all the same case: the row is more
than one token behind. In a step rows that are one token behind come first, so a long prompt delays nobody's next token;
what is left of the budget goes to the others in service order, then to admissions.

Service order is (priority, arrival, index). When blocks run out the last running row is preempted: it loses its blocks,
waits in the one queue under the order it always had, and is computed again, mostly from its own blocks as long as they
are still cached. The first row in order is never preempted for another, so it always finishes. Only the head of the
queue is ever admitted: nobody overtakes it.

With two steps out (`max_steps_in_flight`) a step is scheduled before the output of the one before it is known.
`num_tokens` and `num_computed_tokens` say what is known; `num_ahead` counts what is out as well, and is what a step
starts from. What is told to users, kept at a preemption or cached is only ever what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..events import KVSnapshot, Recorder, WaitReason
from ..request import Request, RequestStatus
from ..step import EngineOutput, ModelOutput, NewSequence, SchedulerOutput
from .admission import Admission
from .batch import Int32Array, NewBlocks, batch_order, split_budget, to_int32
from .emitter import Emitter
from .flights import Flight, Flights
from .integrity import check_integrity
from .limits import SchedulerLimits, SchedulerStats
from .news import keep_extras, news
from .roster import End, Roster

__all__ = ["Scheduler"]

NOT_FINITE = "the logits of this sequence were not finite"


class Scheduler:
    """Decides which rows run how many tokens in each step, and keeps requests, rows and blocks in order.

    At most `limits.max_steps_in_flight` steps are out at once, and `update` (or `fail`) takes them back in their order;
    `add`, `abort` and `finish` may come at any time.

    Args:
        limits: what there is to use.
        clock: returns seconds; never runs backwards.
        recorder: takes every event of the run, those of a step included: it is here that a step begins and ends.
    """

    def __init__(self, limits: SchedulerLimits, clock: Callable[[], float], recorder: Recorder | None = None) -> None:
        self.limits = limits
        self.flights = Flights()
        self.roster = roster = Roster(limits, self.flights)
        self.rows, self.kv, self.order = roster.rows, roster.kv, roster.order
        self.waiting, self.requests = roster.waiting, roster.requests
        self._clock = clock
        self._events = None if recorder is None else Emitter(recorder, clock, self.kv)
        self._admission = Admission(limits, self.rows, self.kv)
        self._waits: tuple[Request, WaitReason] | None = None
        """The head of the queue when it was last refused, and why."""
        self._all_decode = True
        """Whether every running row is one token behind, with what is out."""
        self._num_steps = 0
        self._num_prefill_tokens = self._num_output_tokens = self._num_wasted_tokens = 0

    def add(self, requests: Sequence[Request], arrived_s: float | None = None) -> None:
        """Queue the sequences of one request, which arrived now or at a time before; see `Roster.add`.

        Raises:
            RequestError: the id is in use, or one of them could never run.
        """
        now_s = self._clock()
        self.roster.add(requests, now_s if arrived_s is None else min(arrived_s, now_s))
        if self._events is not None:
            for request in requests:
                self._events.arrived(request, self._num_steps)

    def abort(self, request_id: str) -> list[EngineOutput]:
        """End every sequence of a request and free its blocks; of an unknown or finished id there is nothing to say."""
        requests = list(self.requests.get(request_id, {}).values())
        return [self._end(request, End(RequestStatus.FINISHED_ABORTED)) for request in requests]

    def finish(self, request_id: str, index: int, num_output_tokens: int) -> EngineOutput | None:
        """End one sequence as stopped, keeping its first `num_output_tokens` output tokens.

        Returns:
            Its last news, or None where it has already ended.
        """
        request = self.requests.get(request_id, {}).get(index)
        if request is None:
            return None
        return self._end(request, End(RequestStatus.FINISHED_STOPPED, num_output_tokens))

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs, or a step is out."""
        return bool(self.requests) or len(self.flights) > 0

    @property
    def stats(self) -> SchedulerStats:
        """What it holds now and has done so far."""
        return SchedulerStats(
            num_running=int(self.order.is_running.sum()),
            num_waiting=len(self.waiting),
            num_free_blocks=self.kv.pool.num_free,
            num_cached_blocks=self.kv.pool.num_cached,
            num_steps=self._num_steps,
            num_preemptions=self.roster.num_preemptions,
            prefix_cache_queries=self.roster.prefix_cache_queries,
            prefix_cache_hits=self.roster.prefix_cache_hits,
            num_prefill_tokens=self._num_prefill_tokens,
            num_output_tokens=self._num_output_tokens,
            num_wasted_tokens=self._num_wasted_tokens,
        )

    def running_requests(self) -> list[Request]:
        """Return the requests that have a row, in service order: for tests and reports."""
        return self.roster.running()

    def snapshot(self, max_waiting: int = 256) -> KVSnapshot:
        """Return who holds what, and at most so many of the queue by name; see `Roster.snapshot`."""
        return self.roster.snapshot(self._clock(), self._waits, max_waiting)

    def reset_prefix_cache(self) -> None:
        """Forget every cached block; who uses one keeps it."""
        self.kv.pool.forget_all()
        if self._events is not None:
            self._events.reset()

    def schedule(self) -> SchedulerOutput | None:
        """Decide the next step; None where nothing can run."""
        num_out = len(self.flights)
        assert num_out < self.limits.max_steps_in_flight, f"schedule() before update(), with {num_out} steps out"
        if self._events is not None:
            self._events.begin()
        self.order.drop_released()
        self._inject_preemption()
        blocks = NewBlocks()
        counts = self._schedule_running(blocks)
        new_sequences: list[NewSequence] = []
        if self.waiting.head() is not None:
            counts, new_sequences = self._admit(counts, blocks)
        return self._hand_out(counts, new_sequences, blocks)

    def _schedule_running(self, blocks: NewBlocks) -> Int32Array:
        """Return how many tokens each row of the order runs, and give out the blocks they need."""
        order, table = self.order.rows, self.rows
        ends = table.num_ahead[order]
        if self._all_decode and self._num_steps < (steady := self.order.steady(self._num_steps)).end_step:
            counts = steady.counts
        else:
            self._all_decode = False
            self.order.unsteady()
            num_tokens = table.num_tokens_ahead(order)
            todo = num_tokens - ends
            todo[num_tokens >= table.max_num_tokens[order]] = 0  # a step that is out samples the last
            counts = split_budget(todo, self.limits.max_num_batched_tokens)
        ends += counts
        short = np.flatnonzero(ends > self.kv.capacity[order])
        if len(short):
            counts = self._give_blocks(short.tolist(), ends, counts, blocks)
        return counts

    def _give_blocks(self, short: list[int], ends: Int32Array, counts: Int32Array, blocks: NewBlocks) -> Int32Array:
        """Give blocks to rows in order, preempting from the end of the order where there are none left.

        Args:
            short: positions in the order that lack blocks, ascending.
            ends: [num_running] tokens each row must hold.
            counts: [num_running] tokens each row runs.
            blocks: where new blocks are noted.

        Returns:
            The counts of the rows that are left; 0 for one that must stand still.
        """
        order, kv = self.order.rows, self.kv
        num_left = len(order)
        for i in short:
            if i >= num_left:
                break
            row = int(order[i])
            first_column = len(kv.tables[row])
            num_needed = kv.num_blocks_for(int(ends[i])) - first_column
            while kv.pool.num_free < num_needed and num_left > i + 1:
                num_left -= 1
                self._preempt(int(order[num_left]))
            if kv.pool.num_free < num_needed:
                # Nobody is behind it: it takes what there is. Older rows will finish, and the first in order never
                # gets here unless the pool is held from outside.
                num_needed = kv.pool.num_free
                num_lacking = int(ends[i]) - (first_column + num_needed) * kv.block_size
                counts = counts.copy()
                counts[i] -= num_lacking
                self._all_decode = False
            blocks.add(row, first_column, kv.grow(row, num_needed))
        if num_left < len(order):
            self.order.drop_released()
            counts = counts[:num_left]
        return counts

    def _admit(self, counts: Int32Array, blocks: NewBlocks) -> tuple[Int32Array, list[NewSequence]]:
        """Admit requests from the head of the queue as long as rows, budget and blocks last."""
        budget = self.limits.max_num_batched_tokens - int(counts.sum())
        new_sequences: list[NewSequence] = []
        admitted: list[tuple[int, int]] = []
        self._admission.begin(self.order.rows)
        while (request := self.waiting.head()) is not None:
            prefix = self._admission.look_up(request, budget)
            if isinstance(prefix, WaitReason):
                if self._waits != (request, prefix):
                    self._waits = (request, prefix)
                    if self._events is not None:
                        self._events.waits(request, prefix, self._num_steps)
                break
            self._waits = None
            count = min(len(request.token_ids) - prefix.num_tokens, budget)
            now_s = self._clock()
            new_sequences.append(sequence := self.roster.admit(request, prefix, now_s))
            if self._events is not None:
                self._events.admitted(request, self._num_steps, now_s, prefix.num_tokens)
            row, first_column = sequence.row, len(prefix.blocks)
            num_blocks = self.kv.num_blocks_for(prefix.num_tokens + count) - first_column
            blocks.add(row, 0, prefix.blocks)
            blocks.add(row, first_column, self.kv.grow(row, num_blocks))
            admitted.append((row, count))
            budget -= count
        if admitted:
            counts = self.order.join(admitted, counts)
            self._all_decode = False
        return counts, new_sequences

    def _hand_out(
        self, counts: Int32Array, new_sequences: list[NewSequence], blocks: NewBlocks
    ) -> SchedulerOutput | None:
        """Put the rows in batch order and describe the step."""
        table, num_running = self.rows, len(self.order)
        if self._all_decode:
            rows, counts, sampled, _ = self.order.steady(self._num_steps)
            index = self.order.rows
            num_seqs = num_tokens = num_decodes = num_decode_tokens = len(rows)
            num_computed = table.num_ahead[index]
            ends = num_computed + counts
        else:
            places, num_decodes = batch_order(counts)
            index, counts = self.order.rows[places], counts[places]
            rows = index.astype(np.int32)
            num_computed = table.num_ahead[index]
            ends = num_computed + counts
            sampled = np.flatnonzero(ends == table.num_tokens_ahead(index)).astype(np.int32)
            num_seqs, num_tokens = len(rows), int(counts.sum())
            num_decode_tokens = int(counts[:num_decodes].sum())
            self._all_decode = num_seqs == num_running == len(sampled)
        if num_seqs == 0:
            return None
        table.num_ahead[index] = ends
        work = SchedulerOutput(
            step=self._num_steps,
            removed_rows=self.roster.take_removed_rows(),
            new_sequences=tuple(new_sequences),
            rows=rows,
            num_computed_tokens=num_computed,
            num_scheduled_tokens=counts,
            num_tokens=num_tokens,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            sampled=sampled,
            block_rows=to_int32(blocks.rows),
            block_columns=to_int32(blocks.columns),
            block_ids=to_int32(blocks.ids),
        )
        self._num_steps += 1
        self.flights.add(work, index, ends)
        if self._events is not None:
            self._events.handed_out()
        return work

    def _inject_preemption(self) -> None:
        """Preempt the youngest row where faults ask for it: for tests."""
        every = self.limits.faults.preempt_every
        if every == 0 or self._num_steps % every != 0 or len(self.order) == 0:
            return
        row = int(self.order.rows[-1])
        request = self.rows.request(row)
        # A row that has gained nothing since its last admission is spared, or it would never finish.
        if request.num_preemptions == 0 or self.rows.num_tokens[row] > len(request.token_ids):
            self._preempt(row)
            self.order.drop_released()

    def _preempt(self, row: int) -> None:
        if self._events is not None:
            self._events.preempted(self.rows.request(row), self._num_steps, int(self.rows.num_ahead[row]))
        self.roster.preempt(row)

    def update(self, work: SchedulerOutput, output: ModelOutput) -> list[EngineOutput]:
        """Take over what a step computed and return the news of the sequences that have any."""
        flight = self._land(work)
        table, index, ends = self.rows, flight.rows, flight.ends
        tokens, sampled = output.token_ids, work.sampled
        sampled_rows = index if len(sampled) == len(index) else index[sampled]
        num_wasted = int((~flight.stayed(sampled_rows)).sum()) if flight.left else 0
        self._num_wasted_tokens += num_wasted
        said = self._end_failed(flight, output)
        if work.num_tokens > len(index):
            counts = work.num_scheduled_tokens
            self._num_prefill_tokens += int(counts[counts > 1].sum())
        if flight.left:
            stayed = flight.stayed(sampled_rows)
            sampled, sampled_rows, tokens = sampled[stayed], sampled_rows[stayed], tokens[stayed]
            stayed = flight.stayed(index)
            index, ends = index[stayed], ends[stayed]

        table.num_computed_tokens[index] = ends
        for i in np.flatnonzero(ends >= self.kv.next_full[index]).tolist():
            row = int(index[i])
            self.kv.cache_full_blocks(row, table.request(row), table.token_ids[row], int(ends[i]))
            if self._events is not None:
                self._events.filled(table.request(row))
        may_end = table.append(sampled_rows, tokens)
        self._num_output_tokens += len(sampled_rows)
        if output.logprobs or output.prompt_logprobs or output.hidden_states:
            keep_extras(table, flight, output)
        if self.roster.without_first_token:
            self.roster.note_first_tokens(self._clock)
        ended: frozenset[int] = frozenset()
        if output.ended is not None:
            ended = frozenset(flight.rows[work.sampled[output.ended]].tolist())
            may_end |= np.isin(sampled_rows, list(ended))
        speaks = np.flatnonzero(may_end | table.streams[sampled_rows] if self.roster.num_streaming else may_end)
        for row, token, ends_here in zip(
            sampled_rows[speaks].tolist(), tokens[speaks].tolist(), may_end[speaks].tolist(), strict=True
        ):
            request = table.request(row)
            if not ends_here and not request.logprobs:  # all that nearly all streams say: what they got in this step
                request.num_reported_tokens += 1
                said.append(EngineOutput(request.request_id, request.index, [token]))
                continue
            end = table.finish_status(row)
            if row in ended and (end is None or end[1] is None):
                end = (RequestStatus.FINISHED_STOPPED, None)  # its grammar is complete; at the limit that counts more
            if end is not None:
                said.append(self._end(request, End(end[0], stop_reason=end[1])))
            elif request.stream:
                said.append(news(request, table))
        if self._events is not None:
            self._events.ended(work, sampled, len(self.waiting), num_wasted=num_wasted)
        return said

    def _end_failed(self, flight: Flight, output: ModelOutput) -> list[EngineOutput]:
        """End the rows that sampled nothing; nobody may find the blocks of one whose logits were not finite."""
        said: list[EngineOutput] = []
        if output.failed is not None:
            for at in np.flatnonzero(output.failed).tolist():
                row = int(flight.rows[flight.work.sampled[at]])
                if row not in flight.left:
                    error, param = output.errors.get(at, (NOT_FINITE, None))
                    end = End(RequestStatus.FINISHED_ERROR, error=error, error_param=param, forget=True)
                    said.append(self._end(self.rows.request(row), end))
                    flight.left.append(row)
        return said

    def fail(self, work: SchedulerOutput, message: str) -> list[EngineOutput]:
        """End every sequence of a step that raised, telling users why: what it wrote is unknown. The others go on."""
        flight = self._land(work)
        self._all_decode = False
        # The runner may have raised before it took the rows out that this step removed; a step that was handed out
        # since may have given them away.
        again = work.removed_rows[~self.order.is_running[work.removed_rows]].tolist()
        self.roster.removed_rows[:0] = again
        end = End(RequestStatus.FINISHED_ERROR, error=message)
        said = [self._end(self.rows.request(row), end) for row in flight.rows[flight.stayed(flight.rows)].tolist()]
        if self._events is not None:
            self._events.ended(work, work.sampled[:0], len(self.waiting), failed=message)
        return said

    def _land(self, work: SchedulerOutput) -> Flight:
        flight = self.flights.land(work)
        if self._events is not None:
            self._events.landed(work.step)
        return flight

    def _end(self, request: Request, end: End) -> EngineOutput:
        row, last = request.row, self.roster.end(request, end, self._clock())
        if self._events is not None:
            self._events.finished(request, self._num_steps - 1, row, request.num_reported_tokens)
        return last

    def check_integrity(self) -> None:
        """Assert every invariant of scheduler, tables and pool: for tests, O(everything)."""
        check_integrity(self)
