"""This module holds the runner's rows and storage, against plain loops. It does not know a model."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from octavo.engine.runner.input_batch import ON_DEVICE, InputBatch
from octavo.engine.runner.staging import HostCopy, Staging, room_for

from .by_hand import int32, make_sequence, make_step

MAX_LEN = 60


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
        num_decodes = rng.randint(0, len(rows))
        step = make_step(
            rows,
            first,
            counts,
            tuple(make_sequence(row, text) for row, text in texts.items()),
            [(row, column, block) for row, table in tables.items() for column, block in enumerate(table)],
            num_decodes=num_decodes,
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
        prefills = counts[num_decodes:]
        assert inputs.cu_seqlens_prefill.tolist() == [sum(prefills[:i]) for i in range(len(prefills) + 1)]
        assert inputs.seq_lens.tolist() == [start + num for start, num in zip(first, counts, strict=True)]
        for row, length, columns in zip(rows, inputs.seq_lens.tolist(), inputs.block_table, strict=True):
            num_blocks = -(-length // block_size)
            assert columns[:num_blocks].tolist() == tables[row][:num_blocks]
            assert batch.host_block_tables[row, : len(tables[row])].tolist() == tables[row]
        assert batch.staging.num_copies == 1


def test_slots_past_32_bits() -> None:
    """Block ids fit 32 bits; block id times block size need not."""
    batch = InputBatch(1, 64, 64)
    step = make_step([0], [3], [1], (make_sequence(0, [1, 2, 3, 4]),), ((0, 0, 2**31 - 1),))
    batch.apply(step)
    assert batch.gather(step).slot_mapping.tolist() == [(2**31 - 1) * 64 + 3]


def test_sampled_tokens_are_run_next() -> None:
    """From the device's table as long as the host does not know them, which may disagree only here."""
    batch = InputBatch(4, MAX_LEN, 4)
    start = make_step([2, 0], [0, 0], [3, 1], (make_sequence(0, [7]), make_sequence(2, [1, 2, 3])))
    batch.apply(start)
    rows, positions = start.rows, int32([3, 1])
    owners = batch.expect(rows, positions)
    batch.last_token_ids[torch.tensor([2, 0])] = torch.tensor([51, 61], dtype=torch.int32)
    following = make_step([0, 2], [1, 3], [1, 1])
    batch.apply(following)
    assert batch.gather(following).token_ids.tolist() == [61, 51]
    batch.note(rows, positions, owners, int32([50, 60]))
    assert batch.gather(following).token_ids.tolist() == [60, 50]


def test_tokens_of_rows_that_changed_hands_are_not_taken_in() -> None:
    batch = InputBatch(3, MAX_LEN, 4)
    batch.apply(make_step([0, 1, 2], [0] * 3, [1] * 3, tuple(make_sequence(row, [row, 9]) for row in range(3))))
    rows, positions = int32([0, 1, 2]), int32([2, 2, 2])
    owners = batch.expect(rows, positions)
    # Row 0 leaves; row 1 leaves and is given away; row 2 had not been taken out when it was given away.
    batch.apply(
        make_step([1], [0], [1], (make_sequence(1, [5, 6, 7, 8]), make_sequence(2, [1, 2, 3, 4])), removed=[0, 1])
    )
    batch.note(rows, positions, owners, int32([90, 91, 92]))
    assert batch.token_ids[:, 2].tolist() == [ON_DEVICE, 7, 3]


def test_a_last_token_at_the_length_limit_has_a_place_of_its_own() -> None:
    batch = InputBatch(2, 4, 4)
    batch.apply(make_step([0], [0], [4], (make_sequence(0, [1, 2, 3, 4]), make_sequence(1, [5, 6, 7, 8]))))
    rows, positions = int32([0, 1]), int32([4, 3])
    batch.note(rows, positions, batch.expect(rows, positions), int32([90, 91]))
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 90], [5, 6, 7, 91, batch.token_ids[1, 4]]]


@pytest.mark.parametrize("lengths", [(1, 2, 3), (0, 4, 0, 5), (0,), (16, 1, 8)])
def test_what_is_uploaded_comes_in_one_piece_and_aligned(lengths: tuple[int, ...]) -> None:
    staging, numbers = Staging(torch.device("cpu")), iter(range(100))
    arrays = [int32([next(numbers) for _ in range(length)]) for length in lengths]
    out = torch.full((room_for(*lengths) + 4,), -7, dtype=torch.int32)
    for tensors in (staging.upload(*arrays), staging.upload(*arrays, out=out)):
        assert [tensor.tolist() for tensor in tensors] == [array.tolist() for array in arrays]
        assert all(tensor.storage_offset() % 4 == 0 for tensor in tensors)
    assert out[room_for(*lengths) :].tolist() == [-7] * 4
    assert staging.num_copies == 2


def test_on_a_cpu_nothing_is_copied_back() -> None:
    tensors = [torch.ones(3), torch.zeros(2)]
    found = HostCopy(tensors, torch.device("cpu")).wait()
    assert [tensor.data_ptr() for tensor in found] == [tensor.data_ptr() for tensor in tensors]
