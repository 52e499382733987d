"""This module holds tokens that are being sampled, and what the host makes of them once it knows them. It does not know
how they are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from octavo.kernels.sampling import LogprobOutput, SampleParams
from torch import Tensor

from ..step import LogprobEntry, RowError
from .row_extras import PlacedExtras
from .row_grammar import MaskWorkers
from .seen_tokens import PenalisedRows
from .staging import HostCopy

__all__ = ["Batch", "Draw", "SampledTokens", "logprob_entries"]

IntArray = npt.NDArray[np.integer[Any]]


class SampledTokens(NamedTuple):
    """What one step sampled."""

    token_ids: npt.NDArray[np.int32]
    """[n]; means nothing where the row failed."""
    failed: npt.NDArray[np.bool_] | None
    """[n] rows without finite logits, or with no token left to sample; None: no row failed."""
    errors: dict[int, RowError]
    """By position in the batch, of rows that had no token left to sample."""
    ended: npt.NDArray[np.bool_] | None
    """[n] rows whose grammar lets nothing follow their token; None: no row."""
    logprobs: dict[int, LogprobEntry]
    """By position in the batch, of rows that asked."""


@dataclass(slots=True)
class Batch:
    """What was gathered for some rows; good until a row changes hands, or may sample its stop tokens."""

    version: int
    rows: IntArray
    may_stop: npt.NDArray[np.bool_]
    """[n] whether `min_tokens` has been reached."""
    used: int
    params: SampleParams
    """Without positions, penalties and what depends on tokens that the host must know."""
    placed: list[PlacedExtras]
    looking_back: list[PlacedExtras]
    limited: list[PlacedExtras]
    limited_at: Tensor | None
    penalised: PenalisedRows | None
    wanted: tuple[list[int], list[int]]
    """Positions of rows that want log-probabilities, and how many top tokens each."""
    wanted_at: Tensor | None
    """None: all rows do."""


class Draw:
    """Tokens that are being sampled; to be waited for once, in the order of the steps.

    What it says of a row that has been removed or given away since means nothing, and changes nothing: what a row keeps
    between steps belongs to one sequence, and is another object for the next.

    Args:
        batch: the rows.
        positions: [n] of the tokens.
        sampled: [2, n] int32 on the device: token ids, and 1 where the row failed.
        finite: [num_limited] bool: whether the model's logits were, of `batch.limited`; None: there are none.
        logprobs: [num_wanted] each, of rows that asked; None: there are none.
        workers: begin the masks of the next tokens.
    """

    def __init__(
        self,
        batch: Batch,
        positions: IntArray,
        sampled: Tensor,
        finite: Tensor | None,
        logprobs: LogprobOutput | None,
        *,
        workers: MaskWorkers,
    ) -> None:
        self.token_ids = sampled[0]
        """[n] int32, on the device."""
        tensors = [sampled, finite, *(logprobs or ())]
        self._copy = HostCopy([tensor for tensor in tensors if tensor is not None], sampled.device)
        self._batch = batch
        self._positions = positions
        self._workers = workers

    def wait(self) -> SampledTokens:
        """Return what was sampled once the device is done, and remember it where later tokens depend on it."""
        for _, _, extras in self._batch.looking_back:  # whatever comes of this, nobody waits for it any more
            extras.num_awaited -= 1
        sampled, *others = self._copy.wait()
        token_ids, has_failed = sampled.numpy()
        failed = has_failed.astype(np.bool_) if has_failed.any() else None
        limited, (places, num_top) = self._batch.limited, self._batch.wanted
        is_finite = others.pop(0).tolist() if limited else []
        errors = {}
        if failed is not None:
            of_finite = (each for each, is_so in zip(limited, is_finite, strict=True) if is_so)
            errors = {each.at: each.extras.error for each in of_finite if failed[each.at]}
        logprobs = {}
        if others:
            entries = zip(places, logprob_entries(LogprobOutput(*others), num_top), strict=True)
            logprobs = {at: entry for at, entry in entries if failed is None or not failed[at]}
        return SampledTokens(token_ids, failed, errors, self._remember(token_ids, failed), logprobs)

    def _remember(
        self, token_ids: npt.NDArray[np.int32], failed: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[np.bool_] | None:
        """Tell rows that look back their tokens; return those whose output ends with theirs."""
        ended: npt.NDArray[np.bool_] | None = None
        for at, _, extras in self._batch.looking_back:
            has_token = failed is None or not failed[at]
            if has_token and extras.append(int(token_ids[at]), int(self._positions[at]), self._workers):
                ended = np.zeros(len(token_ids), dtype=np.bool_) if ended is None else ended
                ended[at] = True
        return ended


def logprob_entries(found: LogprobOutput, num_top: Sequence[int] | None = None) -> list[LogprobEntry]:
    """Return one entry per row of what `log_softmax_top` found.

    Args:
        found: with the log-probability of one chosen token per row.
        num_top: [n] how many top tokens each row reports; None: all that were found.
    """
    assert found.values is not None
    assert found.ranks is not None
    values, ranks = found.values.tolist(), found.ranks.tolist()
    top_ids, top_values = found.top_ids.tolist(), found.top_values.tolist()
    if num_top is not None:
        top_ids = [ids[:num] for ids, num in zip(top_ids, num_top, strict=True)]
        top_values = [numbers[:num] for numbers, num in zip(top_values, num_top, strict=True)]
    return [LogprobEntry(*entry) for entry in zip(values, ranks, top_ids, top_values, strict=True)]
