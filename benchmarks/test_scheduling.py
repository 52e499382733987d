"""Micro benchmarks of scheduling: a decode step, an admission, the block pool, the hashing of a prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import BlockPool
from octavo.engine.scheduler.block_hash import extend_chain, root_digest

from benchmarks.scheduler import TOKEN, make_core

NUM_STEPS = 400
PROMPT_TOKENS = 1024


@pytest.mark.parametrize("num_seqs", [32, 256, 1024])
def test_decode_step(num_seqs: int, benchmark: Any) -> None:
    """Schedule and update, and the call of a runner that does nothing."""
    core = make_core(num_seqs, 100, 3 * NUM_STEPS)
    for i in range(num_seqs):
        core.add_request(str(i), [TOKEN] * (37 + i % 63), SamplingParams(max_tokens=3 * NUM_STEPS))
    while core.scheduler.stats.num_waiting:
        core.step()
    for _ in range(2):
        core.step()
    benchmark.pedantic(core.step, rounds=NUM_STEPS, warmup_rounds=8)
    core.scheduler.check_integrity()
    assert len(core.scheduler.running_requests()) == num_seqs


@pytest.mark.parametrize("cached", [False, True], ids=["cold", "hit"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_admission(block_size: int, cached: bool, benchmark: Any) -> None:
    """The step that admits one prompt of 1,024 tokens, hashing included."""
    core = make_core(4, PROMPT_TOKENS, 400 * PROMPT_TOKENS, block_size)
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 50_000, PROMPT_TOKENS).tolist()
    names = iter(range(10**6))

    def finish_and_add() -> tuple[tuple[()], dict[str, Any]]:
        nonlocal prompt
        while core.has_unfinished:
            core.scheduler.update(state["work"], core.runner.execute(state["work"]))
        if not cached:
            prompt = rng.integers(1, 50_000, PROMPT_TOKENS).tolist()
        core.add_request(str(next(names)), prompt, SamplingParams(max_tokens=1))
        return (), {}

    state: dict[str, Any] = {}

    def admit() -> None:
        state["work"] = core.scheduler.schedule()

    finish_and_add()
    admit()
    benchmark.pedantic(admit, setup=finish_and_add, rounds=100)
    assert (state["work"].num_computed_tokens[0] > 0) == cached


def test_pool(benchmark: Any) -> None:
    """Take and release a thousand blocks."""
    pool = BlockPool(1024)

    def cycle() -> None:
        blocks = [pool.take() for _ in range(1000)]
        pool.release(reversed(blocks))

    benchmark(cycle)
    pool.check_integrity()
    assert pool.num_free == 1024


@pytest.mark.parametrize("block_size", [16, 64])
def test_hashing(block_size: int, benchmark: Any) -> None:
    """The chain of names of a prompt of 1,024 tokens."""
    token_bytes = np.arange(PROMPT_TOKENS, dtype=np.int32).tobytes()

    def chain() -> list[bytes]:
        names = [root_digest("model", "salt")]
        extend_chain(names, token_bytes, 4 * block_size)
        return names

    assert len(set(benchmark(chain))) == 1 + PROMPT_TOKENS // block_size
