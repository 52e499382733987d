"""This module holds what the expansion of a step's rows must satisfy, as functions. It does not know the backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from octavo.kernels.batch import ExpandedRows
from octavo.kernels.spec import Case, load_specs
from torch import Tensor

from . import calls, oracle
from .attention_checks import same_bits
from .seeds import case_inputs

SPEC = load_specs()["expand_rows"]
CASES = [case for case in SPEC.cases if case.tier != "bench"]


def _check(inputs: dict[str, Any], found: ExpandedRows) -> None:
    expected = oracle.expand_rows(inputs)
    for name, x in found._asdict().items():
        assert x.tolist() == expected[name], f"{name} is {x.tolist()}; expected {expected[name]}"


def exact(case: Case, seed: int = 0) -> None:
    """All results are the oracle's, and no argument is changed."""
    inputs = case_inputs(SPEC, case, seed)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    _check(inputs, calls.expand_rows(**inputs))
    for name, x in before.items():
        assert same_bits(x, inputs[name]), f"{name} was changed"


def given_tensors(case: Case, seed: int = 0) -> None:
    """`out` is written where it is, parts of wider and longer tensors, and nothing beside it."""
    inputs = case_inputs(SPEC, case, seed)
    num_tokens, num_seqs, num_columns = len(inputs["token_ids"]), len(inputs["rows"]), inputs["num_columns"]
    tokens = torch.full((3, num_tokens + 3), -7)
    lengths, table = torch.full((num_seqs + 2,), -7).int(), torch.full((num_seqs + 1, num_columns + 3), -7).int()
    out = ExpandedRows(*tokens[:, 1 : num_tokens + 1], lengths[1 : num_seqs + 1], table[:num_seqs, 2 : num_columns + 2])
    found = calls.expand_rows(**inputs, out=out)
    assert all(x is y for x, y in zip(found, out, strict=True)), "the result is not what was given"
    _check(inputs, found)
    for x in out:
        x.fill_(-7)
    for whole in (tokens, lengths, table):
        assert bool((whole == -7).all()), "something beside `out` was written"


def sequences_without_tokens() -> None:
    """They take no part, wherever they stand."""
    case = next(case for case in CASES if case.name == "mixed")
    inputs = case_inputs(SPEC, case, 0)
    starts = inputs["cu_seqlens_q"]
    inputs["rows"] = torch.tensor([9, *inputs["rows"].tolist(), 9], dtype=torch.int32)
    inputs["num_computed_tokens"] = torch.tensor([0, *inputs["num_computed_tokens"].tolist(), 0], dtype=torch.int32)
    inputs["cu_seqlens_q"] = torch.tensor([0, *starts.tolist(), int(starts[-1])], dtype=torch.int32)
    _check(inputs, calls.expand_rows(**inputs))


CHECKS = (
    *((f"exact: {case.name}", partial(exact, case)) for case in CASES),
    ("exact: tensors that are given", partial(given_tensors, CASES[0])),
    ("exact: sequences without tokens", sequences_without_tokens),
)
