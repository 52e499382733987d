"""Attention against the float64 oracle, within the rounding of its output dtype."""

from __future__ import annotations

import pytest
import torch
from octavo.kernels.spec import Case, OpSpec, load_specs

from . import oracle
from .attention_rounding import check_rounding
from .rounding import assert_rounding, errors
from .seeds import case_inputs

OPS = ("paged_attention_prefill", "paged_attention_decode")
SPECS = {name: spec for name, spec in load_specs().items() if spec.bounds == "attention"}
CASES = [(spec, case) for spec in SPECS.values() for case in spec.cases if case.tier != "bench"]


def _param(spec: OpSpec, case: Case) -> object:
    marks = [pytest.mark.full] if case.tier == "all" else []
    return pytest.param(spec, case, marks=marks, id=f"{spec.name.removeprefix('paged_attention_')}-{case.name}")


@pytest.mark.parametrize(("spec", "case"), [_param(spec, case) for spec, case in CASES])
def test_rounding(backend: str, spec: OpSpec, case: Case, seeds: range) -> None:
    for seed in seeds:
        check_rounding(spec, case, seed)


def test_a_dropped_token_is_out_of_bounds() -> None:
    """The measure itself: leaving out one of 40 keys is far outside what rounding explains."""
    spec = SPECS["paged_attention_decode"]
    case = Case("control", {**spec.case("ragged").values, "seqs": ((1, 40),)}, "bfloat16")
    inputs = case_inputs(spec, case, 0)
    exact, _ = oracle.attention(inputs)
    short, _ = oracle.attention({**inputs, "window": 39})
    assert_rounding("attention", exact.to(torch.bfloat16), exact)
    assert errors(short.to(torch.bfloat16), exact).row_max > 5
    with pytest.raises(AssertionError, match="row max"):
        assert_rounding("attention", short.to(torch.bfloat16), exact)
    with pytest.raises(AssertionError, match="slope bias"):
        assert_rounding("attention", (exact * 0.998).to(torch.bfloat16), exact)
