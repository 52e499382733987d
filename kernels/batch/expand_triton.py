# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds the expansion of a step's rows as a Triton kernel. It does not know what is computed of them."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import cdiv
from .reference import ExpandedRows, check_rows

__all__ = ["expand_rows"]

_BLOCK: Final = 256
"""Columns of the table, and tokens, that one program writes at once."""


# One variant for all: what comes in are parts of one upload and what goes out of a graph's buffers, of any alignment.
@triton.jit(
    do_not_specialize=[
        "p_rows", "p_num_computed_tokens", "p_cu_seqlens_q", "p_known_ids", "p_last_ids", "p_blocks", "p_token_ids",
        "p_positions", "p_slots", "p_seq_lens", "p_table", "num_columns", "blocks_stride", "table_stride",
    ]
)  # fmt: skip
def expand_rows_kernel(
    p_rows,
    p_num_computed_tokens,
    p_cu_seqlens_q,
    p_known_ids,
    p_last_ids,
    p_blocks,
    p_token_ids,
    p_positions,
    p_slots,
    p_seq_lens,
    p_table,
    num_columns,
    blocks_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """position = num_computed_tokens + i, slot = blocks[position // BLOCK_SIZE] · BLOCK_SIZE + position % BLOCK_SIZE.

    One program handles BLOCK columns of one sequence's table and every num_programs-th BLOCK of its tokens.
    Grid: (num_seqs, as many as columns or tokens ask for).
    """
    i_seq, i_part = tl.program_id(0), tl.program_id(1)
    i_row = tl.load(p_rows + i_seq)
    i_start = tl.load(p_cu_seqlens_q + i_seq)
    query_len = tl.load(p_cu_seqlens_q + i_seq + 1) - i_start
    i_first = tl.load(p_num_computed_tokens + i_seq)
    is_row = i_row >= 0
    seq_len = tl.where(is_row, i_first + query_len, 1)
    if i_part == 0:
        tl.store(p_seq_lens + i_seq, seq_len)

    o_block = tl.arange(0, BLOCK)  # [BLOCK]
    p_own = p_blocks + i_row.to(tl.int64) * blocks_stride
    o_column = i_part * BLOCK + o_block  # [BLOCK]
    num_blocks = tl.where(is_row, tl.cdiv(seq_len, BLOCK_SIZE), 0)
    b_id = tl.load(p_own + o_column, mask=o_column < tl.minimum(num_blocks, num_columns), other=0)  # [BLOCK]
    tl.store(p_table + i_seq.to(tl.int64) * table_stride + o_column, b_id, mask=o_column < num_columns)

    last = tl.load(p_last_ids + i_row, mask=is_row, other=0)
    num_known = tl.where(is_row, query_len, 0)
    for i_token in range(i_part * BLOCK, query_len, tl.num_programs(1) * BLOCK):
        o_token = i_token + o_block  # [BLOCK] from the sequence's first of this step
        m_token = o_token < query_len
        m_known = o_token < num_known
        o_out = i_start + o_token  # [BLOCK]
        b_token = tl.load(p_known_ids + o_out, mask=m_known, other=0)  # [BLOCK]
        b_token = tl.where(b_token < 0, last, b_token)
        o_position = tl.where(is_row, i_first + o_token, 0)  # [BLOCK]
        b_slot = tl.load(p_own + o_position // BLOCK_SIZE, mask=m_known, other=0).to(tl.int64)  # [BLOCK]
        b_slot = tl.where(is_row, b_slot * BLOCK_SIZE + o_position % BLOCK_SIZE, -1)
        tl.store(p_token_ids + o_out, b_token.to(tl.int64), mask=m_token)
        tl.store(p_positions + o_out, o_position.to(tl.int64), mask=m_token)
        tl.store(p_slots + o_out, b_slot, mask=m_token)


def expand_rows(
    rows: Tensor, num_computed_tokens: Tensor, cu_seqlens_q: Tensor, token_ids: Tensor, last_token_ids: Tensor,
    block_tables: Tensor, *, block_size: int, num_columns: int, out: ExpandedRows | None = None,
) -> ExpandedRows:  # fmt: skip
    """See `octavo.kernels.expand_rows`."""
    check_rows(
        rows, num_computed_tokens, cu_seqlens_q, token_ids, last_token_ids, block_tables, block_size=block_size,
        num_columns=num_columns, out=out,
    )  # fmt: skip
    num_seqs, num_tokens = len(rows), len(token_ids)
    if out is None:
        ids, positions, slots = rows.new_empty((3, num_tokens), dtype=torch.int64)
        out = ExpandedRows(ids, positions, slots, rows.new_empty(num_seqs), rows.new_empty((num_seqs, num_columns)))
    if num_seqs:
        # A sequence has at least one token, so this is the most that one can have.
        longest = num_tokens - num_seqs + 1
        expand_rows_kernel[num_seqs, max(cdiv(max(num_columns, longest), _BLOCK), 1)](
            rows,
            num_computed_tokens,
            cu_seqlens_q,
            token_ids,
            last_token_ids,
            block_tables,
            *out,
            num_columns,
            block_tables.stride(0),
            out.block_table.stride(0),
            BLOCK_SIZE=block_size,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out
