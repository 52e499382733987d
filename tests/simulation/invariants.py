"""This module holds what must be true of a scheduler after every step, checked from outside. It does not know why.

It recomputes everything from the block tables, the work handed out and the hashes in the fake KV cache, and trusts
neither reference counts nor the cache's own names.
"""

from __future__ import annotations

from hashlib import sha256
from itertools import chain

import numpy as np
from octavo.engine.request import Request
from octavo.engine.runner.fake_runner import FakeRunner, kv_after
from octavo.engine.scheduler import Scheduler
from octavo.engine.scheduler.block_hash import root_digest
from octavo.engine.scheduler.block_pool import CachedBlock
from octavo.engine.step import MAX_DECODE_QUERY_LEN, SchedulerOutput

from .client import Sequence, check

__all__ = ["Invariants"]


class Invariants:
    """Watches one scheduler.

    Args:
        scheduler: the real one.
        runner: whose KV cache is read back.
        sequences: what users know, by (request_id, index).
        salts: all there are.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: FakeRunner,
        sequences: dict[tuple[str, int], Sequence],
        salts: tuple[str, ...],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._sequences = sequences
        self.held: list[int] = []
        """Blocks taken out of the pool from outside."""
        num_blocks = scheduler.limits.num_blocks
        self._entries: list[CachedBlock | None] = [None] * (num_blocks + 1)
        # Digest -> (KV sum at its end, tokens up to there, salt): what a block of that name must hold.
        self._prefixes = {root_digest(scheduler.limits.model_id, f"0:{salt}"): (0, 0, salt) for salt in salts}

    def sequence(self, request: Request) -> Sequence:
        return self._sequences[request.request_id, request.index]

    def check_work(self, work: SchedulerOutput, oldest: Request | None) -> None:
        """Check a step before it runs.

        Args:
            work: the step.
            oldest: the first running request in service order before it was made, if it may not be preempted.
        """
        scheduler, limits = self._scheduler, self._scheduler.limits
        counts, rows = work.num_scheduled_tokens, work.rows
        check("I7", counts.min() >= 1, f"a row runs {counts.min()} tokens")
        check("I7", work.num_tokens == counts.sum() <= limits.max_num_batched_tokens, f"{work.num_tokens} tokens")
        check("I7", len(rows) <= limits.max_num_seqs and len(set(rows.tolist())) == len(rows), "rows")
        short = counts <= MAX_DECODE_QUERY_LEN
        check("I7", short[: work.num_decodes].all() and not short[work.num_decodes :].any(), "decodes are not first")
        check("I7", counts[short].sum() == work.num_decode_tokens, "decode tokens are miscounted")
        ends = work.num_computed_tokens + counts
        # What the device has, tokens that it alone knows included.
        known = self._runner.num_tokens.copy()
        for new in work.new_sequences:
            known[new.row] = len(new.token_ids)
        num_tokens = known[rows]
        check("I7", (ends <= num_tokens).all(), "a row runs tokens it does not have")
        check("I7", (ends < scheduler.rows.max_num_tokens[rows]).all(), "a row runs past its end")
        check("I7", np.flatnonzero(ends == num_tokens).tolist() == work.sampled.tolist(), "the wrong rows sample")
        check("I4", (ends <= scheduler.kv.capacity[rows]).all(), "a table does not cover what runs")
        if oldest is not None:
            check("I10", oldest.row >= 0, f"{oldest.request_id}, the oldest, was preempted")
            stands_still = oldest.row not in rows and known[oldest.row] < oldest.max_num_tokens
            check("I10", not stands_still, f"{oldest.request_id}, the oldest, stands still")
        for new in work.new_sequences:
            self._check_admission(new.row)

    def _check_admission(self, row: int) -> None:
        scheduler = self._scheduler
        request = scheduler.rows.request(row)
        sequence = self.sequence(request)
        for waiting in scheduler.waiting.requests():
            overtaken = self.sequence(waiting)
            check("I10", overtaken.order > sequence.order, f"{request.request_id} overtakes {waiting.request_id}")
        num_hits = int(scheduler.rows.num_computed_tokens[row]) // scheduler.limits.block_size
        for block in scheduler.kv.tables[row][:num_hits]:
            entry = scheduler.kv.pool.cached_entry(block)
            check("I6", entry is not None, f"row {row} was admitted with block {block}, which nobody can find")
            salt = self._prefixes[entry.digest][2]
            check("I9", salt == sequence.salt, f"block {block} of salt {salt!r} is seen under {sequence.salt!r}")

    def check_writes(self, work: SchedulerOutput) -> None:
        """Check where a step writes: after the runner has taken over its tables."""
        size, runner, pool = self._runner.block_size, self._runner, self._scheduler.kv.pool
        slots: list[int] = []
        for row, start, count in zip(
            work.rows.tolist(), work.num_computed_tokens.tolist(), work.num_scheduled_tokens.tolist(), strict=True
        ):
            first, last = start // size, (start + count - 1) // size
            for column, block in enumerate(runner.block_table[row, first : last + 1].tolist(), first):
                check("I5", pool.ref_counts[block] == 1, f"row {row} writes block {block}, which is not its own")
                check("I5", pool.cached_entry(block) is None, f"row {row} writes block {block}, which is cached")
                low, high = max(start, column * size), min(start + count, (column + 1) * size)
                slots += range(block * size + low % size, block * size + low % size + high - low)
        check("I5", len(slots) == len(set(slots)) == work.num_tokens, "two tokens are written to one slot")

    def check_state(self) -> None:
        """Check pool, tables and queue between two steps."""
        scheduler = self._scheduler
        pool, tables = scheduler.kv.pool, scheduler.kv.tables
        used = list(chain.from_iterable(tables))
        used += self.held
        counts = np.bincount(used, minlength=pool.num_blocks + 1) if used else np.zeros(pool.num_blocks + 1)
        refs = np.array(pool.ref_counts)
        check("I1", (counts == refs).all(), f"reference counts {refs.tolist()}, tables say {counts.tolist()}")
        free = pool.free_blocks()
        check("I2", len(set(free)) == len(free) and not refs[free].any(), f"used blocks among the free {free}")
        check("I3", len(free) == pool.num_free, f"{len(free)} blocks in the free list, {pool.num_free} counted")
        check("I3", len(free) + np.count_nonzero(refs) == pool.num_blocks, "a block is lost")
        for row, table in enumerate(tables):
            if table:
                check("I4", len(set(table)) == len(table), f"row {row} has a block twice: {table}")
                check("I8", scheduler.rows.requests[row] is not None, f"row {row} has blocks and no request")
        for request in scheduler.waiting.requests():
            check("I8", request.row < 0, f"{request.request_id} waits and has row {request.row}")
        self._check_cache()

    def _check_cache(self) -> None:
        """Check every block that has become cached since the last time: its name and its contents."""
        pool = self._scheduler.kv.pool
        entries = [pool.cached_entry(block) for block in range(pool.num_blocks + 1)]
        check("I6", pool.num_cached == sum(entry is not None for entry in entries), "digests and cached blocks differ")
        changed = [block for block, entry in enumerate(entries) if entry is not self._entries[block]]
        self._entries = entries
        fresh = [block for block in changed if entries[block] is not None]
        if not fresh:
            return
        while fresh:
            known = [block for block in fresh if entries[block].parent in self._prefixes]
            check("I6", known, f"blocks {fresh} follow prefixes that nobody has computed")
            for block in known:
                self._check_fresh(block, entries[block])
            fresh = [block for block in fresh if block not in known]

    def _check_fresh(self, block: int, entry: CachedBlock) -> None:
        size = self._runner.block_size
        check("I6", self._scheduler.kv.pool.find(entry) == block, f"block {block} is not found by its digest")
        check("I6", len(entry.token_bytes) == 4 * size, f"block {block} is not full")
        name = sha256(entry.parent + entry.token_bytes).digest()
        check("I6", entry.digest == name, f"block {block} has another name than its prefix and tokens give")
        kv, position, salt = self._prefixes[entry.parent]
        held = self._runner.slots[block * size : (block + 1) * size].tolist()
        for offset, token in enumerate(np.frombuffer(entry.token_bytes, dtype=np.int32).tolist()):
            kv = kv_after(kv, token, position + offset)
            check("I6", held[offset] == kv, f"slot {offset} of block {block} does not hold what its name says")
        self._prefixes[entry.digest] = (kv, position + size, salt)
