"""What attention's result may depend on: chunking, neighbours and order change at most the last bits.

`BITWISE` says what each backend promises to the bit; the rest is held to a few float32 roundings.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from .attention_checks import call, same_bits
from .paged import Batch, Shape, gaussian

BITWISE: dict[str, set[str]] = {"torch": set(), "triton": {"order", "neighbours"}}
SEQS = ((1, 30), (1, 17), (1, 64), (1, 5))
OPS = ("paged_attention_prefill", "paged_attention_decode")


def _assert_same(a: Tensor, b: Tensor, backend: str, promise: str) -> None:
    if promise in BITWISE[backend]:
        assert same_bits(a, b), f"{backend} promises bitwise equality under {promise}"
    else:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def _take(batch: Batch, chosen: list[int]) -> Batch:
    """Return the batch of some of its sequences, in this order; query rows follow."""
    ends = torch.tensor([0] + [n for n, _ in batch.shape.seqs]).cumsum(0).tolist()
    return Batch(
        replace(batch.shape, seqs=tuple(batch.shape.seqs[s] for s in chosen)),
        torch.cat([batch.q[ends[s] : ends[s + 1]] for s in chosen]),
        [batch.keys[s] for s in chosen],
        [batch.values[s] for s in chosen],
    )


@pytest.mark.parametrize("op", OPS)
def test_order(backend: str, op: str) -> None:
    batch = gaussian(Shape(SEQS))
    order = [2, 0, 3, 1]
    out = call(op, batch.lay_out(1))
    moved = call(op, _take(batch, order).lay_out(2))
    _assert_same(moved, out[order], backend, "order")
    assert not torch.allclose(moved, out)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("s", range(len(SEQS)))
def test_neighbours(backend: str, op: str, s: int) -> None:
    batch = gaussian(Shape(SEQS))
    _assert_same(call(op, _take(batch, [s]).lay_out(3)), call(op, batch.lay_out(1))[s : s + 1], backend, "neighbours")


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks(backend: str, window: int | None, dtype: torch.dtype) -> None:
    """A prompt cut anywhere, by either op, is the prompt as a whole."""
    length = 41
    whole = gaussian(Shape(((length, length),), window=window, dtype=dtype, group_size=3))
    expected = call(OPS[0], whole.lay_out())
    for size in (1, 5, 16, 17, 40):
        pieces = []
        for start in range(0, length, size):
            end = min(start + size, length)
            chunk = Batch(
                replace(whole.shape, seqs=((end - start, end),)),
                whole.q[start:end],
                [whole.keys[0][:end]],
                [whole.values[0][:end]],
            )
            pieces.append(call(OPS[size <= 16], chunk.lay_out(start)))
        _assert_same(torch.cat(pieces), expected, backend, "chunks")


def test_a_chunk_that_forgets_its_offset_differs(backend: str) -> None:
    batch = gaussian(Shape(((8, 41),)))
    right = call(OPS[0], batch.lay_out())
    wrong = replace(
        batch, shape=replace(batch.shape, seqs=((8, 8),)), keys=[batch.keys[0][:8]], values=[batch.values[0][:8]]
    )
    assert (call(OPS[0], wrong.lay_out()) - right).abs().max() > 0.1


def test_causality(backend: str) -> None:
    """Changing token t changes nothing before t, to the bit, and something at t."""
    batch = gaussian(Shape(((40, 40),)))
    before = call(OPS[0], batch.lay_out())
    for t in (1, 15, 16, 39):
        changed = batch.clone()
        changed.keys[0][t] += 1
        changed.values[0][t] += 1
        changed.q[t] += 1
        after = call(OPS[0], changed.lay_out())
        assert same_bits(after[:t], before[:t])
        assert not same_bits(after[t], before[t])
