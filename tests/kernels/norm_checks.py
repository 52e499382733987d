"""This module holds what the normalisation ops must satisfy, as functions. It does not know the backend."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from octavo.kernels.spec import Case, load_specs

from . import calls, oracle
from .attention_checks import same_bits
from .rounding import assert_rounding
from .seeds import case_inputs

SPECS = load_specs()


def rms_norm_rounding(case: Case, seed: int = 0) -> None:
    """The result, and the residual it leaves behind, are the oracle's within their bound."""
    inputs = case_inputs(SPECS["rms_norm"], case, seed)
    x = inputs["x"].clone()
    if "residual" in inputs:
        x = inputs["residual"] + x
    out = calls.rms_norm(**inputs)
    if "residual" in inputs:
        assert same_bits(inputs["residual"], x), "the residual is not the rounded sum"
    exact = oracle.rms_norm(x, inputs["weight"], inputs["eps"], inputs.get("weight_offset", 0.0))
    assert_rounding("elementwise", out, exact)


def rms_norm_by_hand() -> None:
    """Numbers that come out exact: a row of ±3 has a mean square of 9, whatever its (odd) length."""
    for size in (1, 5, 7, 64, 100):
        x = torch.full((2, size), 3.0)
        x[0, ::2] = -3.0
        weight = torch.arange(1.0, size + 1)
        out = calls.rms_norm(x, weight, eps=0.0)
        limit = 4 * 2.0**-24 * weight
        assert bool(((out - x / 3 * weight).abs() <= limit).all()), f"a row of {size} elements is not normalised"


def layer_norm_rounding(case: Case, seed: int = 0) -> None:
    """The result, and the residual it leaves behind, are the oracle's within their bound."""
    inputs = case_inputs(SPECS["layer_norm"], case, seed)
    x = inputs["x"].clone()
    if "residual" in inputs:
        x = inputs["residual"] + x
    out = calls.layer_norm(**inputs)
    if "residual" in inputs:
        assert same_bits(inputs["residual"], x), "the residual is not the rounded sum"
    assert_rounding("elementwise", out, oracle.layer_norm(x, inputs["weight"], inputs["bias"], inputs["eps"]))


def fused_is_unfused(op: str, dtype: str) -> None:
    """Adding the residual in the op gives the bits of adding first and normalising then."""
    spec, function = SPECS[op], getattr(calls, op)
    inputs = case_inputs(spec, spec.case(f"{dtype}-residual"), 0)
    x, residual = inputs.pop("x"), inputs.pop("residual")
    separate = function(residual + x, **inputs)
    assert same_bits(function(x, **inputs, residual=residual), separate), "normalises what the residual does not hold"


def rows_may_lie_apart(op: str) -> None:
    """x, residual and out may be columns of wider tensors; what lies between them keeps its bits."""
    spec, function = SPECS[op], getattr(calls, op)
    inputs = case_inputs(spec, spec.case("odd"), 0)
    plain = function(**inputs, residual=torch.ones(3, 77))
    wide = torch.full((3, 3, 100), 7.0)
    x, residual, out = (part[:, 9:86] for part in wide)
    x[:] = inputs.pop("x")
    residual[:] = 1.0
    assert function(x, **inputs, residual=residual, out=out) is out
    assert same_bits(out, plain), "a row depends on where it lies"
    assert bool((wide[..., :9] == 7).all() and (wide[..., 86:] == 7).all()), "something beside the rows was written"


def rows_beyond_31_bits(op: str) -> None:
    """A row that starts past 2**31 elements is read and written where it is."""
    stride = (1 << 30) + 8
    # numpy's zeros come from calloc: only pages that are touched are ever backed by memory.
    x = torch.from_numpy(np.zeros(2 * stride + 8, dtype=np.float16)).as_strided((3, 8), (stride, 1))
    x.copy_(torch.arange(24.0).view(3, 8))
    arguments = (torch.ones(8), None) if op == "layer_norm" else (torch.ones(8),)
    plain = getattr(calls, op)(x.contiguous(), *arguments, eps=1e-5)
    residual = x.new_zeros(3, 8)
    found = getattr(calls, op)(x, *arguments, eps=1e-5, residual=residual, out=x)
    assert same_bits(found.contiguous(), plain), "a row depends on where it lies"


RMS_CASES = [case for case in SPECS["rms_norm"].cases if case.tier != "bench"]
LAYER_CASES = [case for case in SPECS["layer_norm"].cases if case.tier != "bench"]
RMS_CHECKS = (
    ("exact: by hand", rms_norm_by_hand),
    *((f"rounding: {case.name}", partial(rms_norm_rounding, case)) for case in RMS_CASES),
    ("exact: fused", partial(fused_is_unfused, "rms_norm", "bfloat16")),
    ("exact: apart", partial(rows_may_lie_apart, "rms_norm")),
    ("exact: beyond 31 bits", partial(rows_beyond_31_bits, "rms_norm")),
)
LAYER_CHECKS = (
    *((f"rounding: {case.name}", partial(layer_norm_rounding, case)) for case in LAYER_CASES),
    ("exact: fused", partial(fused_is_unfused, "layer_norm", "bfloat16")),
    ("exact: apart", partial(rows_may_lie_apart, "layer_norm")),
    ("exact: beyond 31 bits", partial(rows_beyond_31_bits, "layer_norm")),
)
