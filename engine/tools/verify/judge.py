"""This module holds how a replayed op is judged: its error in units of roundoff against what is allowed. It does not
know ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .comparison import row_errors, unit_of

__all__ = ["Judge", "OpRecord", "WrongOp"]

EAGER_FACTOR: Final = 4.0
"""An op may err so many times as much as the plain computation in its dtype."""
FLOOR: Final = {torch.float64: 64.0, torch.float32: 8.0}
"""Less than this is never wrong, in units of roundoff. Narrower dtypes: one rounding."""
NARROW_FLOOR: Final = 2.0


@dataclass(frozen=True, slots=True)
class WrongOp:
    """An op whose result is not what its inputs give."""

    layer: int | None
    op: str
    """In words: "down projection", "write_kv, keys"."""
    row: int
    """Of the step's tokens: the first one that is wrong."""
    error_units: float
    """Of that row."""
    worst_units: float
    eager_units: float
    """What the plain computation in the same dtype shows at most."""
    message: str


@dataclass(slots=True)
class OpRecord:
    """What all replays of one kind of op have shown, in units of roundoff."""

    num_replays: int = 0
    worst_units: float = 0.0
    eager_units: float = 0.0
    """Where the worst was."""
    limit_units: float = 0.0


class Judge:
    """Measures results against their replays and keeps what is wrong and what the worst of each op was."""

    def __init__(self) -> None:
        self.records: dict[str, OpRecord] = {}
        self.found: list[WrongOp] = []
        """In the order of the calls; taken by whoever asks."""

    def __call__(
        self,
        name: str,
        found: Tensor,
        exact: Tensor,
        plain: Tensor | None,
        *,
        rows: Sequence[int] | None = None,
        layer: int | None = None,
        message: str = "",
        dtype: torch.dtype | None = None,
        floor: float | None = None,
        magnitude: Tensor | None = None,
    ) -> None:
        """Measure a result and keep what is wrong with it.

        Args:
            name: of op and part.
            found, exact, plain: [T, ..., d] the op's result, the float64 replay, and the plain one in the op's dtype.
            rows: [T] the token row of each; None: in order from 0.
            layer: whose call it is.
            message: which arguments are not the reference's: that is wrong, however little comes of it.
            dtype: whose roundoff to count in; None: found's.
            floor: least error that is wrong, in units; None: the dtype's.
            magnitude: [T] units of float32 that a sum may err by whose order is free, relative to the largest of the
                row's results: with few rows the plain computation may be lucky.
        """
        dtype = dtype or found.dtype
        unit = unit_of(dtype)
        errors = row_errors(found, exact, unit)
        eager = 0.0 if plain is None else float(row_errors(plain, exact, unit).amax()) if len(plain) else 0.0
        floor = FLOOR.get(dtype, NARROW_FLOOR) if floor is None else floor
        limits = torch.full_like(errors, max(floor, EAGER_FACTOR * eager))
        if magnitude is not None:
            limits = torch.maximum(limits, magnitude.to(limits) * (unit_of(torch.float32) / unit))
        record = self.records.setdefault(name.partition(",")[0], OpRecord())
        record.num_replays += 1
        if len(errors) == 0:
            return
        at = int(errors.nan_to_num(torch.inf).argmax())
        worst = float(errors[at].nan_to_num(torch.inf))
        if worst >= record.worst_units:
            record.worst_units, record.eager_units, record.limit_units = worst, eager, float(limits[at])
        wrong = (~(errors <= limits)).nonzero()[:, 0]  # written so that NaN is wrong
        if len(wrong) or message:
            first = int(wrong[0]) if len(wrong) else 0
            row = first if rows is None else int(rows[first])
            error = float(errors[first].nan_to_num(torch.inf))
            self.found.append(WrongOp(layer, name, row, error, worst, eager, message))
