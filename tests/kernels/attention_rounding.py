"""This module holds the rounding check of attention, as a function. It does not know the backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from octavo.kernels.spec import Case, OpSpec
from torch import Tensor

from . import oracle
from .attention_checks import call_lse
from .rounding import assert_rounding
from .seeds import case_inputs

NUM_ORDERS: Final = 8


def plain_results(inputs: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (out, lse) of plain computations that differ in the order of their sums alone.

    One is no yardstick: where a soft cap stretches scores, the order of a product's terms alone moved the worst row of
    one and the same inputs from 5 to 21 u.
    """
    keys = inputs["k_cache"]
    bits = keys.view(torch.uint8) if keys.itemsize == 1 else keys  # torch does not index float8
    for seed in range(NUM_ORDERS):
        order = torch.randperm(keys.shape[-1], generator=torch.Generator().manual_seed(seed))
        shuffled = {**inputs, "q": inputs["q"][..., order], "k_cache": bits[..., order].view(keys.dtype)}
        yield oracle.plain_attention(shuffled, dtype)
        yield oracle.attention(shuffled, dtype)


def check_rounding(spec: OpSpec, case: Case, seed: int) -> None:
    """Assert that out and lse of one case are within their bounds of the float64 oracle."""
    inputs = case_inputs(spec, case, seed)
    out, lse = call_lse(spec.name, inputs)
    exact, exact_lse = oracle.attention(inputs)
    wide = torch.promote_types(out.dtype, torch.float32)
    honest = list(plain_results(inputs, wide))
    assert_rounding("attention", out, exact, [plain for plain, _ in honest])
    seen = exact_lse > float("-inf")
    assert torch.equal(lse == float("-inf"), ~seen)
    error = (lse.double() - exact_lse)[seen].abs()
    # The lse is float32 whatever q is: twice the plain float32 error, or a few roundings of its size.
    plain_error = max(float((plain_lse.double() - exact_lse)[seen].abs().max()) for _, plain_lse in honest)
    allowed = 2 * plain_error + 4 * 2.0**-24 * (1 + exact_lse[seen].abs())
    assert bool((error <= allowed).all()), f"lse is off by {float(error.max()):.3g}"
