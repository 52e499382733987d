"""This module holds the runner's own copy of every row: its tokens and its block table. It does not know the model.

Rows are persistent: a sequence's tokens cross once, when it gets its row, and every step gathers what it runs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..step import SchedulerOutput

__all__ = ["InputBatch", "StepInputs"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class StepInputs(NamedTuple):
    """What the model runs over in one step, in batch order."""

    token_ids: Int64Array
    """[num_tokens]"""
    positions: Int64Array
    """[num_tokens]"""
    slot_mapping: Int64Array
    """[num_tokens] where keys and values go."""
    cu_seqlens_q: Int32Array
    """[num_seqs + 1]"""
    seq_lens: Int32Array
    """[num_seqs] this step's tokens included."""
    block_table: Int32Array
    """[num_seqs, blocks of the longest]; entries past a row's blocks mean nothing."""


class InputBatch:
    """Tokens and block tables by row.

    Args:
        max_num_seqs: number of rows.
        max_model_len: longest sequence, in tokens.
        block_size: tokens per block.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        # Pages of rows and positions never reached are never touched: they cost no memory.
        self.token_ids: Int32Array = np.empty((max_num_seqs, max_model_len), dtype=np.int32)
        self.block_table: Int32Array = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)

    def apply(self, step: SchedulerOutput) -> None:
        """Take in what changed since the last step: new rows and new blocks."""
        for sequence in step.new_sequences:
            self.token_ids[sequence.row, : len(sequence.token_ids)] = sequence.token_ids
        self.block_table[step.block_rows, step.block_columns] = step.block_ids

    def gather(self, step: SchedulerOutput) -> StepInputs:
        """Build the inputs of a step, without a loop over its rows."""
        first, query_lens = step.num_computed_tokens, step.num_scheduled_tokens
        cu_seqlens_q = np.zeros(len(step.rows) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=cu_seqlens_q[1:])
        if step.num_tokens == len(step.rows):  # one token each
            rows, positions = step.rows, first.astype(np.int64)
        else:
            rows = np.repeat(step.rows, query_lens)
            positions = np.arange(step.num_tokens, dtype=np.int64)
            positions += np.repeat(first - cu_seqlens_q[:-1], query_lens)
        block, offset = np.divmod(positions, self._block_size)
        slot_mapping = self.block_table[rows, block].astype(np.int64) * self._block_size + offset
        seq_lens = first + query_lens
        num_columns = -(-int(seq_lens.max()) // self._block_size)
        return StepInputs(
            token_ids=self.token_ids[rows, positions].astype(np.int64),
            positions=positions,
            slot_mapping=slot_mapping,
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            block_table=self.block_table[step.rows, :num_columns],
        )

    def append(self, rows: Int32Array, positions: Int32Array, token_ids: Int32Array) -> None:
        """Note the sampled tokens [num_sampled] at their positions."""
        # A row at the length limit has sampled its last token, which no step will run.
        room = positions < self.token_ids.shape[1]
        self.token_ids[rows[room], positions[room]] = token_ids[room]
