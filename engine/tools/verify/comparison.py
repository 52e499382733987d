"""This module holds how far two tensors are apart: logits by position, hidden states and results of ops by row. It does
not know what they come from.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from octavo.kernels.bounds import UNIT

__all__ = ["CLEAR_GAP", "LogitDifferences", "compare_logits", "row_errors", "unit_of"]

CLEAR_GAP = 1e-3
"""Between the two likeliest tokens: above it the likeliest must be the same."""
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer[Any]]


def unit_of(dtype: torch.dtype) -> float:
    """Return the unit roundoff: half the distance from 1 to the next number."""
    return UNIT[str(dtype).removeprefix("torch.")]


def row_errors(found: torch.Tensor, exact: torch.Tensor, unit: float) -> torch.Tensor:
    """Return, for each row, the largest |found - exact| over the largest |exact|, in units of roundoff.

    Args:
        found, exact: [T, ..., d]; a row is all but the last axis, and a token has the error of its worst row.
        unit: of the dtype that is judged.

    Returns:
        [T] float64; infinite where the exact row is all zeros and the other is not, NaN where a number is not finite.
    """
    wide = exact.double()
    difference = (found.to(wide.device).double() - wide).abs().amax(-1)
    errors = torch.where(difference == 0, 0.0, difference / wide.abs().amax(-1)) / unit
    errors = torch.where(difference.isnan(), difference, errors)
    return errors.flatten(1).amax(-1) if errors.dim() > 1 else errors


@dataclass(frozen=True, slots=True)
class LogitDifferences:
    """Of n positions, each [n] float64: how two models' logits differ."""

    max_diff: FloatArray
    mean_diff: FloatArray
    """Of |found - reference| over the vocabulary."""
    kl: FloatArray
    """Kullback-Leibler divergence of the found distribution from the reference's, in nats."""
    same_top: FloatArray
    """1 where the likeliest token is the same."""
    margin: FloatArray
    """Of the reference: between its two likeliest tokens."""
    spread: FloatArray
    """Of the reference: standard deviation of the logits."""
    nll: FloatArray
    nll_reference: FloatArray
    """-log p of the token that follows, in nats; NaN at a text's last position."""

    @classmethod
    def join(cls, parts: list[LogitDifferences]) -> LogitDifferences:
        """Return several as one."""
        return cls(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def __len__(self) -> int:
        return len(self.max_diff)


def compare_logits(found: torch.Tensor, reference: torch.Tensor, next_ids: IntArray) -> LogitDifferences:
    """Compare the logits of n positions.

    Args:
        found: [n, vocab_size].
        reference: [n, vocab_size].
        next_ids: [n] the token that follows each position; -1: none does.
    """
    ours, theirs = found.double(), reference.to(found.device).double()
    difference = (ours - theirs).abs()
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = (log_theirs.exp() * (log_theirs - log_ours)).sum(-1).clamp_(min=0.0)
    top = theirs.topk(2, dim=-1).values
    following = torch.from_numpy(next_ids.astype(np.int64)).to(found.device)
    at = following.clamp(min=0)[:, None]
    nlls = [torch.where(following < 0, torch.nan, -log.gather(1, at)[:, 0]) for log in (log_ours, log_theirs)]
    columns = (
        difference.amax(-1),
        difference.mean(-1),
        kl,
        (ours.argmax(-1) == theirs.argmax(-1)).double(),
        top[:, 0] - top[:, 1],
        theirs.std(-1),
        *nlls,
    )
    return LogitDifferences(*(column.cpu().numpy() for column in columns))
