"""This module holds the rounding check of attention, as a function. It does not know the backend."""

from __future__ import annotations

import torch
from octavo.kernels.spec import Case, OpSpec

from . import oracle
from .attention_checks import call_lse
from .rounding import assert_rounding
from .seeds import case_inputs


def check_rounding(spec: OpSpec, case: Case, seed: int) -> None:
    """Assert that out and lse of one case are within their bounds of the float64 oracle."""
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
