"""This module holds vLLM's Triton attention on our cache, seen in its order of axes. It does not know how time is
taken.

From an installed vLLM, or from its file `triton_unified_attention.py` on the path.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from octavo.kernels.spec import Case
from torch import Tensor

from .layouts import refuse

NAME = "vLLM Triton"
OPS = ("decode", "prefill")
PLACES = (
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.attention.ops.triton_unified_attention",
    "triton_unified_attention",
)
NUM_SEGMENTS = 16
"""Parts into which it splits a sequence's keys, where it does."""


def load(places: tuple[str, ...], name: str) -> Any:
    """Return a function from the first module that can be imported."""
    errors = []
    for place in places:
        try:
            return getattr(importlib.import_module(place), name)
        except (ImportError, AttributeError) as error:
            errors.append(str(error))
    raise ImportError("; ".join(dict.fromkeys(errors)))


def _make(case: Case, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    refuse(case, "sinks", "cache")
    unified_attention = load(PLACES, "unified_attention")
    q, device = inputs["q"], inputs["q"].device
    num_q_heads, head_dim = q.shape[1:]
    num_seqs, num_kv_heads = len(case["seqs"]), case["num_kv_heads"]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Up to this many sequences it splits, and then needs a place for the parts.
    threshold = 128 // num_kv_heads
    parts = (max(threshold, num_seqs), num_q_heads, NUM_SEGMENTS)
    padded = 1 << (head_dim - 1).bit_length()
    ones = torch.ones((num_seqs, num_kv_heads), dtype=torch.float32, device=device)
    arguments = {
        "q": q,
        "k": inputs["k_cache"].transpose(1, 2),  # [num_blocks, block_size, num_kv_heads, head_dim]
        "v": inputs["v_cache"].transpose(1, 2),
        "out": out,
        "cu_seqlens_q": inputs["cu_seqlens_q"],
        "max_seqlen_q": max(query_len for query_len, _ in case["seqs"]),
        "seqused_k": inputs["seq_lens"],
        "max_seqlen_k": max(seq_len for _, seq_len in case["seqs"]),
        "softmax_scale": inputs["scale"],
        "causal": True,
        "window_size": (-1, -1) if case.get("window") is None else (case["window"] - 1, 0),
        "block_table": inputs["block_table"],
        "softcap": case.get("soft_cap") or 0.0,
        "q_descale": None,
        "k_descale": ones,
        "v_descale": ones,
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": NUM_SEGMENTS,
        "softmax_segm_output": torch.empty((*parts, padded), dtype=torch.float32, device=device),
        "softmax_segm_max": torch.empty(parts, dtype=torch.float32, device=device),
        "softmax_segm_expsum": torch.empty(parts, dtype=torch.float32, device=device),
    }

    def call() -> Tensor:
        unified_attention(**arguments)
        return out

    return call


WAYS = {op: {"": _make} for op in OPS}
