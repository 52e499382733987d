"""This module holds the runner's rows and storage, against plain loops. It does not know a model."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from octavo.engine.config import DTypeName, ModelConfig
from octavo.engine.footprint import kv_pool_bytes
from octavo.engine.runner.input_batch import InputBatch
from octavo.engine.runner.kv_cache import allocate_kv_cache
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import NewSequence, SchedulerOutput

NONE = np.empty(0, dtype=np.int32)
MAX_LEN = 60


def make_step(
    rows: list[int],
    first: list[int],
    counts: list[int],
    new: tuple[NewSequence, ...] = (),
    blocks: tuple[tuple[int, int, int], ...] = (),
) -> SchedulerOutput:
    block_rows, columns, ids = np.array(blocks, dtype=np.int32).reshape(-1, 3).T
    return SchedulerOutput(
        step=0,
        removed_rows=NONE,
        new_sequences=new,
        rows=np.array(rows, dtype=np.int32),
        num_computed_tokens=np.array(first, dtype=np.int32),
        num_scheduled_tokens=np.array(counts, dtype=np.int32),
        num_tokens=sum(counts),
        num_decodes=0,
        num_decode_tokens=0,
        sampled=NONE,
        block_rows=block_rows,
        block_columns=columns,
        block_ids=ids,
    )


def make_sequence(row: int, tokens: list[int]) -> NewSequence:
    return NewSequence(row, np.array(tokens, dtype=np.int32), len(tokens), SamplingParams(), 0, 0, frozenset())


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_gather_is_what_a_loop_gathers(block_size: int, count: Callable[[int, int], int], seed: int) -> None:
    for trial in range(seed, seed + count(20, 400)):
        rng = random.Random(trial)
        batch = InputBatch(8, MAX_LEN, block_size)
        rows = rng.sample(range(8), rng.randint(1, 8))
        texts = {row: [rng.randrange(1000) for _ in range(rng.randint(1, MAX_LEN))] for row in rows}
        tables = {row: rng.sample(range(1, 1000), -(-len(text) // block_size)) for row, text in texts.items()}
        first = [rng.randrange(len(texts[row])) for row in rows]
        counts = [rng.choice((1, len(texts[row]) - start)) for row, start in zip(rows, first, strict=True)]
        step = make_step(
            rows,
            first,
            counts,
            tuple(make_sequence(row, text) for row, text in texts.items()),
            tuple((row, column, block) for row, table in tables.items() for column, block in enumerate(table)),
        )
        batch.apply(step)
        inputs = batch.gather(step)
        where = [
            (row, position)
            for row, start, num in zip(rows, first, counts, strict=True)
            for position in range(start, start + num)
        ]
        assert inputs.token_ids.tolist() == [texts[row][position] for row, position in where]
        assert inputs.positions.tolist() == [position for _, position in where]
        slots = [tables[row][at // block_size] * block_size + at % block_size for row, at in where]
        assert inputs.slot_mapping.tolist() == slots
        assert inputs.cu_seqlens_q.tolist() == [sum(counts[:i]) for i in range(len(rows) + 1)]
        assert inputs.seq_lens.tolist() == [start + num for start, num in zip(first, counts, strict=True)]
        for row, length, columns in zip(rows, inputs.seq_lens.tolist(), inputs.block_table, strict=True):
            num_blocks = -(-length // block_size)
            assert columns[:num_blocks].tolist() == tables[row][:num_blocks]


def test_slots_past_32_bits() -> None:
    """Block ids fit 32 bits; block id times block size need not."""
    batch = InputBatch(1, 64, 64)
    step = make_step([0], [3], [1], (make_sequence(0, [1, 2, 3, 4]),), ((0, 0, 2**31 - 1),))
    batch.apply(step)
    assert batch.gather(step).slot_mapping.tolist() == [(2**31 - 1) * 64 + 3]


def test_sampled_tokens_are_run_next() -> None:
    batch = InputBatch(4, MAX_LEN, 4)
    start = make_step([2, 0], [0, 0], [3, 1], (make_sequence(0, [7]), make_sequence(2, [1, 2, 3])))
    batch.apply(start)
    batch.append(start.rows, np.array([3, 1], dtype=np.int32), np.array([50, 60], dtype=np.int32))
    following = make_step([0, 2], [1, 3], [1, 1])
    batch.apply(following)
    assert batch.gather(following).token_ids.tolist() == [60, 50]


def test_a_token_past_the_length_limit_has_no_place() -> None:
    batch = InputBatch(2, 4, 4)
    batch.apply(make_step([0], [0], [4], (make_sequence(0, [1, 2, 3, 4]), make_sequence(1, [5, 6, 7, 8]))))
    batch.append(np.array([0, 1]), np.array([4, 3], dtype=np.int32), np.array([90, 91], dtype=np.int32))
    assert batch.token_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 91]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_is_zero_and_as_large_as_said(dtype: torch.dtype) -> None:
    config = ModelConfig("llama", 100, 64, 128, 3, 4, 2, 16, 256)
    cache = allocate_kv_cache(config, num_blocks=5, block_size=8, dtype=dtype, device=torch.device("cpu"))
    assert len(cache) == 3
    tensors = [tensor for layer in cache for tensor in layer]
    assert all(tensor.shape == (6, 2, 8, 16) and tensor.dtype is dtype for tensor in tensors)
    assert not any(tensor.any() for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == 6
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    name: DTypeName = "float32" if dtype == torch.float32 else "bfloat16"
    assert num_bytes == kv_pool_bytes(config, name, num_blocks=5, block_size=8)
