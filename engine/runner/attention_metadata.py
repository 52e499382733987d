"""This module holds the step's attention metadata: the split into decode and prefill and each one's plan. It does not
know the layers that read it.
"""

from __future__ import annotations

import numpy as np
import torch
from octavo.kernels import current_backend
from octavo.kernels.attention import SPLIT_TOKENS, AttentionOp, plan_paged_attention

from ..config import ModelConfig
from ..layers.attention import AttentionMetadata, AttentionSlice
from ..step import SchedulerOutput
from .input_batch import StepInputs
from .shared_prefixes import find_shared_prefixes

__all__ = ["build_attention_metadata"]


def build_attention_metadata(
    step: SchedulerOutput,
    inputs: StepInputs,
    model: ModelConfig,
    *,
    block_size: int,
    device: torch.device,
    invariant: bool,
) -> AttentionMetadata:
    """Build what all layers share in one step.

    Args:
        invariant: plan for bits that do not depend on neighbours, chunks or cache hits.
    """

    def part(op: AttentionOp, start: int, stop: int) -> AttentionSlice | None:
        if start == stop:
            return None
        cu_seqlens_q = torch.from_numpy(inputs.cu_seqlens_q[start : stop + 1] - inputs.cu_seqlens_q[start])
        seq_lens = torch.from_numpy(inputs.seq_lens[start:stop])
        num_columns = -(-int(inputs.seq_lens[start:stop].max()) // block_size)
        table = np.ascontiguousarray(inputs.block_table[start:stop, :num_columns])
        block_table = torch.from_numpy(table)
        cu_seqlens_q, seq_lens, block_table = (x.to(device) for x in (cu_seqlens_q, seq_lens, block_table))
        query_lens = step.num_scheduled_tokens[start:stop]
        shared = None
        if op == "decode" and not invariant and current_backend() == "triton":
            shared = find_shared_prefixes(table, inputs.seq_lens[start:stop], query_lens, block_size)
        plan = plan_paged_attention(
            cu_seqlens_q,
            seq_lens,
            block_table,
            op=op,
            num_tokens=int(query_lens.sum()),
            max_query_len=int(query_lens.max()),
            num_q_heads=model.num_q_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            block_size=block_size,
            max_splits=int((-(-inputs.seq_lens[start:stop] // SPLIT_TOKENS)).sum()),
            invariant=invariant,
            shared=shared,
        )
        return AttentionSlice(cu_seqlens_q, seq_lens, block_table, plan)

    return AttentionMetadata(
        positions=torch.from_numpy(inputs.positions).to(device),
        slot_mapping=torch.from_numpy(inputs.slot_mapping).to(device),
        num_decode_tokens=step.num_decode_tokens,
        decode=part("decode", 0, step.num_decodes),
        prefill=part("prefill", step.num_decodes, len(step.rows)),
    )
