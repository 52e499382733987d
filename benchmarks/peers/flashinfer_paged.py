"""This module holds FlashInfer's paged attention on our cache as it lies: its HND layout is ours. It does not know how
time is taken.

Its plan is made outside the call, as an engine makes it once per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from octavo.kernels.spec import Case
from torch import Tensor

from .layouts import Unsuitable, page_lists, refuse

NAME = "FlashInfer"
OPS = ("decode", "prefill")
WORKSPACE_BYTES = 512 << 20


def _shared(case: Case) -> dict[str, Any]:
    refuse(case, "sinks", "cache")
    return {
        "num_qo_heads": case["num_kv_heads"] * case["group_size"],
        "num_kv_heads": case["num_kv_heads"],
        "page_size": case["block_size"],
        "window_left": -1 if case.get("window") is None else case["window"] - 1,
        "logits_soft_cap": case.get("soft_cap"),
        "q_data_type": case.torch_dtype,
        "kv_data_type": case.torch_dtype,
    }


def _run(wrapper: Any, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    q, caches = inputs["q"].contiguous(), (inputs["k_cache"], inputs["v_cache"])
    out = torch.empty_like(q)

    def call() -> Tensor:
        wrapper.run(q, caches, out=out)
        return out

    return call


def _decode(case: Case, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    import flashinfer

    if {query_len for query_len, _ in case["seqs"]} != {1}:
        raise Unsuitable("its decode takes one query token per sequence")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs["q"].device)
    # Its own choice of tensor cores is for its cache of compiled kernels; groups of 4 and more want them.
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=case["group_size"] >= 4)
    starts, blocks, last = page_lists(inputs)
    wrapper.plan(starts, blocks, last, head_dim=case["head_dim"], sm_scale=inputs["scale"], **_shared(case))
    return _run(wrapper, inputs)


def _prefill(case: Case, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    import flashinfer

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs["q"].device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    starts, blocks, last = page_lists(inputs)
    wrapper.plan(
        inputs["cu_seqlens_q"],
        starts,
        blocks,
        last,
        head_dim_qk=case["head_dim"],
        causal=True,
        sm_scale=inputs["scale"],
        **_shared(case),
    )
    return _run(wrapper, inputs)


WAYS = {"decode": {"": _decode}, "prefill": {"": _prefill}}
