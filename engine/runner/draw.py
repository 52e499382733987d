"""This module holds tokens that are being sampled, and what the host makes of them once it knows them. It does not know
how they are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from octavo.kernels.sampling import LogprobOutput
from torch import Tensor

from ..step import LogprobEntry, RowError
from .row_extras import PlacedExtras
from .row_grammar import MaskWorkers
from .staging import HostCopy

__all__ = ["Draw", "Launched", "SampledTokens", "logprob_entries"]

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


class Launched(NamedTuple):
    """What has been launched for one step, on the device."""

    sampled: Tensor
    """[2, n] int32: token ids, and 1 where the row failed."""
    finite: Tensor | None
    """[num_limited] bool: whether the model's logits were, of rows whose choice is limited; None: there are none."""
    logprobs: LogprobOutput | None
    """[num_wanted] each, of rows that asked; None: there are none."""


class Draw:
    """Tokens that are being sampled; to be waited for once, in the order of the steps.

    What it says of a row that has been removed or given away since means nothing, and changes nothing: what a row keeps
    between steps belongs to one sequence, and is another object for the next.

    Args:
        launched: is copied to the host at once.
        positions: [n] of the tokens.
        limited: the rows of `launched.finite`.
        looking_back: the rows that must learn their token.
        wanted: [num_wanted] positions in the batch, and how many top tokens each reports.
        workers: begin the masks of the next tokens.
    """

    def __init__(
        self,
        launched: Launched,
        positions: IntArray,
        *,
        limited: Sequence[PlacedExtras],
        looking_back: Sequence[PlacedExtras],
        wanted: tuple[Sequence[int], Sequence[int]],
        workers: MaskWorkers,
    ) -> None:
        self.token_ids = launched.sampled[0]
        """[n] int32, on the device."""
        tensors = [launched.sampled]
        if launched.finite is not None:
            tensors.append(launched.finite)
        tensors += [each for each in launched.logprobs or () if each is not None]
        self._has_finite = launched.finite is not None
        self._copy = HostCopy(tensors, launched.sampled.device)
        self._positions = positions
        self._limited = limited
        self._looking_back = looking_back
        self._wanted = wanted
        self._workers = workers

    def wait(self) -> SampledTokens:
        """Return what was sampled once the device is done, and remember it where later tokens depend on it."""
        sampled, *others = self._copy.wait()
        token_ids, has_failed = sampled.numpy()
        failed = has_failed.astype(np.bool_) if has_failed.any() else None
        finite = others.pop(0) if self._has_finite else None
        errors = {}
        if failed is not None and finite is not None:
            is_finite = finite.tolist()
            errors = {
                each.at: each.extras.error for i, each in enumerate(self._limited) if failed[each.at] and is_finite[i]
            }
        logprobs = {}
        if others:
            places, num_top = self._wanted
            entries = zip(places, logprob_entries(LogprobOutput(*others), num_top), strict=True)
            logprobs = {at: entry for at, entry in entries if failed is None or not failed[at]}
        return SampledTokens(token_ids, failed, errors, self._remember(token_ids, failed), logprobs)

    def _remember(
        self, token_ids: npt.NDArray[np.int32], failed: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[np.bool_] | None:
        """Tell rows that look back their tokens; return those whose output ends with theirs."""
        ended: npt.NDArray[np.bool_] | None = None
        for at, _, extras in self._looking_back:
            extras.num_awaited -= 1
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
