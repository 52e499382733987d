"""This module holds torch's flex_attention, compiled, over keys and values gathered before. It does not know how time
is taken.

Dense, not paged: its paged form remaps a block mask on every step, which is not what would be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from octavo.kernels.spec import Case
from torch import Tensor

from .layouts import Unsuitable, dense, equal_lengths, refuse, require_memory

NAME = "torch flex_attention"
OPS = ("prefill",)
MAX_QUERY_LEN = 8192
"""Compiled anew for each shape: beyond, it would take longer to prepare than to measure."""
GATHERED_FROM = 64
"""Tokens per block of the cases that are timed."""


def _make(case: Case, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    refuse(case, "soft_cap", "sinks", "cache")
    if case["block_size"] != GATHERED_FROM:
        raise Unsuitable("compiled for each case; of keys gathered before, the size of a block is not known")
    query_len, seq_len = equal_lengths(case)
    if query_len > MAX_QUERY_LEN:
        raise Unsuitable(f"not beyond {MAX_QUERY_LEN} query tokens")
    require_memory(2 * inputs["k_cache"].nbytes)
    q = inputs["q"].unflatten(0, (len(case["seqs"]), query_len)).transpose(1, 2).contiguous()
    keys, values = (dense(inputs[name], inputs["block_table"], seq_len).contiguous() for name in ("k_cache", "v_cache"))
    window, offset = case.get("window") or seq_len, seq_len - query_len

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row + offset) & (key > row + offset - window)

    mask = create_block_mask(sees, None, None, query_len, seq_len, device=str(q.device))
    torch.compiler.reset()  # it compiles one function for a few shapes only, then no longer
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        out: Tensor = compiled(
            q, keys, values, block_mask=mask, scale=inputs["scale"], enable_gqa=case["group_size"] > 1
        )
        return out.transpose(1, 2).flatten(0, 1)

    return call


WAYS = {"prefill": {"": _make}}
