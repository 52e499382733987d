"""This module holds the block tables of running rows and what of them is shared. It does not know budgets or order.

Who owns what, over the tokens of one running row (every interval is half open, in tokens):

    0          hit           full           computed     scheduled      capacity
    |-----------|--------------|----------------|-------------|--------------|
    | shared    | own, cached  | own, filling   | this step   | lookahead    |

    [0, hit)               full blocks found by their digest at admission. Several tables may hold them; nobody writes
                           them. hit is a multiple of block_size and below num_tokens: the last token always runs.
    [hit, full)            full blocks this row has computed and offered to the cache. Nobody writes them any more.
                           Where another row was first with the same content, the copy here stays private.
    [full, computed)       less than a block: in use by this row only.
    [computed, scheduled)  written in this step, always in blocks with one reference that are not cached.
    [scheduled, capacity)  the rest of the last block; nothing in it is relied on.

A table only grows. A row's blocks are given back all at once, last block first, when it finishes or is preempted; those
that are cached can be found by anyone, itself included, until the pool hands them out again.

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

What may never be added here: work per step that grows with the length of a sequence. Only admission and release may
walk a table.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..request import Request
from .block_hash import TOKEN_BYTES, block_digest, extend_chain, root_digest
from .block_pool import NULL_BLOCK, BlockPool, CachedBlock
from .limits import SchedulerLimits

__all__ = ["KVCacheManager", "Prefix"]

Int32Array = npt.NDArray[np.int32]
NEVER = np.iinfo(np.int32).max


class Prefix(NamedTuple):
    """What a request would find at admission."""

    blocks: list[int]
    """Blocks it can share, from the first token on."""
    num_tokens: int
    """Tokens they hold: its prefix hit."""
    demand: int
    """Free blocks it takes to hold its tokens and one more, those of `blocks` that are free now included."""
    next_digest: bytes | None
    """Name of the first block that was not found and could be shared; None: there is none."""


class KVCacheManager:
    """Block tables by row, over one pool.

    Args:
        limits: the scheduler's.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.pool = BlockPool(limits.num_blocks)
        self.block_size = limits.block_size
        self.caching = limits.prefix_caching
        self.tables: list[list[int]] = [[] for _ in range(limits.max_num_seqs)]
        self.capacity: Int32Array = np.zeros(limits.max_num_seqs, dtype=np.int32)
        """By row: tokens its blocks hold."""
        self.next_full: Int32Array = np.full(limits.max_num_seqs, NEVER, dtype=np.int32)
        """By row: once so many tokens are computed, its next block is full; NEVER without prefix caching."""
        self._model_id = limits.model_id
        self._always_miss = limits.faults.miss_prefix_cache
        self._block_bytes = TOKEN_BYTES * limits.block_size
        # Digests of blocks that running rows are about to compute from tokens known at their admission, and by whom.
        self._pending: dict[bytes, int] = {}

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def look_up(self, request: Request) -> Prefix:
        """Find the longest prefix of a request that is cached. Takes no reference.

        The last token is never part of it, since its logits are wanted. A request that still owes prompt
        log-probabilities finds nothing: they come from computing every position.
        """
        num_tokens = len(request.token_ids)
        blocks: list[int] = []
        next_digest: bytes | None = None
        if self.caching and not self._always_miss and not request.owes_prompt_logprobs:
            data = self._extend_chain(request)
            chain, size, find = request.digests, self._block_bytes, self.pool.find
            for i in range((num_tokens - 1) // self.block_size):
                block = find(CachedBlock(chain[i + 1], chain[i], data[i * size : (i + 1) * size]))
                if block is None:
                    next_digest = chain[i + 1]
                    break
                blocks.append(block)
        ref_counts = self.pool.ref_counts
        num_free_hits = sum(1 for block in blocks if ref_counts[block] == 0)
        num_needed = self.num_blocks_for(num_tokens + 1)
        return Prefix(blocks, len(blocks) * self.block_size, num_needed - len(blocks) + num_free_hits, next_digest)

    @property
    def has_pending(self) -> bool:
        """Whether any running row is about to compute a block it has announced."""
        return bool(self._pending)

    def is_pending(self, digest: bytes | None) -> bool:
        """Whether a running row is about to compute the block of this name."""
        return digest in self._pending

    def admit(self, row: int, request: Request, prefix: Prefix) -> None:
        """Give a new row the blocks of its prefix, and announce the full blocks it will compute."""
        assert not self.tables[row], f"row {row} still has blocks"
        for block in prefix.blocks:
            self.pool.share(block)
        self.tables[row] = prefix.blocks.copy()
        self.capacity[row] = prefix.num_tokens
        if self.caching:
            self._extend_chain(request)
            self.next_full[row] = prefix.num_tokens + self.block_size
            for digest in request.digests[1 + len(prefix.blocks) :]:
                self._pending.setdefault(digest, row)

    def grow(self, row: int, count: int) -> list[int]:
        """Append `count` free blocks to a row's table and return them."""
        blocks = [self.pool.take() for _ in range(count)]
        self.tables[row] += blocks
        self.capacity[row] += count * self.block_size
        return blocks

    def cache_full_blocks(self, row: int, request: Request, token_ids: Int32Array, num_computed_tokens: int) -> None:
        """Offer the blocks of a row that have become full to the cache; the first copy of a content wins.

        Args:
            row: the request's row.
            token_ids: [>= num_computed_tokens] int32, the row's tokens.
            num_computed_tokens: tokens whose KV is computed.
        """
        chain, table, size = request.digests, self.tables[row], self.block_size
        end = int(self.next_full[row])
        while end <= num_computed_tokens:
            i = end // size
            data = token_ids[end - size : end].tobytes()
            if len(chain) == i:
                chain.append(block_digest(chain[-1], data))
            self.pool.cache(table[i - 1], CachedBlock(chain[i], chain[i - 1], data))
            self._forget_pending(chain[i], row)
            end += size
        self.next_full[row] = end

    def release(self, row: int, request: Request, *, forget: bool = False) -> None:
        """Give back all blocks of a row, last first.

        Args:
            row: the request's row.
            request: who had it.
            forget: what is in the blocks cannot be trusted: nobody may find them any more.
        """
        table = self.tables[row]
        if self.caching:
            for digest in request.digests[int(self.next_full[row]) // self.block_size :]:
                self._forget_pending(digest, row)
        if forget:
            for block in table:
                self.pool.forget(block)
        self.pool.release(reversed(table))
        self.tables[row] = []
        self.capacity[row] = 0
        self.next_full[row] = NEVER

    def check_integrity(self, running: dict[int, Request]) -> None:
        """Assert every invariant of tables and pool: for tests.

        Args:
            running: row -> request of the rows that run.
        """
        self.pool.check_integrity()
        ref_counts = [0] * (self.pool.num_blocks + 1)
        for row, table in enumerate(self.tables):
            assert not table or row in running, f"row {row} is free but has blocks {table}"
            assert NULL_BLOCK not in table, f"row {row} has the null block"
            assert len(set(table)) == len(table), f"row {row} has a block twice: {table}"
            assert self.capacity[row] == len(table) * self.block_size, f"row {row}: capacity {self.capacity[row]}"
            for block in table:
                ref_counts[block] += 1
        assert ref_counts == self.pool.ref_counts.tolist(), "reference counts differ from the tables"
        for digest, row in self._pending.items():
            assert row in running, f"row {row} is free but still announces a block"
            assert digest in running[row].digests, f"row {row} announces a block that is not its own"

    def _extend_chain(self, request: Request) -> bytes:
        if not request.digests:
            request.digests.append(root_digest(self._model_id, request.cache_salt))
        data = request.token_ids.tobytes()
        extend_chain(request.digests, data, self._block_bytes)
        return data

    def _forget_pending(self, digest: bytes, row: int) -> None:
        if self._pending.get(digest) == row:
            del self._pending[digest]
