"""This module holds the pool of KV blocks: who uses which, and which can be found again. It does not know requests.

A block is in one of three states:

    used              reference count >= 1, not in the free list, perhaps cached (it can be found by its digest)
    free and cached   reference count 0, in the free list, still found by its digest until it is taken
    free              reference count 0, in the free list, nothing in it is worth keeping

The free list is doubly linked through two lists of ints, so taking, sharing and releasing are O(1). Its head is taken
first: blocks that are not cached go back to the head, cached ones to the tail, so that a cached block is lost only when
nothing else is left, and of those the one that was released first. Block 0 is the null block: it pads tables, is never
handed out, and here serves as head and tail of the ring.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["NULL_BLOCK", "BlockPool", "CachedBlock"]

NULL_BLOCK = 0


class CachedBlock(NamedTuple):
    """What a cached block holds, to be compared on every hit."""

    digest: bytes
    parent: bytes
    """Digest of the block before it, or the root of its chain."""
    token_bytes: bytes


class BlockPool:
    """Blocks 1 to num_blocks, counted by reference.

    Args:
        num_blocks: size of the pool, without the null block.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        # Counts and marks are buffers that numpy can look at as they are, for `states`.
        self.ref_counts = array("i", bytes(4 * (num_blocks + 1)))
        self._next = [*range(1, num_blocks + 1), NULL_BLOCK]
        self._previous = [num_blocks, *range(num_blocks)]
        self._cached: list[CachedBlock | None] = [None] * (num_blocks + 1)
        self._is_cached = bytearray(num_blocks + 1)
        self._by_digest: dict[bytes, int] = {}

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their digest, used or free."""
        return len(self._by_digest)

    def take(self) -> int:
        """Hand out a free block with one reference; whatever was in it is forgotten."""
        assert self.num_free > 0, "take() from an empty pool"
        block: int = self._next[NULL_BLOCK]
        self._unlink(block)
        if self._cached[block] is not None:
            self.forget(block)
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block found by its digest."""
        if self.ref_counts[block] == 0:
            self._unlink(block)
        self.ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each; of the cached ones among them the first given is the first to be lost."""
        ref_counts = self.ref_counts
        for block in blocks:
            count = ref_counts[block] - 1
            assert count >= 0, f"block {block} is released but free"
            ref_counts[block] = count
            if count == 0:
                self._link(block, at_tail=self._cached[block] is not None)

    def cache(self, block: int, entry: CachedBlock) -> bool:
        """Make a used block findable; False, and nothing changed, where its digest is already taken."""
        assert self.ref_counts[block] > 0, f"block {block} is cached but free"
        assert self._cached[block] is None, f"block {block} is cached twice"
        if entry.digest in self._by_digest:
            return False
        self._by_digest[entry.digest] = block
        self._cached[block] = entry
        self._is_cached[block] = True
        return True

    def find(self, entry: CachedBlock) -> int | None:
        """Return the block that holds exactly this, or None. Takes no reference."""
        block = self._by_digest.get(entry.digest)
        if block is None or self._cached[block] != entry:
            return None
        return block

    def has(self, digest: bytes | None) -> bool:
        """Whether a block of this digest can be found."""
        return digest in self._by_digest

    def cached_entry(self, block: int) -> CachedBlock | None:
        """Return what the cache believes is in a block, or None where it cannot be found."""
        return self._cached[block]

    def forget(self, block: int) -> None:
        """Make a block impossible to find; who uses it keeps it."""
        entry = self._cached[block]
        if entry is not None:
            self._cached[block] = None
            self._is_cached[block] = False
            del self._by_digest[entry.digest]

    def forget_all(self) -> None:
        """Empty the cache; used blocks stay used, free ones free."""
        self._by_digest.clear()
        self._cached = [None] * (self.num_blocks + 1)
        self._is_cached = bytearray(self.num_blocks + 1)

    def states(self) -> npt.NDArray[np.uint8]:
        """Return the `BlockState` of blocks 1 to num_blocks: [num_blocks]."""
        ref_counts = np.frombuffer(self.ref_counts, dtype=np.int32)[1:]
        states = np.minimum(ref_counts, 2).astype(np.uint8)
        states += states > 0
        return np.where(states, states, np.frombuffer(self._is_cached, dtype=np.uint8)[1:])

    def free_blocks(self) -> list[int]:
        """Return the free blocks in the order in which they would be taken."""
        blocks = []
        block: int = self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            blocks.append(block)
            assert len(blocks) <= self.num_blocks, "the free list does not end"
            block = self._next[block]
        return blocks

    def check_integrity(self) -> None:
        """Assert every invariant of the pool: for tests, O(num_blocks)."""
        free = self.free_blocks()
        assert len(free) == self.num_free, f"{len(free)} blocks in the free list, {self.num_free} counted"
        unused = {block for block in range(1, self.num_blocks + 1) if self.ref_counts[block] == 0}
        assert unused == set(free), f"free list and reference counts differ in blocks {sorted(unused ^ set(free))}"
        assert self.ref_counts[NULL_BLOCK] == 0, "the null block is used"
        assert min(self.ref_counts) >= 0, "a reference count is negative"
        before = NULL_BLOCK
        for block in [*free, NULL_BLOCK]:
            assert self._previous[block] == before, f"the free list is not the same backwards at block {block}"
            before = block
        marked = [block for block, entry in enumerate(self._cached) if entry is not None]
        assert np.flatnonzero(np.frombuffer(self._is_cached, dtype=np.uint8)).tolist() == marked, "cached and marked"
        named = {block: entry.digest for block, entry in enumerate(self._cached) if entry is not None}
        assert named == {block: digest for digest, block in self._by_digest.items()}, "cached blocks and digests differ"

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self.num_free -= 1

    def _link(self, block: int, *, at_tail: bool) -> None:
        before = self._previous[NULL_BLOCK] if at_tail else NULL_BLOCK
        after = self._next[before]
        self._next[before] = block
        self._previous[block] = before
        self._next[block] = after
        self._previous[after] = block
        self.num_free += 1
