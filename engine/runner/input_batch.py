"""This module holds the runner's own copy of every row: its tokens and its block table. It does not know the model.

Rows are persistent: a sequence's tokens cross once, when it gets its row, and every step says of its rows only how far
they are. The device keeps two tables by row: the blocks, and the token sampled last, which feeds the next step before
the host knows it. On the host such a token is `ON_DEVICE` until `note` brings it.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from octavo.kernels import expand_rows
from torch import Tensor

from ..step import SchedulerOutput
from .staging import Staging, room_for

__all__ = ["ON_DEVICE", "InputBatch", "StepInputs", "Uploaded"]

Int32Array = npt.NDArray[np.int32]
IndexArray = npt.NDArray[np.integer[Any]]

ON_DEVICE: Final = -1
"""In the place of a token that has been sampled and is not known yet: the row's last."""


class Uploaded(NamedTuple):
    """What the host says of a step, on the device, in batch order."""

    rows: Tensor
    """[num_seqs] int32, -1: padding."""
    num_computed_tokens: Tensor
    """[num_seqs] int32."""
    cu_seqlens_q: Tensor
    """[num_seqs + 1] int32."""
    token_ids: Tensor
    """[num_tokens] int32, or `ON_DEVICE`."""
    cu_seqlens_prefill: Tensor
    """[num_prefills + 1] int32, from 0."""
    logits_indices: Tensor
    """[num_sampled] int32 token rows."""
    sampled_rows: Tensor
    """[num_sampled] int64 persistent rows."""


class StepInputs(NamedTuple):
    """What the model runs over in one step, on the device, in batch order."""

    token_ids: Tensor
    """[num_tokens] int64."""
    positions: Tensor
    """[num_tokens] int64."""
    slot_mapping: Tensor
    """[num_tokens] int64: where keys and values go."""
    seq_lens: Tensor
    """[num_seqs] int32, this step's tokens included."""
    block_table: Tensor
    """[num_seqs, blocks of the longest] int32."""
    cu_seqlens_q: Tensor
    """[num_seqs + 1] int32."""
    cu_seqlens_prefill: Tensor
    """[num_prefills + 1] int32, from 0."""


class InputBatch:
    """Tokens and block tables by row.

    Args:
        max_num_seqs: number of rows.
        max_model_len: longest sequence, in tokens.
        block_size: tokens per block.
        device: where steps run.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.block_size = block_size
        self.staging = Staging(torch.device(device))
        width = -(-max_model_len // block_size)
        # Pages of rows and positions never reached are never touched: they cost no memory. One place more than a
        # sequence may be long, for a last token that no step will run.
        self.token_ids: Int32Array = np.empty((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.host_block_tables: Int32Array = np.zeros((max_num_seqs, width), dtype=np.int32)
        """[max_num_seqs, max_blocks_per_seq] by row, as the device has them."""
        self.block_tables = torch.zeros((max_num_seqs, width), dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        """[max_num_seqs] by row."""
        self._owners = np.zeros(max_num_seqs, dtype=np.int64)
        """How often each row has changed hands."""

    def apply(self, step: SchedulerOutput) -> None:
        """Take in who has left and who has come since the last step."""
        self._owners[step.removed_rows] += 1
        for sequence in step.new_sequences:
            self._owners[sequence.row] += 1
            self.token_ids[sequence.row, : len(sequence.token_ids)] = sequence.token_ids

    def upload(self, step: SchedulerOutput, bucket: int | None = None, out: Tensor | None = None) -> Uploaded:
        """Bring a step to the device in one copy, and new blocks into its tables; without a loop over the rows.

        Args:
            bucket: of a step of one token per row: how many rows to make it, the others being padding.
            out: see `Staging.upload`: of a bucket, the first four tensors are always at the same places.
        """
        rows, first, query_lens = step.rows, step.num_computed_tokens, step.num_scheduled_tokens
        num_seqs = len(rows)
        if step.num_tokens == num_seqs:  # one token each
            token_ids = self.token_ids[rows, first]
            cu_seqlens_q = np.arange((bucket or num_seqs) + 1, dtype=np.int32)
        else:
            cu_seqlens_q = np.zeros(num_seqs + 1, dtype=np.int32)
            np.cumsum(query_lens, out=cu_seqlens_q[1:])
            positions = np.arange(step.num_tokens) + np.repeat(first - cu_seqlens_q[:-1], query_lens)
            token_ids = self.token_ids[np.repeat(rows, query_lens), positions]
        last = cu_seqlens_q[1 : num_seqs + 1] - 1
        if bucket is not None:
            rows, first, token_ids = _padded(rows, bucket, -1), _padded(first, bucket, 0), _padded(token_ids, bucket, 0)
        prefills = cu_seqlens_q[step.num_decodes : num_seqs + 1]
        sampled_rows = step.rows[step.sampled].astype(np.int64).view(np.int32)
        blocks = (step.block_rows, step.block_columns, step.block_ids)
        # What graphs read comes first.
        arrays = (rows, first, cu_seqlens_q, token_ids, prefills - prefills[0], last[step.sampled], sampled_rows)
        uploaded = self.staging.upload(*arrays, *blocks, out=out)
        if len(step.block_ids):
            self.host_block_tables[step.block_rows, step.block_columns] = step.block_ids
            self.block_tables.index_put_((uploaded[7], uploaded[8]), uploaded[9])
        return Uploaded._make([*uploaded[:6], uploaded[6].view(torch.int64)])

    def room(self, bucket: int, num_new_blocks: int) -> int:
        """Return the elements that `upload` takes for a bucket with so many new blocks."""
        return room_for(*[bucket] * 2, bucket + 1, *[bucket] * 2, 2 * bucket, 1, *[num_new_blocks] * 3)

    def gather(self, step: SchedulerOutput) -> StepInputs:
        """Build the inputs of a step that is not padded."""
        return self.expand(step, self.upload(step))

    def expand(self, step: SchedulerOutput, uploaded: Uploaded) -> StepInputs:
        """Build the inputs of a step from what has been uploaded of it."""
        longest = int((step.num_computed_tokens + step.num_scheduled_tokens).max())
        expanded = expand_rows(
            *uploaded[:4], self.last_token_ids, self.block_tables, block_size=self.block_size,
            num_columns=-(-longest // self.block_size),
        )  # fmt: skip
        return StepInputs(*expanded, uploaded.cu_seqlens_q, uploaded.cu_seqlens_prefill)

    def expect(self, rows: IndexArray, positions: IndexArray) -> npt.NDArray[np.int64]:
        """Say that tokens are being sampled for rows at their next positions, [num_sampled] each.

        Returns:
            Whose rows they are now, for `note`.
        """
        self.token_ids[rows, positions] = ON_DEVICE
        return self._owners[rows]

    def note(
        self, rows: IndexArray, positions: IndexArray, owners: npt.NDArray[np.int64], token_ids: Int32Array
    ) -> None:
        """Take in sampled tokens, [num_sampled], of rows that have not changed hands since."""
        same = self._owners[rows] == owners
        if not same.all():
            rows, positions, token_ids = rows[same], positions[same], token_ids[same]
        self.token_ids[rows, positions] = token_ids


def _padded(array: Int32Array, size: int, fill: int) -> Int32Array:
    padded = np.full(size, fill, dtype=np.int32)
    padded[: len(array)] = array
    return padded
