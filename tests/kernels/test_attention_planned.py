"""Attention with a plan made beforehand: the same checks, and what a plan promises to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.kernels import dispatch

from . import oracle
from .attention_checks import EXACT, EXACT_WINDOW, INVARIANCE, call, same_bits
from .paged import Batch, Shape, gaussian
from .planned import DECODE, PREFILL, plans
from .rounding import assert_rounding

OPS = (PREFILL, DECODE, "plan_paged_attention")
# A plan is made for sequences that have a key for each of their query rows.
LEFT_OUT = ("sees_nothing", "infinite_sinks", "quantised_needle")
CHECKS = {name: check for name, check in (EXACT | INVARIANCE).items() if name not in LEFT_OUT}
PLANS = [(backend, invariant) for backend in dispatch.available_backends(*OPS) for invariant in (False, True)]
READS_THE_LIST = ("counting", "poison", "padding_untouched", "blocks_permuted")
"""In the small tier, on Triton: without a plan the op makes one like the first for itself; for the other kind, which
another kernel computes, `test_attention_invariant` has more."""
SHAPES = [
    (PREFILL, Shape(((1, 1), (17, 17), (0, 9), (3, 65)))),
    (PREFILL, Shape(((33, 48), (2, 20)), num_kv_heads=1, group_size=7, block_size=5, window=16)),
    (PREFILL, Shape(((33, 48), (2, 20)), num_kv_heads=1, group_size=7, block_size=16, window=16)),
    (DECODE, Shape(((1, 33), (1, 16), (0, 9), (1, 1), (1, 65)))),
    (DECODE, Shape(((3, 40), (1, 32), (16, 16), (1, 20)), num_kv_heads=1, group_size=3, window=7)),
    (DECODE, Shape(((1, 513), (1, 512)), num_kv_heads=1, block_size=64)),
    (DECODE, Shape(((1, 513), (1, 512)), num_kv_heads=1, block_size=64, dtype=torch.float64)),
]


def _other_order(plan: Any) -> Any:
    """Return a plan with its list of work, where it has one, in reverse: items without work first."""
    return dataclasses.replace(plan, items=plan.items.flip(0).contiguous()) if hasattr(plan, "items") else plan


@pytest.mark.parametrize(("op", "shape"), SHAPES, ids=lambda v: v.name if isinstance(v, Shape) else v[16:])
@pytest.mark.parametrize(("backend", "invariant"), PLANS, indirect=["backend"])
def test_checks(backend: str, invariant: bool, op: str, shape: Shape, tier: str) -> None:
    checks = CHECKS | (EXACT_WINDOW if shape.window is not None else {})
    if backend == "triton" and tier == "test":
        checks = {name: checks[name] for name in READS_THE_LIST}
    with plans(invariant):
        for check in checks.values():
            check(op, shape)


@pytest.mark.parametrize(("op", "shape"), SHAPES[:-1], ids=lambda v: v.name if isinstance(v, Shape) else v[16:])
@pytest.mark.parametrize(("backend", "invariant"), PLANS, indirect=["backend"])
def test_rounding(backend: str, invariant: bool, op: str, shape: Shape) -> None:
    inputs = gaussian(shape).lay_out()
    with plans(invariant):
        out = call(op, inputs)
    plain = [attend(inputs, torch.float32)[0] for attend in (oracle.attention, oracle.plain_attention)]
    assert_rounding("attention", out, oracle.attention(inputs)[0], plain)


def _row_alone(op: str, batch: Batch, s: int, row: int, position: int) -> torch.Tensor:
    """Return one query row's result when it is the only row of the only sequence."""
    end = position + 1
    alone = Batch(
        replace(batch.shape, seqs=((1, end),)), batch.q[row : row + 1], [batch.keys[s][:end]], [batch.values[s][:end]]
    )
    return call(op, alone.lay_out(row))[0]


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(2, 3), (1, 8), (1, 20)])
def test_an_invariant_row_depends_on_its_own_prefix_alone(
    backend: str, num_kv_heads: int, group_size: int, window: int | None, count: Callable[[int, int], int]
) -> None:
    """To the bit: a row alone, in a prompt, in a chunk, beside others, by either op, over a long context."""
    seqs = ((20, 20), (1, 17), (7, 64), (2, 515))
    batch = gaussian(Shape(seqs, num_kv_heads=num_kv_heads, group_size=group_size, window=window))
    with plans(invariant=True):
        out = call(PREFILL, batch.lay_out())
        for row, s, position in batch.rows[:: count(3, 1)]:
            alone = _row_alone(DECODE, batch, s, row, position)
            assert same_bits(alone, out[row]), f"sequence {s} position {position}"


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    ("op", "seqs"), [(PREFILL, ((20, 20), (1, 17), (7, 70))), (DECODE, ((1, 17), (7, 70), (2, 515)))]
)
def test_a_row_depends_on_its_own_prefix_alone(
    backend: str, op: str, seqs: tuple[tuple[int, int], ...], window: int | None, count: Callable[[int, int], int]
) -> None:
    """To the bit within one op: a row alone, in a prompt, in a chunk, beside others; on Triton by any plan."""
    batch = gaussian(Shape(seqs, num_kv_heads=1, group_size=4, window=window))
    with plans(invariant=backend == "torch"):
        out = call(op, batch.lay_out())
        for row, s, position in batch.rows[:: count(3, 1)]:
            assert same_bits(_row_alone(op, batch, s, row, position), out[row]), f"sequence {s} position {position}"


@pytest.mark.parametrize("shape", [shape for op, shape in SHAPES if op == PREFILL], ids=lambda shape: shape.name)
def test_the_order_of_work_changes_no_bit(backend: str, shape: Shape) -> None:
    inputs = gaussian(shape).lay_out()
    with plans(invariant=False):
        expected = call(PREFILL, inputs)
    with plans(invariant=False, change=_other_order):
        assert same_bits(call(PREFILL, inputs), expected)


def test_the_measure_would_notice(backend: str) -> None:
    """Negative control: one key's last bit, or a neighbouring position, changes the row's bits."""
    batch = gaussian(Shape(((1, 20),)))
    with plans(invariant=True):
        out = call(DECODE, batch.lay_out())
        changed = batch.clone()
        changed.keys[0][3, 0, 0] = torch.nextafter(changed.keys[0][3, 0, 0], torch.tensor(10.0)) + 1e-4
        assert not same_bits(call(DECODE, changed.lay_out()), out)
