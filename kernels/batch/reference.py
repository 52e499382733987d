"""This module holds the expansion of a step's rows in plain torch. It does not know Triton."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_dtype, check_shape, check_side_by_side

__all__ = ["ExpandedRows", "check_rows", "expand_rows"]


class ExpandedRows(NamedTuple):
    """A step's tokens and tables, in batch order."""

    token_ids: Tensor
    """[num_tokens] int64."""
    positions: Tensor
    """[num_tokens] int64."""
    slot_mapping: Tensor
    """[num_tokens] int64, -1: padding, not written."""
    seq_lens: Tensor
    """[num_seqs] int32, this step's tokens included."""
    block_table: Tensor
    """[num_seqs, num_columns] int32, 0 past a sequence's last block."""


_DTYPES: Final = (torch.int64, torch.int64, torch.int64, torch.int32, torch.int32)


def check_rows(
    rows: Tensor,
    num_computed_tokens: Tensor,
    cu_seqlens_q: Tensor,
    token_ids: Tensor,
    last_token_ids: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
    num_columns: int,
    out: ExpandedRows | None,
) -> None:
    """Check the arguments of `expand_rows`.

    Raises:
        ValueError: names the argument, what it is and what is allowed.
    """
    if block_tables.dim() != 2:
        raise ValueError(f"block_tables has shape {tuple(block_tables.shape)}; expected 2 axes")
    num_seqs, num_tokens, (max_num_seqs, width) = len(rows), len(token_ids), block_tables.shape
    given = {
        "rows": (rows, (num_seqs,)),
        "num_computed_tokens": (num_computed_tokens, (num_seqs,)),
        "cu_seqlens_q": (cu_seqlens_q, (num_seqs + 1,)),
        "token_ids": (token_ids, (num_tokens,)),
        "last_token_ids": (last_token_ids, (max_num_seqs,)),
        "block_tables": (block_tables, (max_num_seqs, width)),
    }
    for name, (x, shape) in given.items():
        check_shape(name, x, shape)
        check_dtype(name, x, torch.int32)
    check_side_by_side(**{name: x for name, (x, _) in given.items()})
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be above 0")
    if not 0 <= num_columns <= width:
        raise ValueError(f"num_columns is {num_columns}; block_tables has {width}")
    if out is not None:
        shapes = ((num_tokens,),) * 3 + ((num_seqs,), (num_seqs, num_columns))
        for name, x, shape, dtype in zip(out._fields, out, shapes, _DTYPES, strict=True):
            check_shape(f"out.{name}", x, shape)
            check_dtype(f"out.{name}", x, dtype)
        check_side_by_side(**{f"out.{name}": x for name, x in out._asdict().items()})


def expand_rows(
    rows: Tensor, num_computed_tokens: Tensor, cu_seqlens_q: Tensor, token_ids: Tensor, last_token_ids: Tensor,
    block_tables: Tensor, *, block_size: int, num_columns: int, out: ExpandedRows | None = None,
) -> ExpandedRows:  # fmt: skip
    """See `octavo.kernels.expand_rows`."""
    check_rows(
        rows, num_computed_tokens, cu_seqlens_q, token_ids, last_token_ids, block_tables, block_size=block_size,
        num_columns=num_columns, out=out,
    )  # fmt: skip
    device, num_tokens = rows.device, len(token_ids)
    index, is_row = rows.clamp(min=0).long(), rows >= 0  # padding looks at row 0, and takes nothing of it
    query_lens = cu_seqlens_q.diff()
    seq_lens = torch.where(is_row, num_computed_tokens + query_lens, 1)
    # The number of tokens is known, so that nobody waits for a device to count them.
    which = torch.repeat_interleave(query_lens.long(), output_size=num_tokens)  # [num_tokens] place in the batch
    row, is_token = index[which], is_row[which]
    positions = torch.arange(num_tokens, device=device) + (num_computed_tokens - cu_seqlens_q[:-1])[which]
    positions = torch.where(is_token, positions, 0)
    slots = block_tables[row, positions // block_size].long() * block_size + positions % block_size
    known = torch.where(token_ids >= 0, token_ids, last_token_ids[row])
    num_blocks = torch.where(is_row, (seq_lens + block_size - 1) // block_size, 0)
    columns = torch.arange(num_columns, device=device)
    found = ExpandedRows(
        token_ids=torch.where(is_token, known, 0).long(),
        positions=positions,
        slot_mapping=torch.where(is_token, slots, -1),
        seq_lens=seq_lens,
        block_table=torch.where(columns < num_blocks[:, None], block_tables[:, :num_columns][index], 0),
    )
    if out is None:
        return found
    for given, x in zip(out, found, strict=True):
        given.copy_(x)
    return out
