"""This module holds what the activations must satisfy, as functions. It does not know the backend."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from octavo.kernels.spec import Case, load_specs

from . import calls, oracle
from .attention_checks import same_bits
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


def rows_beyond_31_bits() -> None:
    """A row that starts past 2**31 elements is read and written where it is."""
    stride = (1 << 30) + 8
    # numpy's zeros come from calloc: only pages that are touched are ever backed by memory.
    x = torch.from_numpy(np.zeros(2 * stride + 8, dtype=np.float16)).as_strided((3, 8), (stride, 1))
    x.copy_(torch.arange(24.0).view(3, 8))
    plain = calls.gated_activation(x.contiguous(), "silu")
    assert same_bits(calls.gated_activation(x, "silu", out=x[:, 4:]).contiguous(), plain), (
        "a row depends on where it lies"
    )


# Longer than one program's part of a row.
_LONG = Case("long", {"num_tokens": 2, "intermediate_size": 2100, "kind": "gelu_tanh"}, "float16")
CASES = [*(case for case in GATED.cases if case.tier != "bench"), _LONG]
CHECKS = (
    *((f"rounding: {case.name}", partial(gated_rounding, case)) for case in CASES),
    ("exact: beyond 31 bits", rows_beyond_31_bits),
)
