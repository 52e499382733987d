"""This module holds whether the head of the queue can start now, and why not. It does not know what is running.

An answer of no is remembered with its reason, so that asking again in every step costs no walk over a long prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import WaitReason
from ..request import Request, RowTable
from .kv_cache_manager import KVCacheManager, Prefix
from .limits import SchedulerLimits

__all__ = ["Admission"]


class _Blocked(NamedTuple):
    """The request that could not be admitted for want of blocks, or of a block that is being computed."""

    request: Request
    prefix: Prefix
    reason: WaitReason


class Admission:
    """Looks at the head of the queue, step by step.

    Args:
        limits: the scheduler's.
        rows: the scheduler's.
        kv: the scheduler's.
    """

    def __init__(self, limits: SchedulerLimits, rows: RowTable, kv: KVCacheManager) -> None:
        self._num_kept = limits.num_blocks // 100
        self._rows = rows
        self._kv = kv
        self._order: npt.NDArray[np.intp] = np.empty(0, dtype=np.intp)
        self._num_available: int | None = None
        self._blocked: _Blocked | None = None

    def begin(self, order: npt.NDArray[np.intp]) -> None:
        """Begin a step.

        Args:
            order: [num_running] rows that run without those admitted in this step.
        """
        self._order = order
        self._num_available = None

    def look_up(self, request: Request, budget: int) -> Prefix | WaitReason:
        """Return the prefix with which a request is admitted now, and count on that; else why it has to wait.

        Args:
            request: the head of the queue.
            budget: tokens that are left in this step.
        """
        if self._rows.num_free_rows == 0:
            return WaitReason.NO_ROW
        if budget <= 0:
            return WaitReason.NO_BUDGET
        if self._num_available is None:
            self._num_available = self._count_available()
        kv, blocked, num_available = self._kv, self._blocked, self._num_available
        if blocked is not None and blocked.request is request:
            digest = blocked.prefix.next_digest
            if blocked.reason == WaitReason.PREFIX:
                if kv.is_pending(digest):
                    return blocked.reason
            elif num_available < blocked.prefix.demand and not kv.pool.has(digest):
                return blocked.reason
        prefix = kv.look_up(request)
        waits = kv.is_pending(prefix.next_digest)
        if waits or prefix.demand > num_available:
            reason = WaitReason.PREFIX if waits else WaitReason.NO_BLOCKS
            self._blocked = _Blocked(request, prefix, reason)
            return reason
        self._blocked = None
        self._num_available -= prefix.demand
        return prefix

    def _count_available(self) -> int:
        """Return the free blocks that are not spoken for.

        Rows that run will want blocks for the tokens they have and the next one; beside them a hundredth of the pool
        stays free, so that an admission is not undone by the next block somebody needs. Nothing is kept from a request
        that would run alone.
        """
        order, kv = self._order, self._kv
        if len(order) == 0:
            return kv.pool.num_free
        wanted = self._rows.num_tokens_ahead(order) + 1
        wanted -= kv.capacity[order]
        wanted += kv.block_size - 1
        np.maximum(wanted, 0, out=wanted)
        wanted //= kv.block_size
        return max(0, kv.pool.num_free - int(wanted.sum()) - self._num_kept)
