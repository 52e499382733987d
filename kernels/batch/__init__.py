"""This package holds what a step's rows become on the device. It does not know who runs, nor what is computed of it."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import active
from .reference import ExpandedRows

__all__ = ["ExpandedRows", "expand_rows"]


def expand_rows(
    rows: Tensor,
    num_computed_tokens: Tensor,
    cu_seqlens_q: Tensor,
    token_ids: Tensor,
    last_token_ids: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
    num_columns: int,
    out: ExpandedRows | None = None,
) -> ExpandedRows:
    """Expand what the host says of a step's sequences to what each token and each attention call wants to know.

    A token of row r at position p has the slot block_tables[r, p // block_size] · block_size + p % block_size. A
    padding row has one token, 0, at position 0, with slot -1; its length is 1, and its blocks are null.

    Args:
        rows: [num_seqs] int32, each sequence's persistent row; -1: padding.
        num_computed_tokens: [num_seqs] int32, a sequence's position before this step.
        cu_seqlens_q: [num_seqs + 1] int32, from 0 to num_tokens: where each sequence's tokens begin.
        token_ids: [num_tokens] int32; -1: the row's in `last_token_ids`, which the host need not know yet.
        last_token_ids: [max_num_seqs] int32 by row.
        block_tables: [max_num_seqs, max_blocks_per_seq] int32 by row.
        num_columns: of the batch's table, at least as many as its longest sequence has blocks.
        out: written and returned, where given: a captured graph's own tensors. None of it may overlap an argument.

    Raises:
        ValueError: names the argument, what it is and what is allowed.
    """
    result: ExpandedRows = active["expand_rows"](
        rows, num_computed_tokens, cu_seqlens_q, token_ids, last_token_ids, block_tables, block_size=block_size,
        num_columns=num_columns, out=out,
    )  # fmt: skip
    return result
