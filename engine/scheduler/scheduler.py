"""This module holds the decision of what runs in each step. It does not know tensors, text or which device runs.

Charter. Three things happen here and nowhere else: a token budget is split, blocks are given out and taken back, and
requests change their status. What may never be added: torch, a clock that is not injected, a random number, iteration
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

Prefix caching by an example, with blocks of 4 tokens and A, B, C asking the same 10 tokens:

1. A is admitted. Nothing is cached: its two full blocks [0, 4) and [4, 8) are announced as pending. Blocks 1, 2, 3.
2. B is next, and its first missing block is pending: it waits, and so does everybody behind it, for A's step.
3. update: A has computed 10 tokens. Blocks 1 and 2 enter the cache; block 3 holds [8, 10) and is not full.
4. B and C are admitted with the table [1, 2] and a hit of 8. Blocks 1 and 2 have 3 references. Each gets a block of its
   own for the rest, and runs 2 tokens.
5. A samples two more tokens and runs them: block 3 now holds [8, 12), is full, and enters the cache under a name that
   includes the two outputs. If B has sampled the same two, its own copy is not entered: the first one wins.
6. A finishes. Blocks 3, 2, 1 lose a reference in this order. Block 3 is free but can still be found: the next turn of
   the same conversation starts with all twelve tokens.
7. D needs a block and only cached ones are free. 3 was freed first and is taken first, so what is lost is the end of a
   prefix and not its beginning.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from ..events import KVSnapshot, Recorder, RunningSequence, WaitingSequence, WaitReason
from ..request import Request, RequestStatus, RowTable
from ..step import EngineOutput, ModelOutput, NewSequence, SchedulerOutput
from .admission import Admission
from .batch import NewBlocks, Steady, batch_order, split_budget, steady_batch, to_int32
from .emitter import Emitter
from .kv_cache_manager import KVCacheManager, Prefix
from .limits import SchedulerLimits, SchedulerStats
from .news import keep_extras, last_news, news
from .queue import WaitingQueue

__all__ = ["Scheduler"]

Int32Array = npt.NDArray[np.int32]
IndexArray = npt.NDArray[np.intp]

NOT_FINITE = "the logits of this sequence were not finite"


class _Flight(NamedTuple):
    """The step that was handed out and has not come back."""

    work: SchedulerOutput
    rows: IndexArray
    """`work.rows`, as an index."""
    left: list[int]
    """Rows that were released since."""


class Scheduler:
    """Decides which rows run how many tokens in each step, and keeps requests, rows and blocks in order.

    `schedule` and `update` (or `fail`) alternate; `add`, `abort` and `finish` may come at any time.

    Args:
        limits: what there is to use.
        clock: returns seconds; never runs backwards.
        recorder: takes every event of the run, those of a step included: it is here that a step begins and ends.
    """

    def __init__(self, limits: SchedulerLimits, clock: Callable[[], float], recorder: Recorder | None = None) -> None:
        self.limits = limits
        self.rows = RowTable(limits.max_num_seqs, limits.max_model_len, limits.vocab_size)
        self.kv = KVCacheManager(limits)
        self.waiting = WaitingQueue()
        self._clock = clock
        self._events = None if recorder is None else Emitter(recorder, clock, self.kv)
        self._admission = Admission(limits, self.rows, self.kv)
        self._waits: tuple[Request, WaitReason] | None = None
        """The head of the queue when it was last refused, and why."""
        self._requests: dict[str, dict[int, Request]] = {}
        # Running rows in service order. Released rows stay in it until `_drop_released`.
        self._order: IndexArray = np.empty(0, dtype=np.intp)
        self._is_running: npt.NDArray[np.bool_] = np.zeros(limits.max_num_seqs, dtype=np.bool_)
        self._any_released = False
        self._removed_rows: list[int] = []
        self._all_decode = True
        self._steady: Steady | None = None
        self._num_streaming = 0
        self._without_first_token: dict[int, Request] = {}
        self._flight: _Flight | None = None
        self._num_steps = 0
        self._num_preemptions = 0
        self._prefix_cache_queries = 0
        self._prefix_cache_hits = 0
        self._num_prefill_tokens = 0
        self._num_output_tokens = 0

    def add(self, requests: Sequence[Request], arrived_s: float | None = None) -> None:
        """Queue the sequences of one request: all of them or none.

        Args:
            requests: of one `request_id`, with distinct indices.
            arrived_s: when they did, where that was before now.

        Raises:
            RequestError: the id is in use, or one of them could never run.
        """
        request_id = requests[0].request_id
        if request_id in self._requests:
            raise RequestError(f"request_id is {request_id!r}; allowed: one that is not in use", param="request_id")
        limits = self.limits
        for request in requests:
            if request.max_num_tokens > min(limits.max_model_len, limits.num_slots):
                raise RequestError(
                    f"prompt and output are up to {request.max_num_tokens} tokens; allowed: {limits.max_model_len} by "
                    f"the context, {limits.num_slots} by the KV cache",
                    param="max_tokens",
                )
        now = self._clock()
        now = now if arrived_s is None else min(arrived_s, now)
        for request in requests:
            if limits.policy == "fcfs":
                request.priority = 0
            request.arrival_time_s = now
            self.waiting.push(request)
            if self._events is not None:
                self._events.arrived(request, self._num_steps)
        self._requests[request_id] = {request.index: request for request in requests}

    def abort(self, request_id: str) -> list[EngineOutput]:
        """End every sequence of a request and free its blocks; of an unknown or finished id there is nothing to say."""
        requests = list(self._requests.get(request_id, {}).values())
        return [self._end(request, RequestStatus.FINISHED_ABORTED) for request in requests]

    def finish(self, request_id: str, index: int, num_output_tokens: int) -> EngineOutput | None:
        """End one sequence as stopped, keeping its first `num_output_tokens` output tokens.

        Returns:
            Its last news, or None where it has already ended.
        """
        request = self._requests.get(request_id, {}).get(index)
        if request is None:
            return None
        return self._end(request, RequestStatus.FINISHED_STOPPED, num_output_tokens=num_output_tokens)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    @property
    def stats(self) -> SchedulerStats:
        """What it holds now and has done so far."""
        return SchedulerStats(
            num_running=int(self._is_running.sum()),
            num_waiting=len(self.waiting),
            num_free_blocks=self.kv.pool.num_free,
            num_cached_blocks=self.kv.pool.num_cached,
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            prefix_cache_queries=self._prefix_cache_queries,
            prefix_cache_hits=self._prefix_cache_hits,
            num_prefill_tokens=self._num_prefill_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def running_requests(self) -> list[Request]:
        """Return the requests that have a row, in service order: for tests and reports."""
        return [self.rows.request(row) for row in self._order[self._is_running[self._order]].tolist()]

    def snapshot(self, max_waiting: int = 256) -> KVSnapshot:
        """Return who holds what, for the live view: a pass over the running rows and, in numpy, over the blocks.

        Args:
            max_waiting: how many of the queue to name.
        """
        now, waiting = self._clock(), list[WaitingSequence]()
        for request in self.waiting.first(max_waiting):
            reason = WaitReason.BEHIND if waiting else WaitReason.NEXT_STEP
            if self._waits is not None and self._waits[0] is request:
                reason = self._waits[1]
            waited_s = now - request.arrival_time_s
            waiting.append(WaitingSequence(request.request_id, request.index, reason, waited_s))
        num_tokens, num_computed = self.rows.num_tokens.tolist(), self.rows.num_computed_tokens.tolist()
        running = [
            RunningSequence(r.request_id, r.index, r.row, num_tokens[r.row], num_computed[r.row])
            for r in self.running_requests()
        ]
        return KVSnapshot(now, self.kv.pool.states(), len(self.waiting), waiting, running)

    def reset_prefix_cache(self) -> None:
        """Forget every cached block; who uses one keeps it."""
        self.kv.pool.forget_all()
        if self._events is not None:
            self._events.reset()

    def schedule(self) -> SchedulerOutput | None:
        """Decide the next step; None where nothing can run."""
        assert self._flight is None, "schedule() before update() of the step before"
        if self._events is not None:
            self._events.begin()
        self._drop_released()
        self._inject_preemption()
        blocks = NewBlocks()
        counts = self._schedule_running(blocks)
        new_sequences: list[NewSequence] = []
        if self.waiting.head() is not None:
            counts, new_sequences = self._admit(counts, blocks)
        if len(self._order) == 0:
            return None
        return self._hand_out(counts, new_sequences, blocks)

    def _schedule_running(self, blocks: NewBlocks) -> Int32Array:
        """Return how many tokens each row of the order runs, and give out the blocks they need."""
        order = self._order
        if self._all_decode:
            counts = self._steady_batch().counts
        else:
            counts = split_budget(
                self.rows.num_tokens[order] - self.rows.num_computed_tokens[order], self.limits.max_num_batched_tokens
            )
        ends = self.rows.num_computed_tokens[order]
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
        order, kv = self._order, self.kv
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
            self._drop_released()
            counts = counts[:num_left]
        return counts

    def _admit(self, counts: Int32Array, blocks: NewBlocks) -> tuple[Int32Array, list[NewSequence]]:
        """Admit requests from the head of the queue as long as rows, budget and blocks last."""
        budget = self.limits.max_num_batched_tokens - int(counts.sum())
        new_sequences: list[NewSequence] = []
        admitted: list[tuple[int, int]] = []
        self._admission.begin(self._order)
        while (request := self.waiting.head()) is not None:
            prefix = self._admission.look_up(request, budget)
            if isinstance(prefix, WaitReason):
                if self._waits != (request, prefix):
                    self._waits = (request, prefix)
                    if self._events is not None:
                        self._events.waits(request, prefix, self._num_steps)
                break
            self._waits = None
            self.waiting.pop()
            count = min(len(request.token_ids) - prefix.num_tokens, budget)
            row = self._start(request, prefix)
            first_column = len(prefix.blocks)
            num_blocks = self.kv.num_blocks_for(prefix.num_tokens + count) - first_column
            blocks.add(row, 0, prefix.blocks)
            blocks.add(row, first_column, self.kv.grow(row, num_blocks))
            new_sequences.append(_new_sequence(request))
            admitted.append((row, count))
            budget -= count
        if admitted:
            counts = self._join_order(admitted, counts)
        return counts, new_sequences

    def _start(self, request: Request, prefix: Prefix) -> int:
        row = self.rows.admit(request, prefix.num_tokens)
        self.kv.admit(row, request, prefix)
        self._is_running[row] = True
        self._num_streaming += request.stream
        self._prefix_cache_queries += len(request.token_ids)
        self._prefix_cache_hits += prefix.num_tokens
        now = self._clock()
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = prefix.num_tokens
            request.first_scheduled_time_s = now
        if self._events is not None:
            self._events.admitted(request, self._num_steps, now, prefix.num_tokens)
        if request.first_token_time_s is None:
            self._without_first_token[row] = request
        return row

    def _join_order(self, admitted: list[tuple[int, int]], counts: Int32Array) -> Int32Array:
        """Put admitted (row, count) pairs where they belong in the order, and return the counts of the new order."""
        order = self._order
        new_rows = np.array([row for row, _ in admitted], dtype=np.intp)
        new_counts = np.array([count for _, count in admitted], dtype=np.int32)
        first = self.rows.request(admitted[0][0])
        if len(order) == 0 or self.rows.request(int(order[-1])).order < first.order:
            self._order = np.concatenate((order, new_rows))
            counts = np.concatenate((counts, new_counts))
        else:
            keys = [self.rows.request(row).order for row, _ in admitted]
            places = [bisect(order, key, key=lambda row: self.rows.request(int(row)).order) for key in keys]
            self._order = np.insert(order, places, new_rows)
            counts = np.insert(counts, places, new_counts)
        self._all_decode = False
        self._steady = None
        return counts

    def _hand_out(
        self, counts: Int32Array, new_sequences: list[NewSequence], blocks: NewBlocks
    ) -> SchedulerOutput | None:
        """Put the rows in batch order and describe the step."""
        if self._all_decode:
            rows, counts, sampled = self._steady_batch()
            index = self._order
            num_seqs = num_tokens = num_decodes = num_decode_tokens = len(rows)
            num_computed = self.rows.num_computed_tokens[index]
        else:
            places, num_decodes = batch_order(counts)
            index, counts = self._order[places], counts[places]
            rows = index.astype(np.int32)
            num_computed = self.rows.num_computed_tokens[index]
            sampled = np.flatnonzero(num_computed + counts == self.rows.num_tokens[index]).astype(np.int32)
            num_seqs, num_tokens = len(rows), int(counts.sum())
            num_decode_tokens = int(counts[:num_decodes].sum())
        if num_seqs == 0:
            return None
        removed_rows = to_int32(self._removed_rows)
        self._removed_rows = []
        work = SchedulerOutput(
            step=self._num_steps,
            removed_rows=removed_rows,
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
        self._flight = _Flight(work, index, [])
        if self._events is not None:
            self._events.handed_out()
        return work

    def _steady_batch(self) -> Steady:
        if self._steady is None:
            self._steady = steady_batch(self._order)
        return self._steady

    def _inject_preemption(self) -> None:
        """Preempt the youngest row where faults ask for it: for tests."""
        every = self.limits.faults.preempt_every
        if every == 0 or self._num_steps % every != 0 or len(self._order) == 0:
            return
        row = int(self._order[-1])
        request = self.rows.request(row)
        # A row that has gained nothing since its last admission is spared, or it would never finish.
        if request.num_preemptions == 0 or self.rows.num_tokens[row] > len(request.token_ids):
            self._preempt(row)
            self._drop_released()

    def _preempt(self, row: int) -> None:
        if self._events is not None:
            self._events.preempted(self.rows.request(row), self._num_steps, int(self.rows.num_computed_tokens[row]))
        request = self._release(row)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._num_preemptions += 1
        self.waiting.push(request)

    def update(self, work: SchedulerOutput, output: ModelOutput) -> list[EngineOutput]:
        """Take over what a step computed and return the news of the sequences that have any."""
        flight = self._land(work)
        table, index = self.rows, flight.rows
        said = self._end_failed(flight, output)
        tokens, ends = output.token_ids, work.num_computed_tokens + work.num_scheduled_tokens
        sampled, all_sampled = work.sampled, len(work.sampled) == len(index)
        if work.num_tokens > len(index):
            counts = work.num_scheduled_tokens
            self._num_prefill_tokens += int(counts[counts > 1].sum())
        self._all_decode = all_sampled and len(index) == len(self._order)
        sampled_rows = index if all_sampled else index[sampled]
        if flight.left:
            # Their rows are free, and belong to nobody before the next schedule().
            stayed = self._is_running[sampled_rows]
            sampled, sampled_rows, tokens = sampled[stayed], sampled_rows[stayed], tokens[stayed]
            stayed = self._is_running[index]
            index, ends = index[stayed], ends[stayed]

        table.num_computed_tokens[index] = ends
        for i in np.flatnonzero(ends >= self.kv.next_full[index]).tolist():
            row = int(index[i])
            self.kv.cache_full_blocks(row, table.request(row), table.token_ids[row], int(ends[i]))
            if self._events is not None:
                self._events.filled(table.request(row))
        speaks = table.append(sampled_rows, tokens)
        self._num_output_tokens += len(sampled_rows)
        if output.logprobs or output.prompt_logprobs or output.hidden_states:
            keep_extras(table, flight.rows, work, output)
        if self._without_first_token:
            self._note_first_tokens()
        if self._num_streaming:
            speaks |= table.streams[sampled_rows]
        ended: frozenset[int] = frozenset()
        if output.ended is not None:
            ended = frozenset(flight.rows[work.sampled[output.ended]].tolist())
            speaks |= np.isin(sampled_rows, list(ended))
        for row in sampled_rows[np.flatnonzero(speaks)].tolist():
            request = table.request(row)
            end = table.finish_status(row)
            if row in ended and (end is None or end[1] is None):
                end = (RequestStatus.FINISHED_STOPPED, None)  # its grammar is complete; at the limit that counts more
            if end is not None:
                said.append(self._end(request, end[0], stop_reason=end[1]))
            elif request.stream:
                said.append(news(request, table))
        if self._events is not None:
            self._events.ended(work, sampled, len(self.waiting))
        return said

    def _end_failed(self, flight: _Flight, output: ModelOutput) -> list[EngineOutput]:
        """End the rows that sampled nothing; nobody may find the blocks of one whose logits were not finite."""
        said: list[EngineOutput] = []
        if output.failed is not None:
            for at in np.flatnonzero(output.failed).tolist():
                row = int(flight.rows[flight.work.sampled[at]])
                if self._is_running[row]:
                    error, param = output.errors.get(at, (NOT_FINITE, None))
                    request, status = self.rows.request(row), RequestStatus.FINISHED_ERROR
                    said.append(self._end(request, status, error=error, error_param=param, forget=True))
                    flight.left.append(row)
        return said

    def fail(self, work: SchedulerOutput, message: str) -> list[EngineOutput]:
        """End every sequence of a step that raised: what it wrote is unknown. The others go on.

        Args:
            work: the step.
            message: why, for the users.
        """
        flight = self._land(work)
        self._all_decode = False
        # The runner may have raised before it took the rows out that this step removed.
        self._removed_rows = [*work.removed_rows.tolist(), *self._removed_rows]
        said = [
            self._end(self.rows.request(row), RequestStatus.FINISHED_ERROR, error=message)
            for row in flight.rows[self._is_running[flight.rows]].tolist()
        ]
        if self._events is not None:
            self._events.ended(work, work.sampled[:0], len(self.waiting), failed=message)
        return said

    def _land(self, work: SchedulerOutput) -> _Flight:
        flight = self._flight
        assert flight is not None, "update() without schedule()"
        assert flight.work is work, f"update() of step {work.step}; in flight is step {flight.work.step}"
        self._flight = None
        if self._events is not None:
            self._events.landed()
        return flight

    def _note_first_tokens(self) -> None:
        num_tokens = self.rows.num_tokens
        found = [row for row, r in self._without_first_token.items() if num_tokens[row] > r.num_prompt_tokens]
        if found:
            now = self._clock()
            for row in found:
                self._without_first_token.pop(row).first_token_time_s = now

    def _end(
        self,
        request: Request,
        status: RequestStatus,
        *,
        num_output_tokens: int | None = None,
        stop_reason: int | None = None,
        error: str | None = None,
        error_param: str | None = None,
        forget: bool = False,
    ) -> EngineOutput:
        """End a sequence wherever it is, give back what it holds, and return its last news.

        Args:
            request: not finished.
            status: final.
            num_output_tokens: output tokens to keep; None: all.
            stop_reason: the stop token that ended it.
            error: why it failed.
            error_param: the field of the request that it comes from, if it does.
            forget: nothing in its blocks can be trusted.
        """
        token_ids, row = self.rows.output_token_ids(request)[:num_output_tokens], request.row
        if row >= 0:
            self._release(row, forget=forget)
            request.status = status
        else:
            request.status = status
            self.waiting.mark_dead()
        siblings = self._requests[request.request_id]
        del siblings[request.index]
        if not siblings:
            del self._requests[request.request_id]
        request.stop_reason = stop_reason
        request.finish_time_s = self._clock()
        if self._events is not None:
            self._events.finished(request, self._num_steps - 1, row, len(token_ids))
        return last_news(request, token_ids, error, error_param)

    def _release(self, row: int, *, forget: bool = False) -> Request:
        """Take row and blocks from a running sequence."""
        request = self.rows.release(row)
        self.kv.release(row, request, forget=forget)
        self._is_running[row] = False
        self._any_released = True
        self._removed_rows.append(row)
        self._num_streaming -= request.stream
        self._without_first_token.pop(row, None)
        if self._flight is not None:
            self._flight.left.append(row)
        return request

    def _drop_released(self) -> None:
        if self._any_released:
            self._order = self._order[self._is_running[self._order]]
            self._any_released = False
            self._steady = None

    def check_integrity(self) -> None:
        """Assert every invariant of scheduler, tables and pool: for tests, O(everything)."""
        running = {row: request for row, request in enumerate(self.rows.requests) if request is not None}
        self.kv.check_integrity(running)
        assert sorted(running) == np.flatnonzero(self._is_running).tolist(), "rows and running flags differ"
        assert len(running) + self.rows.num_free_rows == self.limits.max_num_seqs, "a row is lost"
        order = self._order[self._is_running[self._order]].tolist()
        assert sorted(order) == sorted(running), "rows and service order differ"
        keys = [running[row].order for row in order]
        assert keys == sorted(keys), "running rows are out of order"
        for row, request in running.items():
            assert request.row == row, f"row {row} is held by a request of row {request.row}"
            assert request.status == RequestStatus.RUNNING, f"row {row} is {request.status.name}"
            num_computed, num_tokens = int(self.rows.num_computed_tokens[row]), int(self.rows.num_tokens[row])
            assert 0 <= num_computed < num_tokens <= request.max_num_tokens, (
                f"row {row}: {num_computed} of {num_tokens}"
            )
            assert num_computed <= self.kv.capacity[row], f"row {row} has computed past its blocks"
        waiting = self.waiting.requests()
        assert len(waiting) == len(self.waiting), "the queue has miscounted its dead"
        for request in waiting:
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), request.status.name
            assert request.row < 0, f"{request.request_id} waits with row {request.row}"
        alive = {id(request) for siblings in self._requests.values() for request in siblings.values()}
        assert alive == {id(request) for request in [*waiting, *running.values()]}, "a request is lost"
        assert self._num_streaming == sum(request.stream for request in running.values()), "streaming rows miscounted"
        for row, request in self._without_first_token.items():
            assert running.get(row) is request, f"row {row} waits for the first token of somebody who left"


def _new_sequence(request: Request) -> NewSequence:
    return NewSequence(
        row=request.row,
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        params=request.params,
        seed=request.seed,
        index=request.index,
        stop_token_ids=request.stop_token_ids,
        grammar=request.grammar,
    )
