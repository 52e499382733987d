"""This module holds our paged inputs in the layouts that other libraries want. It does not know the libraries."""

from __future__ import annotations

from typing import Any

import torch
from octavo.kernels.spec import Case
from torch import Tensor

__all__ = ["Unsuitable", "dense", "equal_lengths", "page_lists", "refuse", "require_memory", "token_slots"]


class Unsuitable(Exception):  # noqa: N818
    """A peer that cannot run a case; says why."""


def refuse(case: Case, *options: str) -> None:
    """Raise where a case has an option that a peer lacks."""
    for option in options:
        if case.get(option) is not None:
            raise Unsuitable(f"not with {option}")


def require_memory(num_bytes: int) -> None:
    """Raise where a copy would not fit on the GPU."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < num_bytes + (1 << 30):
        raise Unsuitable(f"its copy of the cache takes {num_bytes / 2**30:.1f} GiB, more than is free")


def equal_lengths(case: Case) -> tuple[int, int]:
    """Return the (query_len, seq_len) that all sequences have.

    Raises:
        Unsuitable: they have not.
    """
    if len(set(case["seqs"])) != 1:
        raise Unsuitable("only for sequences of equal length")
    query_len, seq_len = case["seqs"][0]
    return query_len, seq_len


def dense(cache: Tensor, block_table: Tensor, seq_len: int) -> Tensor:
    """Return [num_seqs, num_kv_heads, seq_len, head_dim] of a cache: one gather."""
    blocks = cache[block_table]  # [num_seqs, max_blocks_per_seq, num_kv_heads, block_size, head_dim]
    return blocks.transpose(1, 2).flatten(2, 3)[:, :, :seq_len]


def page_lists(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (first entry of each sequence, blocks of all sequences, tokens in each sequence's last block), int32."""
    block_size, seq_lens, table = inputs["k_cache"].shape[2], inputs["seq_lens"], inputs["block_table"]
    counts = (seq_lens + block_size - 1) // block_size
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    own = torch.arange(table.shape[1], device=table.device)[None] < counts[:, None]
    return starts, table[own].to(torch.int32), (seq_lens - (counts - 1) * block_size).to(torch.int32)


def token_slots(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return (first entry of each sequence int32, slot of every token of all sequences int64)."""
    block_size, seq_lens, table = inputs["k_cache"].shape[2], inputs["seq_lens"], inputs["block_table"]
    starts = torch.nn.functional.pad(seq_lens.cumsum(0), (1, 0)).to(torch.int32)
    o_token = torch.arange(table.shape[1] * block_size, device=table.device)
    slots = table[:, o_token // block_size].long() * block_size + o_token % block_size
    return starts, slots[o_token[None] < seq_lens[:, None]]
