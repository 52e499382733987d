"""RMSNorm and LayerNorm against loops in float64."""

from __future__ import annotations

import octavo.kernels
import pytest
import torch
from octavo.kernels.spec import Case

from . import norm_checks as checks
from .attention_checks import same_bits
from .seeds import case_inputs


@pytest.mark.parametrize("case", checks.RMS_CASES, ids=lambda case: case.name)
def test_rms_norm(backend: str, case: Case, seeds: range) -> None:
    for seed in seeds:
        checks.rms_norm_rounding(case, seed)


def test_rms_norm_by_hand(backend: str) -> None:
    checks.rms_norm_by_hand()


@pytest.mark.parametrize("case", checks.LAYER_CASES, ids=lambda case: case.name)
def test_layer_norm(backend: str, case: Case, seeds: range) -> None:
    for seed in seeds:
        checks.layer_norm_rounding(case, seed)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_and_residual(backend: str, op: str, dtype: str) -> None:
    """`out` may be x itself; the fused residual gives the bits of adding first and normalising then."""
    spec = checks.SPECS[op]
    inputs = case_inputs(spec, spec.case(f"{dtype}-residual"), 0)
    function = getattr(octavo.kernels, op)
    x, residual = inputs.pop("x"), inputs.pop("residual")
    separate = function(residual + x, **inputs)
    kept = x.clone()
    fused = function(x, **inputs, residual=residual.clone())
    assert same_bits(fused, separate)
    assert same_bits(x, kept)
    assert function(x, **inputs, residual=residual, out=x) is x
    assert same_bits(x, separate)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_rows_do_not_depend_on_each_other(backend: str, op: str) -> None:
    spec = checks.SPECS[op]
    inputs = case_inputs(spec, spec.case("float32"), 0)
    function = getattr(octavo.kernels, op)
    whole = function(**inputs)
    for row in range(len(whole)):
        assert same_bits(function(**{**inputs, "x": inputs["x"][row : row + 1]}), whole[row : row + 1])
    inputs["x"][0] = float("nan")
    assert same_bits(function(**inputs)[1:], whole[1:])


def test_float64_is_computed_in_float64(backend: str) -> None:
    x = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    out = octavo.kernels.rms_norm(x, torch.ones(2, dtype=torch.float64), eps=0.0)
    assert out[0, 1] > out[0, 0]
