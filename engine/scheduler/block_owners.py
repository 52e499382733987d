"""This module holds who was the first to have the content of each block, for recordings. It does not know contents.

A recording must say which prompts share which blocks, or nobody can run its schedule again; and it must say nothing
about what is in them. So it names a block by the number of the sequence that had it first and its place in that
sequence: those numbers tell who came with the same beginning as whom, and a guess at a text cannot be checked on them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from ..request import Request
from .kv_cache_manager import KVCacheManager

__all__ = ["MAX_KIN", "BlockOwners"]

MAX_KIN = 32
"""Runs of blocks of one owner that are told at once. Where there are more (a conversation of many turns), the first of
them stands for all before it as well: who had its blocks had those too, and has told whose they were."""
SPARE = 1024


class BlockOwners:
    """Numbers sequences, and remembers the first to have each block for as long as the block can be found.

    Args:
        kv: where blocks are found. Names that can be found no more are dropped, the oldest first, once there are as
            many as the pool has blocks: an equal block is a new one to any scheduler then.
    """

    def __init__(self, kv: KVCacheManager) -> None:
        self._kv = kv
        self._max_names = kv.pool.num_blocks + SPARE
        self._owners: OrderedDict[bytes, int] = OrderedDict()
        self._known: dict[Request, tuple[int, int]] = {}
        """By sequence that has not ended: its number, and how many of its blocks were looked at."""
        self._told: dict[Request, tuple[int, ...]] = {}
        self._num_entered = 0

    def enter(self, request: Request) -> int:
        """Return the number of a new sequence."""
        serial = self._num_entered
        self._known[request] = serial, 0
        self._num_entered += 1
        return serial

    def leave(self, request: Request) -> None:
        """Take out a sequence that has ended; its blocks stay known."""
        del self._known[request]
        self._told.pop(request, None)

    def kin(self, request: Request) -> tuple[int, ...]:
        """Look at all blocks of a sequence whose names are known: while it waited, some may have been dropped.

        Returns:
            Those that others had before, as `RequestEvent.kin` has them; nothing where that was told already.
        """
        self._known[request] = self._known[request][0], 0
        runs = list(self._runs(request))
        if len(runs) > MAX_KIN:
            (_, first, _), (owner, _, end) = runs[0], runs[-MAX_KIN]
            runs = [(owner, first, end), *runs[1 - MAX_KIN :]][:MAX_KIN]
        kin = tuple(number for run in runs for number in run)
        if kin == self._told.get(request, ()):
            return ()
        self._told[request] = kin
        return kin

    def filled(self, request: Request) -> Iterable[tuple[int, int, int, int]]:
        """Look at the blocks that have got a name since then; each of these as `StepEvent.kin` has it."""
        serial, num_blocks = self._known[request]
        if len(request.digests) - 1 == num_blocks:
            return ()
        return [(serial, *run) for run in self._runs(request)]

    def _runs(self, request: Request) -> Iterator[tuple[int, int, int]]:
        serial, start = self._known[request]
        names, owners = request.digests, self._owners
        end = max(start, len(names) - 1)
        self._known[request] = serial, end
        first, owner = start, serial
        for i in range(start, end):
            now = owners.setdefault(names[i + 1], serial)
            if now != owner:
                if owner != serial:
                    yield owner, first, i
                first, owner = i, now
        if owner != serial:
            yield owner, first, end
        self._drop(2 * (end - start))

    def _drop(self, count: int) -> None:
        """Look at the oldest names, as long as there are too many, and drop those of blocks nobody can find."""
        owners, kv = self._owners, self._kv
        for _ in range(min(count, len(owners) - self._max_names)):
            name, owner = owners.popitem(last=False)
            if kv.pool.has(name) or kv.is_pending(name):
                owners[name] = owner
