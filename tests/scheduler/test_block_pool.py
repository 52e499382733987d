"""This module holds what must be true of the block pool after any sequence of operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from octavo.engine.scheduler.block_hash import block_digest, extend_chain, root_digest
from octavo.engine.scheduler.block_pool import BlockPool, CachedBlock

NUM_BLOCKS = 6


def entry(name: int) -> CachedBlock:
    return CachedBlock(b"digest %d" % name, b"parent", b"tokens %d" % name)


class PoolMachine(RuleBasedStateMachine):
    """Compares the pool with a dict of owners and a plain list of what is free."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.owners: dict[int, int] = {}
        self.names: dict[int, int] = {}
        self.free = list(range(1, NUM_BLOCKS + 1))

    @precondition(lambda self: self.free)
    @rule()
    def take(self) -> None:
        expected = self.free.pop(0)
        assert self.pool.take() == expected
        self.owners[expected] = 1
        self.names.pop(expected, None)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.owners)), min_size=1, unique=True))
        self.pool.release(blocks)
        for block in blocks:
            self.owners[block] -= 1
            if self.owners[block] == 0:
                del self.owners[block]
                self.free.insert(len(self.free) if block in self.names else 0, block)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), name=st.integers(0, 4))
    def cache(self, data: st.DataObject, name: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.owners)))
        if block in self.names:
            return
        first = name not in self.names.values()
        assert self.pool.cache(block, entry(name)) == first
        if first:
            self.names[block] = name

    @rule(name=st.integers(0, 4))
    def share(self, name: int) -> None:
        block = self.pool.find(entry(name))
        assert block == next((b for b, n in self.names.items() if n == name), None)
        if block is not None:
            self.pool.share(block)
            self.owners[block] = self.owners.get(block, 0) + 1
            if block in self.free:
                self.free.remove(block)

    @rule(block=st.integers(1, NUM_BLOCKS))
    def forget(self, block: int) -> None:
        self.pool.forget(block)
        self.names.pop(block, None)

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        self.names.clear()

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free_blocks() == self.free
        assert {b: c for b, c in enumerate(self.pool.ref_counts) if c} == self.owners
        assert self.pool.num_cached == len(self.names)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(stateful_step_count=30)


def test_the_tail_of_a_released_table_is_lost_first() -> None:
    pool = BlockPool(3)
    table = [pool.take() for _ in range(3)]
    for i, block in enumerate(table):
        pool.cache(block, entry(i))
    pool.release(reversed(table))
    assert [pool.take(), pool.take()] == [table[2], table[1]]
    assert pool.find(entry(0)) == table[0]
    assert pool.find(entry(1)) is None


def test_a_block_that_is_not_cached_is_taken_before_one_that_is() -> None:
    pool = BlockPool(2)
    cached, other = pool.take(), pool.take()
    pool.cache(cached, entry(1))
    pool.release([cached])
    pool.release([other])
    assert pool.take() == other


def test_a_hit_is_compared_by_content_and_not_only_by_digest() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.cache(block, entry(1))
    assert pool.find(entry(1)._replace(token_bytes=b"others")) is None
    assert pool.find(entry(1)._replace(parent=b"another")) is None
    assert pool.find(entry(1)) == block


def test_releasing_a_free_block_is_an_error() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.release([block])
    with pytest.raises(AssertionError, match="released but free"):
        pool.release([block])


def test_taking_from_an_empty_pool_is_an_error() -> None:
    pool = BlockPool(1)
    pool.take()
    with pytest.raises(AssertionError, match="empty pool"):
        pool.take()


def test_roots_differ_by_model_and_salt_even_where_their_texts_join_alike() -> None:
    roots = {root_digest(model, salt) for model, salt in [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]}
    assert len(roots) == 4
    assert root_digest("ab", "c") == root_digest("ab", "c")


def test_a_chain_goes_on_where_it_ended() -> None:
    tokens = bytes(range(32))
    whole, parts = [b"root"], [b"root"]
    extend_chain(whole, tokens, 8)
    for end in (3, 8, 17, 32):
        extend_chain(parts, tokens[:end], 8)
    assert whole == parts
    assert len(whole) == 5
    assert whole[2] == block_digest(whole[1], tokens[8:16])
