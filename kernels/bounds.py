"""This module holds the rounding bounds every op is held to. It does not know how a test measures an error.

Errors are in units u, the unit roundoff of the output's dtype. Per row, the error is the largest |out - exact| divided
by the largest |exact|, where `exact` is a float64 computation on the identical low-precision inputs. Loosening a number
here needs a reason in the commit. The float64 rows only say that two float64 computations agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["BOUNDS", "UNIT", "Bound", "bound"]

UNIT: Final = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
"""Unit roundoff by dtype: half the distance from 1 to the next number."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What one op may be off by, in one dtype.

    `yardstick`: the limits are multiples of the error that a plain torch computation in the same dtype makes on the
    same inputs, not of u (float32, where the summation order alone decides how many u an honest kernel needs).
    """

    row_max: float
    row_mean: float
    slope: float | None = None
    """Bias per head: |least-squares slope of out over exact, minus 1|, in u; None: not measured."""
    yardstick: bool = False


BOUNDS: Final[dict[str, dict[str, Bound]]] = {
    "attention": {
        "bfloat16": Bound(1.5, 0.75, 0.25),
        "float16": Bound(1.5, 0.75, 0.25),
        "float32": Bound(2.0, 1.5, yardstick=True),
        "float64": Bound(4096.0, 512.0),
    },
    "elementwise": {
        "bfloat16": Bound(1.0, 0.75),
        "float16": Bound(1.0, 0.75),
        # No wider type to compute in: every operation of the formula rounds. Measured: 2.7 u at most.
        "float32": Bound(4.0, 3.0),
        "float64": Bound(64.0, 32.0),
    },
    "copy": {dtype: Bound(0.0, 0.0) for dtype in UNIT},
    # Absolute, in float32's u: 1e-6 is 16.8 u.
    "log_softmax": {"float32": Bound(16.8, 16.8)},
}


def bound(kind: str, dtype: str) -> Bound:
    """Return the bound of one kind of op in one dtype.

    Raises:
        KeyError: nothing is promised for it.
    """
    return BOUNDS[kind][dtype]
