"""This module holds SGLang's Triton decode attention, on a copy of our cache in its layout. It does not know how time
is taken.

From an installed SGLang, or from its file `decode_attention.py` on the path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from octavo.kernels.spec import Case
from torch import Tensor

from .layouts import Unsuitable, refuse, require_memory, token_slots
from .vllm_unified import load

NAME = "SGLang Triton"
OPS = ("decode",)
PLACES = (
    "sglang.kernels.ops.attention.decode_attention",
    "sglang.srt.layers.attention.triton_ops.decode_attention",
    "decode_attention",
)
DEFAULT_SPLITS = 8
"""What its server takes at most unless told otherwise."""


def _make(case: Case, inputs: dict[str, Any], num_splits: int) -> Callable[[], Tensor]:
    refuse(case, "window", "sinks", "cache")
    if {query_len for query_len, _ in case["seqs"]} != {1}:
        raise Unsuitable("one query token per sequence")
    decode_attention_fwd = load(PLACES, "decode_attention_fwd")
    require_memory(2 * inputs["k_cache"].nbytes)
    q, device = inputs["q"].contiguous(), inputs["q"].device
    num_seqs, num_q_heads, head_dim = q.shape
    # Its pool is [slots, num_kv_heads, head_dim].
    keys, values = (inputs[name].transpose(1, 2).flatten(0, 1).contiguous() for name in ("k_cache", "v_cache"))
    starts, slots = token_slots(inputs)
    parts = (num_seqs, num_q_heads, num_splits)
    out = torch.empty_like(q)
    logits = torch.empty((*parts, head_dim), dtype=torch.float32, device=device)
    lse = torch.empty(parts, dtype=torch.float32, device=device)
    splits = torch.full((num_seqs,), num_splits, dtype=torch.int32, device=device)

    def call() -> Tensor:
        decode_attention_fwd(
            q,
            keys,
            values,
            out,
            starts,
            slots,
            logits,
            lse,
            splits,
            num_splits,
            inputs["scale"],
            1.0,
            1.0,
            logit_cap=case.get("soft_cap") or 0.0,
        )
        return out

    return call


WAYS = {"decode": {f"{n} splits": partial(_make, num_splits=n) for n in (DEFAULT_SPLITS, 4 * DEFAULT_SPLITS)}}
