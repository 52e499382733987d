"""This module holds bugs that allocators and schedulers have been shipped with. It does not know who finds them.

Each is a function that breaks the real classes through a `MonkeyPatch`. All must be found by an invariant of the
simulator, by name: a crash, or an assertion inside the engine, does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import pytest
from octavo.engine.request import Request, RowTable
from octavo.engine.scheduler import BlockPool, KVCacheManager, Scheduler, kv_cache_manager
from octavo.engine.scheduler.batch import NewBlocks
from octavo.engine.scheduler.block_pool import NULL_BLOCK, CachedBlock
from octavo.engine.scheduler.flights import Flight, Flights
from octavo.engine.scheduler.kv_cache_manager import Prefix
from octavo.engine.step import EngineOutput, ModelOutput, SchedulerOutput

__all__ = ["PLANTED", "PLANTED_IN_OVERLAP", "Bug"]

Patch = pytest.MonkeyPatch


class Bug(NamedTuple):
    """How to plant a bug, and the scenario settings under which it shows."""

    plant: Callable[[Patch], None]
    settings: list[str]
    caught_by: set[str]
    """Invariants of which one must be the first to notice."""


def _leak_on_abort(patch: Patch) -> None:
    abort, release = Scheduler.abort, BlockPool.release
    aborting: list[bool] = []

    def leaky(self: Scheduler, request_id: str) -> list[EngineOutput]:
        aborting.append(True)
        try:
            return abort(self, request_id)
        finally:
            aborting.pop()

    patch.setattr(Scheduler, "abort", leaky)
    patch.setattr(BlockPool, "release", lambda self, blocks: None if aborting else release(self, blocks))


def _stale_hash_map(patch: Patch) -> None:
    take = BlockPool.take

    def stale(self: BlockPool) -> int:
        entry = self._cached[self._next[NULL_BLOCK]]
        block = take(self)
        if entry is not None:
            self._cached[block] = entry
            self._by_digest[entry.digest] = block
        return block

    patch.setattr(BlockPool, "take", stale)


def _touch_without_counting(patch: Patch) -> None:
    def share(self: BlockPool, block: int) -> None:
        if self.ref_counts[block] == 0:
            self._unlink(block)
            self.ref_counts[block] = 1

    patch.setattr(BlockPool, "share", share)


def _touch_without_leaving_the_free_list(patch: Patch) -> None:
    def share(self: BlockPool, block: int) -> None:
        self.ref_counts[block] += 1

    patch.setattr(BlockPool, "share", share)


def _hash_without_parent(patch: Patch) -> None:
    def extend(chain: list[bytes], token_bytes: bytes, block_bytes: int) -> None:
        for start in range((len(chain) - 1) * block_bytes, len(token_bytes) - block_bytes + 1, block_bytes):
            chain.append(sha256(token_bytes[start : start + block_bytes]).digest())

    patch.setattr(kv_cache_manager, "extend_chain", extend)
    patch.setattr(kv_cache_manager, "block_digest", lambda parent, token_bytes: sha256(token_bytes).digest())


def _hash_without_salt(patch: Patch) -> None:
    root = kv_cache_manager.root_digest
    patch.setattr(kv_cache_manager, "root_digest", lambda model_id, salt: root(model_id, "0:"))


def _full_hit(patch: Patch) -> None:
    look_up = KVCacheManager.look_up

    def greedy(self: KVCacheManager, request: Request) -> Prefix:
        """Take the last full block too, even where it holds the last token."""
        prefix = look_up(self, request)
        i = len(prefix.blocks)
        end = (i + 1) * self.block_size
        if self.caching and end == len(request.token_ids) and len(request.digests) > i + 1:
            data = request.token_ids[end - self.block_size :].tobytes()
            block = self.pool.find(CachedBlock(request.digests[i + 1], request.digests[i], data))
            if block is not None:
                return prefix._replace(blocks=[*prefix.blocks, block], num_tokens=end)
        return prefix

    patch.setattr(KVCacheManager, "look_up", greedy)


def _preempt_keeps_computed(patch: Patch) -> None:
    preempt, look_up = Scheduler._preempt, KVCacheManager.look_up
    kept: dict[int, int] = {}

    def forgetful(self: Scheduler, row: int) -> None:
        kept[id(self.rows.request(row))] = int(self.rows.num_computed_tokens[row])
        preempt(self, row)

    def remembers(self: KVCacheManager, request: Request) -> Prefix:
        prefix = look_up(self, request)
        return prefix._replace(num_tokens=max(prefix.num_tokens, kept.pop(id(request), 0)))

    patch.setattr(Scheduler, "_preempt", forgetful)
    patch.setattr(KVCacheManager, "look_up", remembers)


def _preempt_to_the_back(patch: Patch) -> None:
    preempt = Scheduler._preempt

    def to_the_back(self: Scheduler, row: int) -> None:
        self.rows.request(row).arrival += 1000
        preempt(self, row)

    patch.setattr(Scheduler, "_preempt", to_the_back)


def _floor_blocks(patch: Patch) -> None:
    patch.setattr(KVCacheManager, "num_blocks_for", lambda self, num_tokens: num_tokens // self.block_size)


def _wrong_slot_at_edge(patch: Patch) -> None:
    add = NewBlocks.add

    def off_by_one(self: NewBlocks, row: int, first_column: int, blocks: list[int]) -> None:
        """Put a block that a decoding row gets where the block before it is."""
        add(self, row, first_column - (first_column > 0 and len(blocks) == 1), blocks)

    patch.setattr(NewBlocks, "add", off_by_one)


def _partial_block_cached(patch: Patch) -> None:
    cache_full_blocks = KVCacheManager.cache_full_blocks
    admit = KVCacheManager.admit

    def early(self: KVCacheManager, row: int, request: Request, prefix: Prefix) -> None:
        admit(self, row, request, prefix)
        self.next_full[row] -= self.caching

    def rounded_up(self: KVCacheManager, row: int, request: Request, token_ids: Any, num_computed_tokens: int) -> None:
        self.next_full[row] += 1
        cache_full_blocks(self, row, request, token_ids, num_computed_tokens + 1)
        self.next_full[row] -= 1

    patch.setattr(KVCacheManager, "admit", early)
    patch.setattr(KVCacheManager, "cache_full_blocks", rounded_up)


def _double_free(patch: Patch) -> None:
    release = BlockPool.release

    def twice(self: BlockPool, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        release(self, blocks)
        release(self, [block for block in blocks if self.ref_counts[block] > 0])

    patch.setattr(BlockPool, "release", twice)


def _oldest_preempted(patch: Patch) -> None:
    give_blocks = Scheduler._give_blocks

    def preempts_the_oldest(self: Scheduler, short: Any, ends: Any, counts: Any, blocks: Any) -> Any:
        if self.kv.pool.num_free == 0 and len(self.order) > 1:
            self._preempt(int(self.order.rows[0]))
            self.order.drop_released()
            return self._schedule_running(blocks)
        return give_blocks(self, short, ends, counts, blocks)

    patch.setattr(Scheduler, "_give_blocks", preempts_the_oldest)


def _output_lost(patch: Patch) -> None:
    end = Scheduler._end
    patch.setattr(Scheduler, "_end", lambda self, request, how: end(self, request, how._replace(num_output_tokens=0)))


def _token_out_counted_twice(patch: Patch) -> None:
    def ahead(self: RowTable, rows: Any) -> Any:
        return np.maximum(
            self.num_tokens[rows], self.num_ahead[rows] + 1 + (self.num_ahead[rows] >= self.num_tokens[rows])
        )

    patch.setattr(RowTable, "num_tokens_ahead", ahead)


def _output_for_a_new_owner(patch: Patch) -> None:
    land = Scheduler._land

    def by_who_runs_now(self: Scheduler, work: SchedulerOutput) -> Flight:
        flight = land(self, work)
        flight.left[:] = [row for row in flight.left if not self.order.is_running[row]]
        return flight

    patch.setattr(Scheduler, "_land", by_who_runs_now)


def _given_away_and_cached_late(patch: Patch) -> None:
    """What a step fills is cached as it comes back, though the blocks were taken from their row while it was out."""
    preempt, update = Scheduler._preempt, Scheduler.update
    gone: dict[int, tuple[Request, list[int]]] = {}

    def remembers(self: Scheduler, row: int) -> None:
        gone[row] = self.rows.request(row), self.kv.tables[row].copy()
        preempt(self, row)

    def late(self: Scheduler, work: SchedulerOutput, output: ModelOutput) -> list[EngineOutput]:
        kv, flight = self.kv, self.flights._flights[0]
        for row, end in zip(flight.rows.tolist(), flight.ends.tolist(), strict=True):
            i, (request, table) = end // kv.block_size, gone.get(row, (None, []))
            if row in flight.left and request is not None and request.row < 0 and 0 < i <= len(table) and kv.caching:
                data, size = kv._extend_chain(request), 4 * kv.block_size
                block, chain = table[i - 1], request.digests
                free = kv.pool.ref_counts[block] > 0 and kv.pool.cached_entry(block) is None
                if free and i < len(chain):
                    kv.pool.cache(block, CachedBlock(chain[i], chain[i - 1], data[(i - 1) * size : i * size]))
        gone.clear()
        return update(self, work, output)

    patch.setattr(Scheduler, "_preempt", remembers)
    patch.setattr(Scheduler, "update", late)


def _past_the_end(patch: Patch) -> None:
    schedule = Scheduler.schedule

    def never_ends(self: Scheduler) -> SchedulerOutput | None:
        limits = self.rows.max_num_tokens
        self.rows.max_num_tokens = limits + 1
        try:
            return schedule(self)
        finally:
            self.rows.max_num_tokens = self.rows.max_num_tokens - 1

    patch.setattr(Scheduler, "schedule", never_ends)


def _preempted_keeps_what_is_out(patch: Patch) -> None:
    """The token that was out when its row was preempted is appended all the same, and sampled again."""
    land = Flights.land

    def landed(self: Flights, work: SchedulerOutput) -> Flight:
        flight = land(self, work)
        flight.left.clear()
        return flight

    patch.setattr(Flights, "land", landed)


def _later_failure_lost(patch: Patch) -> None:
    fail = Scheduler.fail

    def deaf(self: Scheduler, work: SchedulerOutput, message: str) -> list[EngineOutput]:
        return fail(self, work, message)[:-1]

    patch.setattr(Scheduler, "fail", deaf)


TIGHT = [
    "num_blocks=16",
    "block_size=4",
    "max_num_seqs=8",
    "max_num_batched_tokens=32",
    "prefix_caching=True",
    "faults=abort",
]
ROOMY = ["num_blocks=64", "block_size=2", *TIGHT[2:]]

PLANTED: dict[str, Bug] = {
    "leak on abort": Bug(_leak_on_abort, ROOMY, {"I1"}),
    "stale hash map": Bug(_stale_hash_map, TIGHT, {"I5", "I6"}),
    "touch without ref++": Bug(_touch_without_counting, ROOMY, {"I1"}),
    "touch without leaving the free list": Bug(_touch_without_leaving_the_free_list, ROOMY, {"I2", "I3"}),
    "hash without parent": Bug(_hash_without_parent, ROOMY, {"I6"}),
    "hash without salt": Bug(_hash_without_salt, ROOMY, {"I9"}),
    "full hit leaves 0 tokens": Bug(_full_hit, ROOMY, {"I7"}),
    "preempt keeps num_computed": Bug(_preempt_keeps_computed, TIGHT, {"I5", "I6"}),
    "preempted to the back": Bug(_preempt_to_the_back, TIGHT, {"I10"}),
    "floor blocks": Bug(_floor_blocks, TIGHT, {"I4"}),
    "wrong slot at block edge": Bug(_wrong_slot_at_edge, TIGHT, {"I5", "I12"}),
    "partial block cached": Bug(_partial_block_cached, ROOMY, {"I6"}),
    "double free": Bug(_double_free, ROOMY, {"I1"}),
    "oldest preempted": Bug(_oldest_preempted, TIGHT, {"I10"}),
    "output lost at the end": Bug(_output_lost, TIGHT, {"I12"}),
}

BUSY = [*TIGHT[:5], "overlap=True", "faults=abort,late,raise,preempt"]

PLANTED_IN_OVERLAP: dict[str, Bug] = {
    "token that is out counted twice": Bug(_token_out_counted_twice, BUSY, {"I7", "I12"}),
    "output applied to a row's new owner": Bug(_output_for_a_new_owner, BUSY, {"I7", "I12"}),
    "block given away is cached by a late step": Bug(_given_away_and_cached_late, BUSY, {"I5", "I6"}),
    "row past its last token scheduled": Bug(_past_the_end, BUSY, {"I7"}),
    "preempted token appended twice": Bug(_preempted_keeps_what_is_out, BUSY, {"I7", "I12"}),
    "failure of a step that is out lost": Bug(_later_failure_lost, BUSY, {"I10", "I11"}),
}
"""Those that need two steps to be out."""
