"""This module holds which rows want to know what the model thinks of their prompts, and what it thought. It does not
know why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from octavo.kernels import log_softmax_top
from octavo.kernels.sampling import LogprobOutput
from torch import Tensor

from ..footprint import LOGITS_CHUNK_TOKENS
from ..step import LogprobEntry, NewSequence, SchedulerOutput
from .input_batch import InputBatch
from .sampler import logprob_entries
from .staging import HostCopy

__all__ = ["PromptLogprobs"]

Entries = Callable[[], dict[int, list[LogprobEntry]]]


class PromptLogprobs:
    """The rows whose prompts have not been run to their end.

    Args:
        batch: has the prompts.
        num_valid_ids: ids from here on do not exist in the tokenizer; None: all exist.
    """

    def __init__(self, batch: InputBatch, num_valid_ids: int | None) -> None:
        self._batch = batch
        self._num_valid_ids = num_valid_ids
        self._wanted: dict[int, tuple[int, int]] = {}
        """Row -> (number of top tokens, number of prompt tokens)."""

    def __bool__(self) -> bool:
        """Whether any row is left."""
        return bool(self._wanted)

    def add(self, sequence: NewSequence) -> None:
        """Take in a sequence that gets a row."""
        # A step that failed may have left a row it never took out again.
        self.remove(sequence.row)
        if sequence.params.prompt_logprobs is not None:
            self._wanted[sequence.row] = sequence.params.prompt_logprobs, sequence.num_prompt_tokens

    def remove(self, row: int) -> None:
        """Forget a row."""
        self._wanted.pop(row, None)

    def launch(self, step: SchedulerOutput, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Entries:
        """Launch what the rows of a step want.

        Args:
            hidden: [num_tokens, H] normalised.
            head: hidden states -> logits.

        Returns:
            What waits for it: an entry for each prompt token that this step's positions predict, by row.
        """
        if not self._wanted:
            return dict
        parts: list[tuple[int, HostCopy, npt.NDArray[np.bool_]]] = []
        starts = np.cumsum(step.num_scheduled_tokens) - step.num_scheduled_tokens
        for row, (num_top, num_prompt_tokens) in list(self._wanted.items()):
            for at in np.flatnonzero(step.rows == row).tolist():
                first = int(step.num_computed_tokens[at])
                stop = min(first + int(step.num_scheduled_tokens[at]), num_prompt_tokens - 1)
                for chunk, chunk_stop in _chunks(first, stop):
                    start = int(starts[at]) + chunk - first
                    following = self._batch.token_ids[row, chunk + 1 : chunk_stop + 1]
                    logits = head(hidden[start : start + chunk_stop - chunk])
                    parts.append((row, *self._launch(logits, following, num_top)))
                if stop == num_prompt_tokens - 1:
                    del self._wanted[row]

        def entries() -> dict[int, list[LogprobEntry]]:
            found: dict[int, list[LogprobEntry]] = {}
            for row, copy, exists in parts:
                found.setdefault(row, []).extend(_entries(LogprobOutput(*copy.wait()), exists, self._num_valid_ids))
            return found

        return entries

    def _launch(
        self, logits: Tensor, token_ids: npt.NDArray[np.int32], num_top: int
    ) -> tuple[HostCopy, npt.NDArray[np.bool_]]:
        """Ask what the model thought of given tokens, over the ids that the tokenizer has, as for sampled ones."""
        logits = logits[:, : self._num_valid_ids]
        num_ids = logits.shape[1]
        (known,) = self._batch.staging.upload(np.minimum(token_ids, num_ids - 1))
        found = log_softmax_top(logits, min(num_top, num_ids), known.long())
        assert found.values is not None
        assert found.ranks is not None
        copy = HostCopy((found.top_values, found.top_ids, found.values, found.ranks), logits.device)
        return copy, token_ids < num_ids


def _chunks(first: int, stop: int) -> Iterator[tuple[int, int]]:
    for chunk in range(first, stop, LOGITS_CHUNK_TOKENS):
        yield chunk, min(chunk + LOGITS_CHUNK_TOKENS, stop)


def _entries(found: LogprobOutput, exists: npt.NDArray[np.bool_], num_ids: int | None) -> list[LogprobEntry]:
    entries = logprob_entries(found)
    for i in np.flatnonzero(~exists).tolist():
        assert num_ids is not None
        entries[i] = entries[i]._replace(logprob=-math.inf, rank=num_ids + 1)
    return entries
