"""This module holds what must be true of a scheduler's books between any two calls: for tests. It does not know why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..request import RequestStatus

if TYPE_CHECKING:
    from .scheduler import Scheduler

__all__ = ["check_integrity"]


def check_integrity(scheduler: Scheduler) -> None:
    """Assert every invariant of scheduler, tables and pool: O(everything)."""
    roster, table, kv, queue = scheduler.roster, scheduler.rows, scheduler.kv, scheduler.waiting
    running = {row: request for row, request in enumerate(table.requests) if request is not None}
    kv.check_integrity(running)
    assert sorted(running) == np.flatnonzero(scheduler.order.is_running).tolist(), "rows and running flags differ"
    assert len(running) + table.num_free_rows == scheduler.limits.max_num_seqs, "a row is lost"
    order = scheduler.order.living()
    assert sorted(order) == sorted(running), "rows and service order differ"
    keys = [running[row].order for row in order]
    assert keys == sorted(keys), "running rows are out of order"
    assert len(scheduler.flights) <= scheduler.limits.max_steps_in_flight, "too many steps are out"
    for row, request in running.items():
        assert request.row == row, f"row {row} is held by a request of row {request.row}"
        assert request.status == RequestStatus.RUNNING, f"row {row} is {request.status.name}"
        num_computed, num_tokens = int(table.num_computed_tokens[row]), int(table.num_tokens[row])
        assert 0 <= num_computed < num_tokens <= request.max_num_tokens, f"row {row}: {num_computed} of {num_tokens}"
        num_ahead = int(table.num_ahead[row])
        assert num_ahead == num_computed + scheduler.flights.num_ahead(row), f"row {row} is said to be at {num_ahead}"
        assert num_ahead < request.max_num_tokens, f"row {row} runs past its end"
        assert num_ahead <= kv.capacity[row], f"row {row} has computed past its blocks"
    waiting = queue.requests()
    assert len(waiting) == len(queue), "the queue has miscounted its dead"
    for request in waiting:
        assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), request.status.name
        assert request.row < 0, f"{request.request_id} waits with row {request.row}"
    alive = {id(request) for siblings in scheduler.requests.values() for request in siblings.values()}
    assert alive == {id(request) for request in [*waiting, *running.values()]}, "a request is lost"
    num_streaming = sum(request.stream for request in running.values())
    assert roster.num_streaming == num_streaming, "streaming rows miscounted"
    for row, request in roster.without_first_token.items():
        assert running.get(row) is request, f"row {row} waits for the first token of somebody who left"
