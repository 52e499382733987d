"""This module holds the step's attention metadata: the split into decode and prefill and each one's plan. It does not
know the layers that read it.
"""

from __future__ import annotations

from octavo.kernels import current_backend
from octavo.kernels.attention import SPLIT_TOKENS, AttentionOp, plan_paged_attention

from ..config import ModelConfig
from ..layers.attention import AttentionMetadata, AttentionSlice
from ..step import SchedulerOutput
from .input_batch import Int32Array, StepInputs
from .shared_prefixes import find_shared_prefixes

__all__ = ["build_attention_metadata"]


def build_attention_metadata(
    step: SchedulerOutput,
    inputs: StepInputs,
    model: ModelConfig,
    *,
    block_size: int,
    invariant: bool,
    host_block_tables: Int32Array | None = None,
) -> AttentionMetadata:
    """Build what all layers share in one step.

    Args:
        invariant: plan for bits that do not depend on neighbours, chunks or cache hits.
        host_block_tables: [max_num_seqs, max_blocks_per_seq] by row, to look for prefixes that decoding sequences
            share; None: do not look.
    """
    all_seq_lens = step.num_computed_tokens + step.num_scheduled_tokens

    def part(op: AttentionOp, start: int, stop: int) -> AttentionSlice | None:
        if start == stop:
            return None
        query_lens, seq_lens = step.num_scheduled_tokens[start:stop], all_seq_lens[start:stop]
        num_columns = -(-int(seq_lens.max()) // block_size)
        shared = None
        if op == "decode" and host_block_tables is not None and not invariant and current_backend() == "triton":
            table = host_block_tables[step.rows[start:stop], :num_columns]
            shared = find_shared_prefixes(table, seq_lens, query_lens, block_size)
        cu_seqlens_q = inputs.cu_seqlens_q[: stop + 1] if op == "decode" else inputs.cu_seqlens_prefill
        block_table = inputs.block_table[start:stop, :num_columns]
        splits = -(-seq_lens // SPLIT_TOKENS)
        plan = plan_paged_attention(
            cu_seqlens_q, inputs.seq_lens[start:stop], block_table, op=op, num_tokens=int(query_lens.sum()),
            max_query_len=int(query_lens.max()), num_q_heads=model.num_q_heads, num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim, block_size=block_size, max_splits=int(splits.sum()),
            max_parts=int((splits * query_lens)[splits > 1].sum()), invariant=invariant, shared=shared,
        )  # fmt: skip
        return AttentionSlice(cu_seqlens_q, inputs.seq_lens[start:stop], block_table, plan)

    return AttentionMetadata(
        positions=inputs.positions,
        slot_mapping=inputs.slot_mapping,
        num_decode_tokens=step.num_decode_tokens,
        decode=part("decode", 0, step.num_decodes),
        prefill=part("prefill", step.num_decodes, len(step.rows)),
    )
