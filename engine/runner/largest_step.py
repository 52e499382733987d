"""This module holds the largest step that an engine can be asked to run. It does not know what running it takes."""

from __future__ import annotations

import numpy as np

from ..resolve import ResolvedConfig
from ..sampling_params import SamplingParams
from ..step import MAX_DECODE_QUERY_LEN, NewSequence, SchedulerOutput

__all__ = ["largest_step"]


def largest_step(resolved: ResolvedConfig) -> SchedulerOutput:
    """Return a first step of as many tokens and sequences as there may be, all of them sampled.

    The sequences are as unequal as they can be: as many as possible decode, and one, or several of the greatest length,
    are read. All of them have the same blocks, from 1 on, so that few are needed; the results mean nothing. Sampling
    edits a copy of all logits, and the last sequence wants those of its prompt as well.
    """
    num_seqs, longest = resolved.max_num_seqs, resolved.max_model_len - 1
    lengths, left = [], resolved.max_num_batched_tokens - num_seqs
    for _ in range(num_seqs):
        lengths.append(1 + min(left, longest - 1))
        left -= lengths[-1] - 1
    lengths.reverse()
    widths = [-(-length // resolved.block_size) for length in lengths]
    columns = np.concatenate([np.arange(width, dtype=np.int32) for width in widths])
    decodes = [length for length in lengths if length <= MAX_DECODE_QUERY_LEN]
    edited = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.1, seed=0)
    none = np.empty(0, dtype=np.int32)
    return SchedulerOutput(
        step=0,
        removed_rows=none,
        new_sequences=tuple(
            NewSequence(
                row=row,
                token_ids=np.zeros(length, dtype=np.int32),
                num_prompt_tokens=length,
                params=edited if row < num_seqs - 1 else edited.replace(prompt_logprobs=0),
                seed=0,
                index=0,
                stop_token_ids=frozenset(),
            )
            for row, length in enumerate(lengths)
        ),
        rows=np.arange(num_seqs, dtype=np.int32),
        num_computed_tokens=np.zeros(num_seqs, dtype=np.int32),
        num_scheduled_tokens=np.array(lengths, dtype=np.int32),
        num_tokens=sum(lengths),
        num_decodes=len(decodes),
        num_decode_tokens=sum(decodes),
        sampled=np.arange(num_seqs, dtype=np.int32),
        block_rows=np.repeat(np.arange(num_seqs, dtype=np.int32), widths),
        block_columns=columns,
        block_ids=columns + 1,
    )
