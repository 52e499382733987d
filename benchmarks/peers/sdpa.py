"""This module holds torch's scaled_dot_product_attention over keys and values gathered from the cache: what one would
use without a paged kernel. It does not know how time is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from octavo.kernels.spec import Case
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from .layouts import dense, equal_lengths, refuse, require_memory

NAME = "torch SDPA"
OPS = ("decode", "prefill")


def _make(case: Case, inputs: dict[str, Any], gathers: bool) -> Callable[[], Tensor]:
    refuse(case, "window", "soft_cap", "sinks", "cache")
    query_len, seq_len = equal_lengths(case)
    num_seqs = len(case["seqs"])
    require_memory(2 * inputs["k_cache"].nbytes)
    q = inputs["q"].unflatten(0, (num_seqs, query_len)).transpose(1, 2)  # [num_seqs, num_q_heads, query_len, head_dim]

    def gather() -> tuple[Tensor, Tensor]:
        table = inputs["block_table"]
        return dense(inputs["k_cache"], table, seq_len), dense(inputs["v_cache"], table, seq_len)

    # One row sees everything; a whole prompt is the ordinary causal case; a chunk's diagonal ends in the lower right.
    whole = query_len == seq_len
    mask: Any = None if whole or query_len == 1 else causal_lower_right(query_len, seq_len)
    once = None if gathers else tuple(x.contiguous() for x in gather())

    def call() -> Tensor:
        keys, values = once or gather()
        out: Tensor = scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=mask,
            is_causal=whole and query_len > 1,
            scale=inputs["scale"],
            enable_gqa=case["group_size"] > 1,
        )
        return out.transpose(1, 2).flatten(0, 1)

    return call


_WAYS = {"gathered before": partial(_make, gathers=False), "gathering": partial(_make, gathers=True)}
WAYS = dict.fromkeys(OPS, _WAYS)
