"""This module holds SGLang's Triton prefill attention, on a copy of our cache in its layout. It does not know how time
is taken.

From an installed SGLang, or from its file `extend_attention.py` on the path. It reads what was cached before the step
by a list of slots, and what the step adds from tensors of its own, as it has them at that moment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from octavo.kernels.spec import Case
from torch import Tensor

from .layouts import refuse, require_memory, token_slots
from .vllm_unified import load

NAME = "SGLang Triton"
OPS = ("prefill",)
PLACES = (
    "sglang.kernels.ops.attention.extend_attention",
    "sglang.srt.layers.attention.triton_ops.extend_attention",
    "extend_attention",
)


def _make(case: Case, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    refuse(case, "window", "sinks", "cache")
    extend_attention_fwd = load(PLACES, "extend_attention_fwd")
    require_memory(2 * inputs["k_cache"].nbytes)
    q, device = inputs["q"].contiguous(), inputs["q"].device
    # Its pool is [slots, num_kv_heads, head_dim].
    keys, values = (inputs[name].transpose(1, 2).flatten(0, 1).contiguous() for name in ("k_cache", "v_cache"))
    starts, slots = token_slots(inputs)
    # Of each sequence's slots the last are the step's own.
    query_lens = torch.tensor([query_len for query_len, _ in case["seqs"]], device=device)
    ends = torch.repeat_interleave(starts[1:].long() - query_lens, starts.diff().long())
    is_own = torch.arange(len(slots), device=device) >= ends
    prefix_lens = starts.diff() - query_lens
    prefix_starts = torch.nn.functional.pad(prefix_lens.cumsum(0), (1, 0)).to(torch.int32)
    own_keys, own_values = keys[slots[is_own]], values[slots[is_own]]
    out, prefix_slots = torch.empty_like(q), slots[~is_own]
    tensors = (q, own_keys, own_values, out, keys, values, inputs["cu_seqlens_q"], prefix_starts, prefix_slots)
    longest = max(query_len for query_len, _ in case["seqs"])
    options = {"sm_scale": inputs["scale"], "logit_cap": case.get("soft_cap") or 0.0, "k_scale": 1.0, "v_scale": 1.0}
    known = inspect.signature(extend_attention_fwd).parameters
    options = {name: value for name, value in options.items() if name in known}

    def call() -> Tensor:
        extend_attention_fwd(*tensors, None, True, None, longest, **options)
        return out

    return call


WAYS = {"prefill": {"": _make}}
