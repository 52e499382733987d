"""What is special to decode attention where sequences share their first keys: tiles of many sequences' rows, and where
their results go. The torch backend ignores what is shared; that it gives the same is no news.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from octavo.kernels.attention import SPLIT_TOKENS, SharedPrefixes, plan_paged_attention
from octavo.kernels.attention.spec import make_inputs
from octavo.kernels.dispatch import use_backend
from octavo.kernels.spec import Case, generator

from . import calls, oracle, second_oracle
from .allocation import poisoned_allocations
from .attention_checks import GAIN, WINNER, call, call_lse, same_bits
from .rounding import assert_rounding

pytest.importorskip("triton")

OPS = ("paged_attention_decode",)
OP = OPS[0]
SHORT: Final = 64
"""Tokens of a split in most tests: what is special here does not depend on it, and the interpreter is slow."""
_LAUNCHERS: Final = ("decode_triton", "cascade_triton", "plan_triton")


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@contextmanager
def short_splits(split_tokens: int = SHORT) -> Iterator[None]:
    """Cut sequences after so few tokens, of which the kernels are told; what nobody writes is NaN."""
    with pytest.MonkeyPatch.context() as patch, poisoned_allocations():
        for name in _LAUNCHERS:
            patch.setattr(importlib.import_module(f"octavo.kernels.attention.{name}"), "SPLIT_TOKENS", split_tokens)
        yield


class Group(NamedTuple):
    """Sequences that begin alike; the first one's blocks are everybody's."""

    members: tuple[int, ...]
    num_splits: int


MIXED = (
    # Others lie between a group's members; of 4 there are only this step's tokens behind what is shared, and 3 idles.
    Case(
        "mixed",
        {
            "seqs": ((1, 150), (1, 70), (1, 131), (0, 140), (2, 130), (3, 75), (1, 66)),
            "groups": (Group((0, 2, 4), 2), Group((6, 3, 5), 1)),
        },
        "float16",
    ),
    # More rows than a tile, whose edge cuts a member's rows of a token in two.
    Case(
        "two-tiles",
        {
            "seqs": tuple((1, 129 + 6 * i) for i in range(10)),
            "groups": (Group(tuple(range(9, -1, -1)), 2),),
            "group_size": 7,
            "num_kv_heads": 1,
            "head_dim": 80,
            "block_size": 32,
        },
        "float16",
    ),
    # A member alone has more rows than a tile.
    Case(
        "verify",
        {
            "seqs": ((16, 100), (1, 65), (5, 80), (3, 3)),
            "groups": (Group((0, 1, 2), 1),),
            "group_size": 5,
            "num_kv_heads": 1,
            "draft": True,
        },
        "float16",
    ),
    # The window has left some shared splits, for some; of others it is in the middle, or one row just lacks a key.
    Case(
        "window",
        {
            "seqs": ((1, 258), (2, 194), (1, 400), (1, 200), (1, 256), (1, 257)),
            "groups": (Group((0, 2, 3, 1), 2), Group((4, 5), 3)),
            "window": 193,
            "sinks": True,
            "soft_cap": 8.0,
            "q_gain": 6.0,
            "num_kv_heads": 1,
        },
        "float16",
    ),
)
_FEW: Final = {"seqs": ((1, 140), (1, 70), (2, 131)), "groups": (Group((0, 2), 2),)}
KINDS = (
    Case("spotlight-bf16", {**_FEW, "kind": "spotlight"}, "bfloat16"),
    Case("deep-negative", {**_FEW, "kind": "deep_negative"}, "float32"),
    Case("int8", {**_FEW, "cache": "int8"}, "float16"),
    Case("int8-fp32", {**_FEW, "cache": "int8", "num_kv_heads": 3}, "float32"),
    Case("e4m3-bf16", {**_FEW, "cache": "e4m3"}, "bfloat16"),
    Case("wide", {**_FEW, "head_dim": 256, "num_kv_heads": 1}, "float16"),
    Case("sinks", {**_FEW, "sinks": True, "group_size": 1, "block_size": 64}, "float32"),
)


def laid_out(case: Case, *, poison: bool = True) -> dict[str, Any]:
    """Return the inputs of a case with a common beginning in each group; blocks that nobody names then are poison."""
    base = {"num_kv_heads": 2, "group_size": 2, "head_dim": 64, "block_size": 16}
    case = replace(case, values={**base, **case.values})
    inputs = make_inputs(case, generator("cascade", case.name))
    table, block_size = inputs["block_table"], case["block_size"]
    for (leader, *others), num_splits in case["groups"]:
        num_blocks = num_splits * case.get("split_tokens", SHORT) // block_size
        for s in others:
            for name in ("k_cache", "v_cache"):
                cache = inputs[name]
                raw = cache.view(torch.uint8) if cache.itemsize == 1 else cache
                worst = 0x7F if raw.dtype == torch.uint8 else float("nan")
                raw[table[s, :num_blocks].long()] = worst if poison else 0
            table[s, :num_blocks] = table[leader, :num_blocks]
    return inputs


def shared_of(case: Case, groups: tuple[Group, ...] | None = None) -> SharedPrefixes:
    """Return what the groups of a case share; which member leads, and what of a loner is said, must not matter."""
    num_seqs = len(case["seqs"])
    leaders, num_splits = torch.full((num_seqs,), -7, dtype=torch.int32), torch.zeros(num_seqs, dtype=torch.int32)
    for members, splits in case["groups"] if groups is None else groups:
        leaders[list(members)], num_splits[list(members)] = members[-1], splits
    return SharedPrefixes(leaders, num_splits)


def planned(inputs: dict[str, Any], shared: SharedPrefixes | None, max_query_len: int | None = None) -> Any:
    num_tokens, num_q_heads, head_dim = inputs["q"].shape
    query_len = int(inputs["cu_seqlens_q"].diff().max()) if max_query_len is None else max_query_len
    return plan_paged_attention(
        *(inputs[name].to(calls.device()) for name in ("cu_seqlens_q", "seq_lens", "block_table")),
        op="decode",
        num_tokens=num_tokens,
        max_query_len=query_len,
        num_q_heads=num_q_heads,
        num_kv_heads=inputs["k_cache"].shape[1],
        head_dim=head_dim,
        block_size=inputs["k_cache"].shape[2],
        shared=shared,
    )


def check_rounding(case: Case) -> None:
    """Against both oracles, with its lse; all layers of a step use one plan."""
    inputs = laid_out(case)
    with short_splits(case.get("split_tokens", SHORT)):
        plan = planned(inputs, shared_of(case))
        out, lse = call_lse(OP, {**inputs, "plan": plan})
        assert same_bits(call(OP, inputs, plan=plan), out), "a plan gives other bits the second time"
    exact, exact_lse = oracle.attention(inputs)
    second = torch.from_numpy(second_oracle.attention(inputs)[0])
    wide = torch.promote_types(out.dtype, torch.float32)
    plain = [oracle.attention(inputs, wide)[0], oracle.plain_attention(inputs, wide)[0]]
    plain.append(torch.from_numpy(second_oracle.attention(inputs, np.float32)[0]))
    for reference in (exact, second):
        assert_rounding("attention", out, reference, plain)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=2e-5)


def check_what_each_row_reads(case: Case) -> None:
    """Exactly: one key wins by far and the output is its value, in the first and last slot of each split, at the row's
    own position and before it."""
    inputs = laid_out(case)
    draw = generator("labels", case.name)
    for name, numbers in (("k_cache", (-1, 1)), ("v_cache", range(-61, 61, 2))):
        choices = torch.tensor(list(numbers)).to(inputs[name].dtype)
        picked = choices[torch.randint(0, len(choices), inputs[name].shape, generator=draw)]
        inputs[name] = torch.where(inputs[name].isnan(), inputs[name], picked)
    group_size, block_size = case.get("group_size", 2), inputs["k_cache"].shape[2]
    starts = inputs["cu_seqlens_q"].tolist()
    with short_splits():
        plan = planned(inputs, shared_of(case))
        for turn in range(3):
            wanted = {}
            for s, (query_len, seq_len) in enumerate(case["seqs"]):
                for row in range(starts[s], starts[s + 1]):
                    position = seq_len - query_len + row - starts[s]
                    edges = [e + beside for e in range(0, seq_len, SHORT) for beside in (-1, 0)]
                    seen = [e for e in (*edges, position - 1, position) if 0 <= e <= position]
                    for h in range(inputs["q"].shape[1]):
                        e = seen[(turn + 3 * h + row) % len(seen)]
                        at = int(inputs["block_table"][s, e // block_size]), h // group_size, e % block_size
                        inputs["q"][row, h] = GAIN * inputs["k_cache"][at]
                        wanted[row, h] = (e, inputs["v_cache"][at])
            out = call(OP, {**inputs, "draft_mask": None}, plan=plan)
            for (row, h), (e, value) in wanted.items():
                assert same_bits(out[row, h], value), f"row {row} head {h} did not read position {e}"


def planted(inputs: dict[str, Any], s: int, position: int) -> dict[str, Any]:
    """Return the inputs with a key that wins everything at one position of a sequence, and of all that share it."""
    block_size = inputs["k_cache"].shape[2]
    at = int(inputs["block_table"][s, position // block_size]), slice(None), position % block_size
    k_cache, v_cache = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    k_cache[at] = 0
    k_cache[at][:, 0] = WINNER
    v_cache[at] = WINNER
    return {**inputs, "k_cache": k_cache, "v_cache": v_cache}


def check_window() -> None:
    """The last key that a row no longer sees changes none of its bits, though other rows of its sequence see it."""
    case = MIXED[3]
    inputs = laid_out(case, poison=False)
    inputs["q"][..., 0] = 4.0
    with short_splits():
        plan = planned(inputs, shared_of(case))
        before = call(OP, inputs, plan=plan)
        for s in (0, 1):
            row = int(inputs["cu_seqlens_q"][s + 1]) - 1
            after = call(OP, planted(inputs, s, case["seqs"][s][1] - case["window"] - 1), plan=plan)
            assert same_bits(after[row], before[row]), f"sequence {s} sees a key that its window has left"
            assert not same_bits(after, before)


def check_forbidden(case: Case) -> None:
    """A key that wins everything, planted in one block: nobody's bit changes but of those who name the block, and they
    all read it."""
    inputs = laid_out(case, poison=False)
    inputs["q"][..., 0] = 4.0
    table, block_size = inputs["block_table"], inputs["k_cache"].shape[2]
    starts = inputs["cu_seqlens_q"].tolist()
    with short_splits():
        plan = planned(inputs, shared_of(case))
        before = call(OP, inputs, plan=plan)
        for members, num_splits in case["groups"]:
            for s, position in ((members[0], num_splits * SHORT - 1), (members[-1], num_splits * SHORT)):
                block = int(table[s, position // block_size])
                after = call(OP, planted(inputs, s, position), plan=plan)
                for other, (query_len, seq_len) in enumerate(case["seqs"]):
                    rows = slice(starts[other], starts[other + 1])
                    if int(table[other, position // block_size]) != block:
                        assert same_bits(after[rows], before[rows]), f"sequence {other} read a block of {s}"
                    elif seq_len - query_len >= position:
                        assert (after[rows] == WINNER).all(), f"sequence {other} did not read position {position}"


def check_who_shares_changes_no_bit(case: Case) -> None:
    """Rows of a tile do not meet: a member's bits are the same in any order, beside any others, in any tile; and who
    shares nothing has the bits of a step where nobody does."""
    inputs = laid_out(case)
    starts = inputs["cu_seqlens_q"].tolist()
    groups: tuple[Group, ...] = case["groups"]
    everybody = {s for group in groups for s in group.members}
    with short_splits():
        together = call(OP, inputs, plan=planned(inputs, shared_of(case)))
        nobody = call(OP, inputs, plan=planned(inputs, None))
        reordered = tuple(Group((*g.members[1:], g.members[0]), g.num_splits) for g in reversed(groups))
        fewer = tuple(Group(g.members[:-1], g.num_splits) for g in groups)
        for chosen in (reordered, fewer):
            out = call(OP, inputs, plan=planned(inputs, shared_of(case, chosen), 16))
            members = {s for group in chosen for s in group.members}
            for s in range(len(case["seqs"])):
                rows = slice(starts[s], starts[s + 1])
                expected = together if s in members else nobody
                assert same_bits(out[rows], expected[rows]), f"sequence {s} of {chosen}"
    for s in set(range(len(case["seqs"]))) - everybody:
        rows = slice(starts[s], starts[s + 1])
        assert same_bits(together[rows], nobody[rows])


def check_claims_beyond_the_rows() -> None:
    """What a split holds of this step's tokens is not shared, whatever the groups say: a row sees no later key."""
    case = Case("claims", {"seqs": ((1, 128), (2, 130), (3, 129)), "groups": (Group((0, 1, 2), 1),)}, "float16")
    inputs = laid_out(case)
    with short_splits():
        expected = call(OP, inputs, plan=planned(inputs, shared_of(case)))
        claimed = planned(inputs, shared_of(case, (Group((0, 1, 2), 2),)))
        found = call(OP, inputs, plan=claimed)
        assert len(claimed.shared.items) == 2
    # Of all three only sequence 1 has its rows behind two splits; alone it reads the same keys, in another tile.
    assert same_bits(found[:1], expected[:1])
    assert same_bits(found[3:], expected[3:])
    assert_rounding("attention", found, oracle.attention(inputs)[0], [])


def some(*small: int, of: tuple[Case, ...] = MIXED) -> list[Any]:
    """Return cases, most of them for larger tiers only."""
    return [pytest.param(case, marks=[] if i in small else [pytest.mark.full]) for i, case in enumerate(of)]


@pytest.mark.parametrize("case", some(0, 1, 3, 4, 6, 8, of=(*MIXED, *KINDS)), ids=lambda case: case.name)
def test_rounding(case: Case) -> None:
    check_rounding(case)


@pytest.mark.parametrize("case", some(0, of=MIXED[:3]), ids=lambda case: case.name)
def test_what_each_row_reads(case: Case) -> None:
    check_what_each_row_reads(case)


@pytest.mark.parametrize("case", some(2, of=MIXED[:3]), ids=lambda case: case.name)
def test_forbidden(case: Case) -> None:
    check_forbidden(case)


@pytest.mark.parametrize("case", some(0, 3), ids=lambda case: case.name)
def test_who_shares_changes_no_bit(case: Case) -> None:
    check_who_shares_changes_no_bit(case)


def test_window() -> None:
    check_window()


def test_claims_beyond_the_rows() -> None:
    check_claims_beyond_the_rows()


def test_whole_splits() -> None:
    """With splits as long as they are."""
    seqs = ((1, SPLIT_TOKENS + 3), (1, 40), (1, SPLIT_TOKENS + 60))
    values = {"seqs": seqs, "groups": (Group((0, 2), 1),), "split_tokens": SPLIT_TOKENS}
    check_rounding(Case("whole", {**values, "num_kv_heads": 1, "block_size": 64}, "float16"))


def test_a_window_leaves_shared_blocks() -> None:
    """Where every row has left them they may be gone; where one has, the others' blocks are read."""
    case = MIXED[3]
    inputs = laid_out(case)
    with short_splits():
        plan = planned(inputs, shared_of(case))
        expected = call(OP, inputs, plan=plan)
        for s, (query_len, seq_len) in enumerate(case["seqs"]):
            inputs["block_table"][s, : max(0, seq_len - query_len - case["window"] + 1) // 16] = 0
        inputs["k_cache"][0] = inputs["v_cache"][0] = float("nan")
        assert same_bits(call(OP, inputs, plan=plan), expected)


def test_items() -> None:
    """Groups one after another, a group's splits in order, rows of a split in tiles that end with the group."""
    plan_shared = importlib.import_module("octavo.kernels.attention.cascade_triton").plan_shared
    shared = SharedPrefixes(torch.tensor([3, 9, 4, 3, 4, 3]).int(), torch.tensor([1, 0, 2, 1, 2, 1]).int())
    work = plan_shared(shared, rows_per_seq=30, num_seqs=6, device=calls.device())
    assert work.members.tolist() == [0, 3, 5, 2, 4]
    assert work.items.tolist() == [[0, 0, 64], [0, 64, 90], [0, 90, 150], [1, 90, 150]]
    assert work.num_splits.tolist() == [1, 0, 2, 1, 2, 1]


def test_the_host_does_not_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy is out of page-locked memory, and not waited for."""
    cascade, done = importlib.import_module("octavo.kernels.attention.cascade_triton"), list[Any]()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **more: done.append((device.type, more)) or self)
    shared = SharedPrefixes(torch.tensor([1, 1]).int(), torch.tensor([1, 1]).int())
    cascade.plan_shared(shared, rows_per_seq=30, num_seqs=2, device=torch.device("cuda"))
    assert done == ["pinned", ("cuda", {"non_blocking": True})] * 3


def test_no_more_scratch_than_promised_is_written() -> None:
    inputs = laid_out(MIXED[0])
    cascade = importlib.import_module("octavo.kernels.attention.plan_triton")
    with short_splits():
        shared = planned(inputs, shared_of(MIXED[0])).shared
        arguments = [inputs[name].to(calls.device()) for name in ("cu_seqlens_q", "seq_lens", "block_table")]
        sizes = {"max_query_len": 4, "num_q_heads": 4, "head_dim": 64, "block_size": 16}
        call(OP, inputs, plan=cascade.plan_decode(*arguments, **sizes, shared=shared, max_splits=1))


def test_refused() -> None:
    inputs = laid_out(MIXED[0])
    with pytest.raises(ValueError, match="leaders has shape"):
        planned(inputs, SharedPrefixes(torch.zeros(3, dtype=torch.int32), torch.zeros(7, dtype=torch.int32)))
    with pytest.raises(AssertionError, match="different numbers"):
        planned(inputs, SharedPrefixes(torch.zeros(7, dtype=torch.int32), torch.arange(7, dtype=torch.int32)))
    assert planned(inputs, SharedPrefixes(torch.zeros(7, dtype=torch.int32), torch.zeros(7).int())).shared is None


def test_the_measure_would_notice() -> None:
    """Negative control: sharing what is not alike changes bits."""
    inputs = laid_out(Case("control", {"seqs": ((1, 140), (1, 150)), "groups": ()}, "float16"))
    with short_splits():
        wrong = call(OP, inputs, plan=planned(inputs, SharedPrefixes(torch.zeros(2).int(), torch.ones(2).int())))
        assert not torch.allclose(wrong, call(OP, inputs, plan=planned(inputs, None)), atol=1e-2)
