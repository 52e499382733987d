"""This module holds which tokens each penalised row has seen, on the device. It does not know how logits change.

What is sampled is counted where it is sampled: the next step can be launched before the host knows the token. The host
knows only how many distinct tokens a row can have at most, which bounds the work and the width of the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from octavo.kernels.sampling import Penalties
from torch import Tensor

from .row_settings import upload
from .staging import Staging

__all__ = ["PenalisedRows", "SeenTokens"]

IntArray = npt.NDArray[np.integer[Any]]


class PenalisedRows:
    """The rows of a batch that have penalties.

    Args:
        at: [m] positions in the batch.
        rows: [m] persistent rows.
        strengths: [3, m] repetition, presence and frequency.
    """

    __slots__ = ("at", "rows", "state_rows", "strengths")

    def __init__(self, at: IntArray, rows: IntArray, strengths: npt.NDArray[np.float32], staging: Staging) -> None:
        self.rows = rows
        self.at, self.state_rows, self.strengths = upload(
            staging, at.astype(np.int64), rows.astype(np.int64), strengths
        )


class SeenTokens:
    """Distinct tokens of prompt and output, and how often each was generated, by persistent row.

    Args:
        max_num_seqs: number of persistent rows.
        vocab_size: width of the logits.
        staging: brings what the host knows to the device.
        device: where the tables are.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, staging: Staging, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._staging = staging
        self._ids = torch.empty((max_num_seqs, 0), dtype=torch.int32, device=device)
        self._counts = torch.empty_like(self._ids)
        self._num_seen = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._most = np.zeros(max_num_seqs, dtype=np.int64)
        """What `num_seen` can be at most, tokens in flight included."""

    def add(
        self, row: int, prompt_token_ids: Sequence[int] | IntArray, output_token_ids: Sequence[int] | IntArray
    ) -> None:
        """Write the state of a sequence that gets a row."""
        outputs = np.asarray(output_token_ids, dtype=np.int32)
        seen = np.unique(np.concatenate((np.asarray(prompt_token_ids, dtype=np.int32), outputs)))
        num_seen = len(seen)
        self._reserve(num_seen)
        counts = np.bincount(np.searchsorted(seen, outputs), minlength=num_seen).astype(np.int32)
        self._ids[row, :num_seen], self._counts[row, :num_seen] = upload(self._staging, seen, counts)
        self._num_seen[row].fill_(num_seen)
        self._most[row] = num_seen

    def penalties(self, rows: PenalisedRows) -> Penalties:
        """Return what the rows' logits lose."""
        repetition, presence, frequency = rows.strengths
        state = rows.state_rows, self._ids, self._counts, self._num_seen
        return Penalties(rows.at, repetition, presence, frequency, *state)

    def count(self, rows: PenalisedRows, token_ids: Tensor, failed: Tensor) -> None:
        """Count what was sampled for the rows, without waiting for it.

        Args:
            token_ids: [n] int32, of the whole batch.
            failed: [n] bool: tokens that do not count.
        """
        width = min(int(self._most[rows.rows].max()), self._vocab_size)
        self._reserve(width + 1)
        self._most[rows.rows] += 1
        state_rows, token_ids = rows.state_rows, token_ids[rows.at]
        counted = failed[rows.at].logical_not_()
        num_seen = self._num_seen[state_rows]
        columns = torch.arange(width, dtype=torch.int32, device=num_seen.device)
        match = self._ids[:, :width].index_select(0, state_rows) == token_ids[:, None]
        # The token's column, or the first that is free: what stands there means nothing before num_seen has passed it.
        # Whatever the columns from there on match, the first column does not, and says the same.
        column = torch.where(match, columns, num_seen[:, None]).amin(1)
        is_new = column == num_seen
        place = state_rows, column.to(torch.int64)
        self._ids.index_put_(place, token_ids)
        self._counts.index_put_(place, self._counts[place].masked_fill_(is_new, 0) + counted)
        self._num_seen.index_put_((state_rows,), num_seen + (is_new & counted))

    def _reserve(self, num_seen: int) -> None:
        """Make room for that many distinct tokens in every row: memory follows the longest penalised sequence."""
        max_num_seqs, capacity = self._ids.shape
        if num_seen > capacity:
            added = self._ids.new_empty((max_num_seqs, max(num_seen - capacity, capacity, 256)))
            self._ids = torch.cat((self._ids, added), 1)
            self._counts = torch.cat((self._counts, added), 1)
