"""This module holds what the activations must satisfy, as functions. It does not know the backend."""

from __future__ import annotations

from functools import partial

from octavo.kernels.spec import Case, load_specs

from . import calls, oracle
from .rounding import assert_rounding
from .seeds import case_inputs

GATED, UNGATED = (load_specs()[name] for name in ("gated_activation", "ungated_activation"))


def gated_rounding(case: Case, seed: int = 0) -> None:
    inputs = case_inputs(GATED, case, seed)
    gate, up = inputs["x"].double().chunk(2, dim=1)
    exact = oracle.activation(gate, inputs["kind"]) * up
    assert_rounding("elementwise", calls.gated_activation(**inputs), exact)


def ungated_rounding(case: Case, seed: int = 0) -> None:
    inputs = case_inputs(UNGATED, case, seed)
    exact = oracle.activation(inputs["x"], inputs["kind"])
    assert_rounding("elementwise", calls.ungated_activation(**inputs), exact)


CASES = [case for case in GATED.cases if case.tier != "bench"]
CHECKS = tuple((f"rounding: {case.name}", partial(gated_rounding, case)) for case in CASES)
