"""This module holds which decoding sequences begin with the same blocks. It does not know how blocks come to be shared,
nor how attention reads them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from octavo.kernels.attention import SPLIT_TOKENS, SharedPrefixes

from .input_batch import Int32Array

__all__ = ["find_shared_prefixes", "worth_sharing"]

LEAST_SAVED: Final = 0.05


def worth_sharing(num_members: int, shared_tokens: int, step_tokens: int) -> bool:
    """Whether to read keys once for several sequences.

    That takes another kernel in every layer, whose tiles cost the same however few rows they hold: it must spare more
    than a twentieth of the keys that the step's sequences, of `step_tokens` together, read without.
    """
    return shared_tokens >= SPLIT_TOKENS and (num_members - 1) * shared_tokens > LEAST_SAVED * step_tokens


def find_shared_prefixes(
    block_table: Int32Array, seq_lens: Int32Array, query_lens: Int32Array, block_size: int
) -> SharedPrefixes | None:
    """Find the sequences that have whole splits of blocks in common; None where sharing is not worth it.

    A group shares as much as spares the most of what its members have in common with the first of them.

    Args:
        block_table: [num_seqs, max_blocks_per_seq] int32.
        seq_lens: [num_seqs] int32, this step's tokens included.  query_lens: [num_seqs] int32.
    """
    split_blocks = SPLIT_TOKENS // block_size
    whole = (seq_lens - query_lens) // SPLIT_TOKENS  # [num_seqs] splits before this step's tokens
    candidates = np.flatnonzero(whole)
    if SPLIT_TOKENS % block_size or len(candidates) < 2:
        return None
    # Sequences that share a split share its last block; where none do, this comparison is all that a step pays.
    last_blocks = block_table[candidates, split_blocks - 1]
    _, group, num_members = np.unique(last_blocks, return_inverse=True, return_counts=True)
    if num_members.max() == 1:
        return None
    leaders, num_splits = np.zeros((2, len(seq_lens)), dtype=np.int32)
    for i in np.flatnonzero(num_members > 1):
        members = candidates[group == i]
        table = block_table[members, : whole[members].max() * split_blocks]
        alike = np.logical_and.accumulate(table == table[0], axis=1).sum(1) // split_blocks
        shared = np.minimum(alike, whole[members])  # [members] splits
        spared = shared * ((shared[None, :] >= shared[:, None]).sum(1) - 1)
        depth = int(shared[spared.argmax()])
        members = members[shared >= depth]
        if worth_sharing(len(members), depth * SPLIT_TOKENS, int(seq_lens.sum())):
            leaders[members], num_splits[members] = members[0], depth
    if not num_splits.any():
        return None
    return SharedPrefixes(torch.from_numpy(leaders), torch.from_numpy(num_splits))
