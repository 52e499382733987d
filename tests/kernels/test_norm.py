"""RMSNorm and LayerNorm against loops in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from octavo.kernels.dispatch import available_backends
from octavo.kernels.spec import Case

from . import calls
from . import norm_checks as checks
from .attention_checks import same_bits
from .seeds import case_inputs

OPS = ("rms_norm", "layer_norm")


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
    checks.fused_is_unfused(op, dtype)
    spec = checks.SPECS[op]
    inputs = case_inputs(spec, spec.case(f"{dtype}-residual"), 0)
    function = getattr(calls, op)
    x, residual = inputs.pop("x"), inputs.pop("residual")
    separate = function(residual + x, **inputs)
    kept = x.clone()
    function(x, **inputs, residual=residual.clone())
    assert same_bits(x, kept)
    assert function(x, **inputs, residual=residual, out=x) is x
    assert same_bits(x, separate)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_rows_do_not_depend_on_each_other(backend: str, op: str) -> None:
    spec = checks.SPECS[op]
    inputs = case_inputs(spec, spec.case("float32"), 0)
    function = getattr(calls, op)
    whole = function(**inputs)
    for row in range(len(whole)):
        assert same_bits(function(**{**inputs, "x": inputs["x"][row : row + 1]}), whole[row : row + 1])
    inputs["x"][0] = float("nan")
    assert same_bits(function(**inputs)[1:], whole[1:])


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_float64_is_computed_in_float64(backend: str) -> None:
    x = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    out = calls.rms_norm(x, torch.ones(2, dtype=torch.float64), eps=0.0)
    assert out[0, 1] > out[0, 0]


@pytest.mark.parametrize("backend", [b for b in available_backends(*OPS) if b == "triton"], indirect=True)
def test_what_kernels_cannot_compute_is_refused(backend: str) -> None:
    x, weight = torch.ones(2, 16_385), torch.ones(16_385)
    with pytest.raises(ValueError, match="x has 16385 elements per row; the triton backend takes 1 to 16384"):
        calls.rms_norm(x, weight, eps=1e-6)
    with pytest.raises(ValueError, match=r"x has dtype torch.float64; the triton backend takes float32"):
        calls.layer_norm(x[:, :4].double(), weight[:4], None, eps=1e-6)
    with pytest.raises(ValueError, match=r"x has strides \(1, 2\); the last one must be 1"):
        calls.rms_norm(torch.ones(16, 2).t(), weight[:16], eps=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("hidden_size", [2880, pytest.param(16_384, marks=pytest.mark.full)])
def test_wide_rows(backend: str, op: str, hidden_size: int) -> None:
    """Rows as wide as a model's, of which many threads hold a part: still within the rounding of one row."""
    check = checks.rms_norm_rounding if op == "rms_norm" else checks.layer_norm_rounding
    check(Case("wide", {"num_tokens": 2, "hidden_size": hidden_size, "residual": True}, "float16"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("check", [checks.rows_may_lie_apart, checks.rows_beyond_31_bits])
def test_where_rows_lie(backend: str, op: str, check: Callable[[str], None]) -> None:
    check(op)
