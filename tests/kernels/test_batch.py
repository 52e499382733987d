"""What a step's rows are expanded to, exactly, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from octavo.kernels.batch import ExpandedRows
from octavo.kernels.spec import Case

from . import batch_checks, calls
from .seeds import case_inputs

OPS = ("expand_rows",)


@pytest.mark.parametrize("case", batch_checks.CASES, ids=lambda case: case.name)
def test_exact(backend: str, case: Case, seeds: range) -> None:
    for seed in seeds:
        batch_checks.exact(case, seed)


@pytest.mark.parametrize("case", batch_checks.CASES, ids=lambda case: case.name)
def test_tensors_that_are_given(backend: str, case: Case) -> None:
    batch_checks.given_tensors(case)


def test_sequences_without_tokens(backend: str) -> None:
    batch_checks.sequences_without_tokens()


def _out(**changes: torch.Tensor) -> ExpandedRows:
    tokens, lengths = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    return ExpandedRows(*tokens, lengths, torch.zeros(5, 5, dtype=torch.int32))._replace(**changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": torch.zeros(5)}, "rows has dtype torch.float32; expected torch.int32"),
        ({"num_computed_tokens": torch.zeros(4).int()}, r"num_computed_tokens has shape \(4,\); expected \(5,\)"),
        ({"cu_seqlens_q": torch.zeros(5).int()}, r"cu_seqlens_q has shape \(5,\); expected \(6,\)"),
        ({"token_ids": torch.zeros(5).long()}, "token_ids has dtype torch.int64; expected torch.int32"),
        ({"last_token_ids": torch.zeros(10).int()}, r"last_token_ids has shape \(10,\); expected \(11,\)"),
        ({"block_tables": torch.zeros(11).int()}, r"block_tables has shape \(11,\); expected 2 axes"),
        ({"block_tables": torch.zeros(9, 11).int().t()}, r"block_tables has strides \(1, 11\); the last one must be 1"),
        ({"block_size": 0}, "block_size is 0; it must be above 0"),
        ({"num_columns": 10}, "num_columns is 10; block_tables has 9"),
        ({"out": _out(seq_lens=torch.zeros(4).int())}, r"out.seq_lens has shape \(4,\); expected \(5,\)"),
        ({"out": _out(positions=torch.zeros(5).int())}, "out.positions has dtype torch.int32; expected torch.int64"),
    ],
)
def test_mistakes_are_named(backend: str, change: dict[str, Any], says: str) -> None:
    inputs = case_inputs(batch_checks.SPEC, batch_checks.SPEC.case("decode"), 0)
    with pytest.raises(ValueError, match=says):
        calls.expand_rows(**inputs | change)
