"""This module holds what the normalisation ops must satisfy, as functions. It does not know the backend."""

from __future__ import annotations

from functools import partial

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


RMS_CASES = [case for case in SPECS["rms_norm"].cases if case.tier != "bench"]
LAYER_CASES = [case for case in SPECS["layer_norm"].cases if case.tier != "bench"]
RMS_CHECKS = (
    ("exact: by hand", rms_norm_by_hand),
    *((f"rounding: {case.name}", partial(rms_norm_rounding, case)) for case in RMS_CASES),
)
LAYER_CHECKS = tuple((f"rounding: {case.name}", partial(layer_norm_rounding, case)) for case in LAYER_CASES)
