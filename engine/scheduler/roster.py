"""This module holds who is here: every sequence that has not ended, and the row and blocks it has while it runs. It
does not know budgets, steps or who is told.

A sequence waits in the queue, or runs with a row, a block table and a place in the service order; it goes back and
forth by `admit` and `preempt` until `end`. Nobody else gives a row or takes one back, so whatever is kept by row is
brought up to date here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import RequestError
from ..events import KVSnapshot, RunningSequence, WaitingSequence, WaitReason
from ..request import Request, RequestStatus, RowTable
from ..step import EngineOutput, NewSequence
from .batch import Int32Array, to_int32
from .flights import Flights
from .kv_cache_manager import KVCacheManager, Prefix
from .limits import SchedulerLimits
from .news import last_news
from .queue import WaitingQueue
from .running_order import RunningOrder

__all__ = ["End", "Roster"]


class End(NamedTuple):
    """How a sequence ends."""

    status: RequestStatus
    """Final."""
    num_output_tokens: int | None = None
    """Output tokens to keep; None: all."""
    stop_reason: int | None = None
    """The stop token that ended it."""
    error: str | None = None
    """Why it failed."""
    error_param: str | None = None
    """The field of the request that it comes from, if it does."""
    forget: bool = False
    """Nothing in its blocks can be trusted."""


class Roster:
    """Sequences by where they are.

    Args:
        limits: the scheduler's.
        flights: the steps that are out: they are told who leaves its row.
    """

    def __init__(self, limits: SchedulerLimits, flights: Flights) -> None:
        self.rows = RowTable(limits.max_num_seqs, limits.max_model_len, limits.vocab_size)
        self.kv = KVCacheManager(limits)
        self.waiting = WaitingQueue()
        self.order = RunningOrder(self.rows, limits.max_num_seqs)
        self.requests: dict[str, dict[int, Request]] = {}
        """Those that have not ended, by id and choice."""
        self.num_streaming = 0
        """Running rows that stream."""
        self.without_first_token: dict[int, Request] = {}
        """Those of the running rows."""
        self.removed_rows: list[int] = []
        """Given back since the last step, of which the runner has not heard."""
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._limits = limits
        self._flights = flights

    def add(self, requests: Sequence[Request], now_s: float) -> None:
        """Queue the sequences of one request: all of them or none.

        Args:
            requests: of one `request_id`, with distinct indices.
            now_s: when they arrived.

        Raises:
            RequestError: the id is in use, or one of them could never run.
        """
        request_id, limits = requests[0].request_id, self._limits
        if request_id in self.requests:
            raise RequestError(f"request_id is {request_id!r}; allowed: one that is not in use", param="request_id")
        for request in requests:
            if request.max_num_tokens > min(limits.max_model_len, limits.num_slots):
                raise RequestError(
                    f"prompt and output are up to {request.max_num_tokens} tokens; allowed: {limits.max_model_len} by "
                    f"the context, {limits.num_slots} by the KV cache",
                    param="max_tokens",
                )
        for request in requests:
            if limits.policy == "fcfs":
                request.priority = 0
            request.arrival_time_s = now_s
            self.waiting.push(request)
        self.requests[request_id] = {request.index: request for request in requests}

    def admit(self, request: Request, prefix: Prefix, now_s: float) -> NewSequence:
        """Give the head of the queue a row and the blocks of its prefix; where it stands is said by `order.join`."""
        head = self.waiting.pop()
        assert head is request, f"{request.request_id} overtakes {head.request_id}"
        row = self.rows.admit(request, prefix.num_tokens)
        self.kv.admit(row, request, prefix)
        self.order.enter(row)
        self.num_streaming += request.stream
        self.prefix_cache_queries += len(request.token_ids)
        self.prefix_cache_hits += prefix.num_tokens
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = prefix.num_tokens
            request.first_scheduled_time_s = now_s
        if request.first_token_time_s is None:
            self.without_first_token[row] = request
        return NewSequence(
            row=row,
            token_ids=request.token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            params=request.params,
            seed=request.seed,
            index=request.index,
            stop_token_ids=request.stop_token_ids,
            grammar=request.grammar,
        )

    def preempt(self, row: int) -> None:
        """Take row and blocks from a running sequence and queue it where it always stood."""
        request = self._release(row)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(request)

    def end(self, request: Request, end: End, now_s: float) -> EngineOutput:
        """End a sequence wherever it is, take back what it holds, and return its last news."""
        token_ids = self.rows.output_token_ids(request)[: end.num_output_tokens]
        if request.row >= 0:
            self._release(request.row, forget=end.forget)
            request.status = end.status
        else:
            request.status = end.status
            self.waiting.mark_dead()
        siblings = self.requests[request.request_id]
        del siblings[request.index]
        if not siblings:
            del self.requests[request.request_id]
        request.stop_reason = end.stop_reason
        request.finish_time_s = now_s
        return last_news(request, token_ids, end.error, end.error_param)

    def _release(self, row: int, *, forget: bool = False) -> Request:
        """Take row and blocks from a running sequence."""
        request = self.rows.release(row)
        self.kv.release(row, request, forget=forget)
        self.order.release(row)
        self._flights.leave(row)
        self.removed_rows.append(row)
        self.num_streaming -= request.stream
        self.without_first_token.pop(row, None)
        return request

    def take_removed_rows(self) -> Int32Array:
        """Return the rows that were given back since the last step, for the runner to hear of."""
        rows, self.removed_rows = to_int32(self.removed_rows), []
        return rows

    def note_first_tokens(self, clock: Callable[[], float]) -> None:
        """Note who has its first token now."""
        num_tokens = self.rows.num_tokens
        found = [row for row, r in self.without_first_token.items() if num_tokens[row] > r.num_prompt_tokens]
        if found:
            now_s = clock()
            for row in found:
                self.without_first_token.pop(row).first_token_time_s = now_s

    def running(self) -> list[Request]:
        """Return the requests that have a row, in service order."""
        return [self.rows.request(row) for row in self.order.living()]

    def snapshot(self, now_s: float, waits: tuple[Request, WaitReason] | None, max_waiting: int) -> KVSnapshot:
        """Return who holds what, for the live view: a pass over the running rows and, in numpy, over the blocks.

        Args:
            now_s: the time.
            waits: the head of the queue when it was last refused, and why.
            max_waiting: how many of the queue to name.
        """
        waiting = list[WaitingSequence]()
        for request in self.waiting.first(max_waiting):
            reason = WaitReason.BEHIND if waiting else WaitReason.NEXT_STEP
            if waits is not None and waits[0] is request:
                reason = waits[1]
            waiting.append(WaitingSequence(request.request_id, request.index, reason, now_s - request.arrival_time_s))
        num_tokens, num_computed = self.rows.num_tokens.tolist(), self.rows.num_computed_tokens.tolist()
        running = [
            RunningSequence(r.request_id, r.index, r.row, num_tokens[r.row], num_computed[r.row])
            for r in self.running()
        ]
        return KVSnapshot(now_s, self.kv.pool.states(), len(self.waiting), waiting, running)
