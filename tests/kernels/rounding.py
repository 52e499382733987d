"""This module holds how a rounding error is measured and held against `kernels.bounds`. It does not know any op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from octavo.kernels.bounds import UNIT, bound
from torch import Tensor

# The mean of fewer rows is too near their maximum to be held to a bound of its own.
MIN_ROWS_FOR_MEAN = 30


class Errors(NamedTuple):
    """In units u of the output's dtype."""

    num_rows: int
    row_max: float
    row_mean: float
    slope: float
    """Largest bias of a head, 0 where there are no heads."""


def errors(out: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> Errors:
    """Measure `out` [num_tokens, d] or [num_tokens, heads, d] against its exact value in float64.

    Args:
        dtype: whose u to count in; None: out's.
    """
    unit = UNIT[str(dtype or out.dtype)[6:]]
    size = exact.abs().amax(dim=-1)
    difference = (out.double() - exact).abs().amax(dim=-1)
    assert not out.isnan().any(), "the output has NaN"
    assert bool((difference[size == 0] == 0).all()), "an output that must be zero is not"
    rows = (difference[size > 0] / size[size > 0]) / unit
    if rows.numel() == 0:
        return Errors(0, 0.0, 0.0, 0.0)
    # Bias per head: the least-squares slope of out over exact, rows normalised to equal size.
    slope = 0.0
    if exact.dim() == 3:
        factor = torch.where(size > 0, 1 / size, 0.0)[..., None]
        x, y = exact * factor, out.double() * factor
        xx, xy = (x * x).sum((0, 2)), (x * y).sum((0, 2))  # [heads]
        slope = float((xy[xx > 0] / xx[xx > 0] - 1).abs().max()) / unit
    return Errors(rows.numel(), float(rows.max()), float(rows.mean()), slope)


def assert_rounding(kind: str, out: Tensor, exact: Tensor, yardsticks: Sequence[Tensor] = ()) -> None:
    """Assert that `out` is within `kind`'s bound of `exact` in out's dtype.

    Args:
        yardsticks: the same result by plain computations in out's dtype, for a bound that is relative to the worst of
            them: honest float32 sums differ by a factor of two with their order alone.
    """
    dtype = str(out.dtype)[6:]
    limit, found = bound(kind, dtype), errors(out, exact)
    factor = (1.0, 1.0)
    if limit.yardstick:
        assert yardsticks
        plain = [errors(yardstick, exact, out.dtype) for yardstick in yardsticks]
        # A lucky plain computation is no reason to fail: nothing is asked for less than one rounding.
        factor = (max(1.0, *(p.row_max for p in plain)), max(0.5, *(p.row_mean for p in plain)))
    assert found.row_max <= limit.row_max * factor[0], f"{kind} {dtype}: row max {found.row_max:.3f} u"
    if found.num_rows >= MIN_ROWS_FOR_MEAN:
        assert found.row_mean <= limit.row_mean * factor[1], f"{kind} {dtype}: row mean {found.row_mean:.3f} u"
    if limit.slope is not None:
        assert found.slope <= limit.slope, f"{kind} {dtype}: slope bias {found.slope:.3f} u"
