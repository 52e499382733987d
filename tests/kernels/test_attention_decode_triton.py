"""What is special to decode attention as a Triton kernel: its plan, its splits and the two ways of merging them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.kernels.attention import SPLIT_TOKENS
from octavo.kernels.common.launch import Target
from octavo.kernels.dispatch import use_backend
from octavo.kernels.spec import generator
from torch import Tensor

from . import calls, oracle
from .allocation import poisoned_allocations
from .attention_checks import call, call_lse, same_bits
from .paged import Batch, Shape, gaussian
from .rounding import assert_rounding

pytest.importorskip("triton")

from octavo.kernels.attention import decode_triton, plan_triton

OPS = ("paged_attention_decode",)
OP = OPS[0]


@pytest.fixture(autouse=True)
def triton() -> Any:
    with use_backend("triton"), poisoned_allocations():
        yield


def _plan(inputs: dict[str, Any], max_query_len: int, **options: Any) -> plan_triton.DecodePlan:
    plan_decode = importlib.import_module("octavo.kernels.attention.plan_triton").plan_decode
    return plan_decode(  # type: ignore[no-any-return]
        *(inputs[name].to(calls.device()) for name in ("cu_seqlens_q", "seq_lens", "block_table")),
        max_query_len=max_query_len,
        num_q_heads=inputs["q"].shape[1],
        head_dim=inputs["q"].shape[2],
        block_size=inputs["k_cache"].shape[2],
        **options,
    )


def _both(inputs: dict[str, Any], **extra: Any) -> tuple[Tensor, Tensor]:
    out, lse = call_lse(OP, {**inputs, **extra})
    return out, lse


@pytest.mark.parametrize("block", [2, 256])
def test_plan_counts_and_lists_splits(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_triton, "_BLOCK", block)
    draw = generator("plan", block)
    for num_seqs in (1, 2, 7):
        query_lens = torch.randint(0, 3, (num_seqs,), generator=draw)
        seq_lens = torch.randint(0, 3, (num_seqs,), generator=draw) * SPLIT_TOKENS + query_lens
        cu_seqlens_q = torch.cat((torch.zeros(1, dtype=torch.long), query_lens.cumsum(0))).int()
        expected = [
            s for s in range(num_seqs) if query_lens[s] for _ in range(max(1, -(-int(seq_lens[s]) // SPLIT_TOKENS)))
        ]
        inputs = {
            "q": torch.zeros(1, 1, 64),
            "k_cache": torch.zeros(1, 1, 64, 64),
            "cu_seqlens_q": cu_seqlens_q,
            "seq_lens": seq_lens.int(),
            "block_table": torch.zeros(num_seqs, 40, dtype=torch.int32),
        }
        for max_splits in (None, len(expected), 100):
            plan = _plan(inputs, 2, max_splits=max_splits)
            starts = plan.cu_splits.tolist()
            assert starts[-1] == len(expected)
            assert plan.item_seqs[: len(expected)].tolist() == expected
            assert all(start == sum(e < s for e in expected) for s, start in enumerate(starts[:-1]))
            assert len(plan.item_seqs) <= num_seqs * -(-40 * 64 // SPLIT_TOKENS)
            parts = [int(q) * expected.count(s) * (expected.count(s) > 1) for s, q in enumerate(query_lens)]
            assert plan.cu_parts.tolist() == [sum(parts[:s]) for s in range(num_seqs)]
            assert len(plan.partial) == 2 * len(plan.item_seqs)


def test_too_few_splits_promised_write_nothing_past_the_scratch() -> None:
    inputs = gaussian(Shape(((1, 600), (1, 3), (1, 1025)), num_kv_heads=1)).lay_out()
    plan = _plan(inputs, 1, max_splits=1)
    assert plan.cu_splits.tolist() == [0, 2, 3, 4]
    assert plan.item_seqs.tolist() == [0, 0, 1, 2]
    out, exact = call(OP, inputs, plan=plan), oracle.attention(inputs)[0]
    torch.testing.assert_close(out[:2].double(), exact[:2], rtol=1e-5, atol=1e-5)


def check_scratch(fused: bool) -> None:
    """A sequence of one split needs none; one of 16 query tokens takes nothing from its neighbours of one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("decode_triton", "plan_triton"):  # those in force: a bug may be planted
            patch.setattr(importlib.import_module(f"octavo.kernels.attention.{name}"), "SPLIT_TOKENS", 64)
        _check_scratch(fused)


def _check_scratch(fused: bool) -> None:
    inputs = gaussian(Shape(((1, 129), (16, 80), (16, 20), (1, 65), (2, 66)), num_kv_heads=1)).lay_out()
    num_parts = 1 * 3 + 16 * 2 + 1 * 2 + 2 * 2
    plan, roomy = _plan(inputs, 16, fused=fused, max_splits=10, max_parts=num_parts), _plan(inputs, 16)
    assert plan.cu_parts.tolist() == [0, 3, 35, 35, 37]
    out = call(OP, inputs, plan=plan)
    assert same_bits(out, call(OP, inputs, plan=roomy))
    for x in (plan.partial, plan.partial_max, plan.partial_sum):
        assert len(x) == num_parts < len(roomy.partial)
        assert not bool(x.isnan().any()), "a place that nobody needs"
    # Who has promised too little loses the last sequence's results; nothing is read or written past the scratch.
    few = _plan(inputs, 16, fused=fused, max_splits=10, max_parts=num_parts - 3)
    assert same_bits(call(OP, inputs, plan=few)[:34], out[:34])


@pytest.mark.parametrize("fused", [False, True])
def test_the_scratch_holds_what_is_split_and_no_more(fused: bool) -> None:
    check_scratch(fused)


LONG = Shape(((1, 1025), (2, 513), (1, 512), (0, 9), (3, 514)), num_kv_heads=1)


@pytest.mark.parametrize(
    "shape",
    [
        LONG,
        # The first sequence's first split lies before its window.
        replace(LONG, seqs=((1, 1537), (2, 513)), dtype=torch.float16, group_size=3, window=515, block_size=64),
        pytest.param(Shape(((16, 520), (1, 3)), num_kv_heads=1, group_size=5), marks=pytest.mark.full),
    ],
)
def test_the_last_split_merges_what_a_second_launch_would(shape: Shape) -> None:
    """To the bit, with sinks and without, and the counters are ready for the next layer."""
    inputs = gaussian(shape).lay_out()
    max_query_len = max(query_len for query_len, _ in shape.seqs)
    plan, fused = _plan(inputs, max_query_len), _plan(inputs, max_query_len, fused=True)
    sinks = torch.linspace(-1, 3, shape.num_q_heads).to(shape.dtype)
    for extra in ({}, {"sinks": sinks}, {}):
        found = _both(inputs, **extra, plan=fused)
        assert not bool(fused.counters.any())  # type: ignore[union-attr]
        for a, b in zip(found, _both(inputs, **extra, plan=plan), strict=True):
            assert same_bits(a, b)
    out, lse = found
    exact, exact_lse = oracle.attention(inputs)
    assert_rounding("attention", out, exact, [oracle.attention(inputs, torch.float32)[0]])
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)


def _alone(batch: Batch, s: int) -> Batch:
    start = sum(query_len for query_len, _ in batch.shape.seqs[:s])
    rows = slice(start, start + batch.shape.seqs[s][0])
    shape = replace(batch.shape, seqs=(batch.shape.seqs[s],))
    return Batch(shape, batch.q[rows], [batch.keys[s]], [batch.values[s]])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.float16])
def test_no_bit_depends_on_neighbours_or_on_the_launch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on their splits and query lengths, nor on tiles of 16 or 32 rows, nor on the number of programs."""
    batch = gaussian(replace(LONG, dtype=dtype, group_size=8))
    together = call(OP, batch.lay_out())
    with monkeypatch.context() as patch:
        patch.setattr(decode_triton, "target", lambda device: Target(90, 7, 232_448))
        assert same_bits(call(OP, batch.lay_out()), together)
    start = 0
    for s, (query_len, _) in enumerate(LONG.seqs):
        if query_len:
            inputs = _alone(batch, s).lay_out(s)
            for max_query_len in (query_len, 16):
                out = call(OP, inputs, plan=_plan(inputs, max_query_len))
                assert same_bits(out, together[start : start + query_len]), f"sequence {s}, {max_query_len} rows"
        start += query_len


@pytest.mark.parametrize(
    "shape",
    [
        Shape(((1, 1600), (2, 1030), (1, 1024)), num_kv_heads=1, block_size=64, window=600),
        # Of two programs the second has the split that the window has left, after the first has written the result.
        Shape(((1, 5), (1, 600)), block_size=64, window=70),
    ],
)
def test_a_window_leaves_whole_splits_unread(shape: Shape) -> None:
    """Splits before every row's window do no work: their blocks may be gone, and what they leave in scratch is NaN."""
    assert shape.window is not None
    inputs = gaussian(shape).lay_out()
    out, lse = call_lse(OP, inputs)
    exact, exact_lse = oracle.attention(inputs)
    assert_rounding("attention", out, exact, [oracle.attention(inputs, torch.float32)[0]])
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    for s, (query_len, seq_len) in enumerate(shape.seqs):
        inputs["block_table"][s, : max(0, seq_len - query_len - shape.window + 1) // 64] = 0
    inputs["k_cache"][0] = inputs["v_cache"][0] = float("nan")
    assert same_bits(call(OP, inputs), out)


def test_padding_of_a_captured_batch() -> None:
    """Sequences of one row, no key and an empty table give zeros and change no neighbour's bit."""
    batch = gaussian(Shape(((1, 70), (1, 0), (1, 0), (1, 0))))
    inputs = batch.lay_out()
    inputs["block_table"][1:] = 0
    out, lse = call_lse(OP, inputs)
    assert (out[1:] == 0).all()
    assert (lse[1:] == float("-inf")).all()
    assert same_bits(out[:1], call(OP, _alone(batch, 0).lay_out()))


def test_rows_may_lie_apart() -> None:
    """q is a slice of a fused projection, out a slice of a wider buffer whose other columns stay."""
    inputs = gaussian(Shape(((2, 70), (1, 5)))).lay_out()
    expected = call(OP, inputs)
    num_tokens, num_heads, head_dim = inputs["q"].shape
    fused = torch.full((num_tokens, num_heads + 5, head_dim), float("nan"))
    fused[:, :num_heads] = inputs["q"]
    buffer = torch.full_like(fused, 7.0)
    calls.call(OP, **{**inputs, "q": fused[:, :num_heads]}, out=buffer[:, :num_heads])
    assert same_bits(buffer[:, :num_heads].contiguous(), expected)
    assert (buffer[:, num_heads:] == 7).all()


def test_refused() -> None:
    inputs = gaussian(Shape(((1, 5),))).lay_out()
    with pytest.raises(ValueError, match="17 query tokens; decode takes at most 16"):
        _plan(inputs, 17)
    with pytest.raises(AssertionError, match="another step or model"):
        call(OP, inputs, plan=_plan(gaussian(Shape(((1, 5), (1, 5)))).lay_out(), 1))


@pytest.mark.parametrize(("arch", "native"), [(80, False), (86, False), (89, True), (90, True)])
def test_e4m3_is_converted_by_the_machines_that_can(arch: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_triton, "_NATIVE", True)
    found = decode_triton.config(
        group_size=4, max_query_len=1, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, draft=False, quantised=True,
        target=Target(arch, num_sms=80, shared_bytes=101_376),
    )  # fmt: skip
    assert found.native is native
