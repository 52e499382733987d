"""What a caller promises the attention kernels and does not keep is refused or harmless, and sinks may be infinite."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import octavo.kernels
import pytest
import torch
from octavo.kernels.attention import SPLIT_TOKENS
from octavo.kernels.dispatch import use_backend
from octavo.kernels.spec import Case, load_specs
from torch import Tensor

from .allocation import poisoned_allocations
from .seeds import case_inputs

pytest.importorskip("triton")

OPS = ("paged_attention_prefill", "paged_attention_decode", "plan_paged_attention")
PREFILL, DECODE = OPS[:2]
SHAPE = {"num_kv_heads": 1, "group_size": 3, "head_dim": 64, "block_size": 128, "sinks": True}
# The second sequence's first row is before its first key, and sees nothing.
SEQS = {"one split": ((1, 9), (2, 1), (1, 0)), "two splits": ((1, SPLIT_TOKENS + 9), (2, 1), (1, 0))}


@pytest.fixture(autouse=True)
def triton() -> Any:
    with use_backend("triton"), poisoned_allocations():
        yield


def _inputs(seqs: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    return case_inputs(load_specs()[DECODE], Case("promises", {**SHAPE, "seqs": seqs}), 0)


def _plan(inputs: dict[str, Any], op: str, **changes: Any) -> Any:
    lengths = [inputs[name] for name in ("cu_seqlens_q", "seq_lens", "block_table")]
    promised = {"num_tokens": len(inputs["q"]), "max_query_len": int(inputs["cu_seqlens_q"].diff().max()), **changes}
    shape = {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": 64, "block_size": 128}
    return octavo.kernels.plan_paged_attention(*lengths, op=op, **promised, **shape)


def _call(op: str, inputs: dict[str, Any], plan: Any) -> tuple[Tensor, Tensor]:
    name = "worklist" if op == PREFILL else "plan"
    result: tuple[Tensor, Tensor] = getattr(octavo.kernels, op)(**inputs, **{name: plan}, return_lse=True)
    return result


@pytest.mark.parametrize("seqs", SEQS.values(), ids=SEQS)
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("op", [PREFILL, DECODE])
def test_infinite_sinks(op: str, invariant: bool, seqs: tuple[tuple[int, int], ...]) -> None:
    """-inf is no sink, +inf takes all weight; a row that sees nothing has only its sink."""
    inputs = _inputs(seqs)
    plan = _plan(inputs, op.removeprefix("paged_attention_"), invariant=invariant)
    without, without_lse = _call(op, {**inputs, "sinks": None}, plan)
    inputs["sinks"] = torch.tensor([-math.inf, math.inf, 2.0])
    out, lse = _call(op, inputs, plan)
    assert torch.equal(out[:, 0], without[:, 0])
    assert torch.equal(lse[:, 0], without_lse[:, 0])
    assert (out[:, 1] == 0).all()
    assert (lse[:, 1] == math.inf).all()
    assert out.isfinite().all()
    nothing = [1, 3]
    assert (out[nothing] == 0).all()
    torch.testing.assert_close(lse[nothing], torch.tensor([[-math.inf, math.inf, 2.0]] * 2))


def check_short_list() -> None:
    """A list made for too few tokens ends where it ends."""
    from octavo.kernels.attention import worklist_triton  # the one in force: a bug may be planted

    inputs = _inputs(((140, 140), (140, 140)))
    room = torch.full((64, 2), -7, dtype=torch.int32)
    with mock.patch.object(torch, "full", lambda size, value, **_: room[: size[0]].fill_(value)):
        worklist = worklist_triton.list_work(inputs["cu_seqlens_q"], inputs["seq_lens"], num_tokens=1, item_tokens=42)
    assert len(worklist.items) == 3
    assert sorted(map(tuple, worklist.items.tolist())) == [(0, 2), (0, 3), (1, 3)]
    assert (room[3:] == -7).all()


def test_a_short_list() -> None:
    check_short_list()


def test_a_query_longer_than_promised() -> None:
    with pytest.raises(ValueError, match="a sequence has 2 query tokens; max_query_len promises at most 1"):
        _plan(_inputs(SEQS["one split"]), "decode", max_query_len=1)


def test_a_plan_of_another_op_or_step() -> None:
    inputs, other = _inputs(SEQS["one split"]), _inputs(((1, 9), (2, 1)))
    with pytest.raises(AssertionError, match="the worklist is of another backend or op"):
        _call(PREFILL, inputs, _plan(inputs, "decode"))
    with pytest.raises(AssertionError, match="the plan is of another backend or op"):
        _call(DECODE, inputs, _plan(inputs, "prefill"))
    with pytest.raises(AssertionError, match="the worklist is of another step"):
        _call(PREFILL, inputs, _plan(other, "prefill"))
    with pytest.raises(AssertionError, match="the plan is of another step"):
        _call(DECODE, inputs, _plan(other, "decode"))
    for op in (PREFILL, DECODE):
        with pytest.raises(AssertionError, match="the plan is of another step"):
            _call(op, inputs, _plan(other, "prefill", invariant=True))
