"""Attention against the float64 oracle, within the rounding of its output dtype."""

from __future__ import annotations

import pytest
import torch
from octavo.kernels.spec import Case, OpSpec, load_specs

from . import oracle
from .attention_checks import call_lse
from .rounding import assert_rounding, errors
from .seeds import case_inputs

SPECS = {name: spec for name, spec in load_specs().items() if spec.bounds == "attention"}
CASES = [(spec, case) for spec in SPECS.values() for case in spec.cases if case.tier != "bench"]


def _param(spec: OpSpec, case: Case) -> object:
    marks = [pytest.mark.full] if case.tier == "all" else []
    return pytest.param(spec, case, marks=marks, id=f"{spec.name.removeprefix('paged_attention_')}-{case.name}")


def check_rounding(spec: OpSpec, case: Case, seed: int) -> None:
    inputs = case_inputs(spec, case, seed)
    out, lse = call_lse(spec.name, inputs)
    exact, exact_lse = oracle.attention(inputs)
    wide = torch.promote_types(out.dtype, torch.float32)
    honest = [oracle.plain_attention(inputs, wide), oracle.attention(inputs, wide)]
    assert_rounding("attention", out, exact, [plain for plain, _ in honest])
    seen = exact_lse > float("-inf")
    assert torch.equal(lse == float("-inf"), ~seen)
    error = (lse.double() - exact_lse)[seen].abs()
    # The lse is float32 whatever q is: twice the plain float32 error, or a few roundings of its size.
    plain_error = max(float((plain_lse.double() - exact_lse)[seen].abs().max()) for _, plain_lse in honest)
    allowed = 2 * plain_error + 4 * 2.0**-24 * (1 + exact_lse[seen].abs())
    assert bool((error <= allowed).all()), f"lse is off by {float(error.max()):.3g}"


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
