"""This module holds the queue of requests without a row, new and preempted ones. It does not know blocks."""

from __future__ import annotations

from heapq import heapify, heappop, heappush, nsmallest

from ..request import Request

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """Requests by their `order`, smallest first; a preempted one comes back with the order it always had.

    A request that ends while it waits is left in the heap until it comes up or the dead outnumber the living, so a
    storm of cancellations costs O(1) each.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Request]] = []
        self._num_dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_dead

    def push(self, request: Request) -> None:
        """Add a request that waits or was preempted."""
        heappush(self._heap, (request.order, request))

    def head(self) -> Request | None:
        """Return who is next, or None."""
        while self._heap:
            request = self._heap[0][1]
            if not request.status.is_finished:
                return request
            heappop(self._heap)
            self._num_dead -= 1
        return None

    def pop(self) -> Request:
        """Take out who is next."""
        request = self.head()
        assert request is not None, "pop() from an empty queue"
        heappop(self._heap)
        return request

    def mark_dead(self) -> None:
        """Note that one of the queue's requests has just got a final status."""
        self._num_dead += 1
        if self._num_dead > 16 and 2 * self._num_dead > len(self._heap):
            self._heap = [item for item in self._heap if not item[1].status.is_finished]
            heapify(self._heap)
            self._num_dead = 0

    def first(self, count: int) -> list[Request]:
        """Return the next `count` of the living, in order: for reports."""
        return nsmallest(count, self.requests(), key=lambda request: request.order)

    def requests(self) -> list[Request]:
        """Return the living in no particular order: for tests and reports."""
        return [request for _, request in self._heap if not request.status.is_finished]
