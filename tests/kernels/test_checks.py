"""A wrong argument is refused by name, with what it is and what is allowed."""

from __future__ import annotations

from typing import Any

import octavo.kernels
import pytest
import torch
from octavo.kernels.sampling import AllowedTokens, SampleParams
from octavo.kernels.spec import load_specs
from torch import Tensor

from .seeds import case_inputs

SPECS = load_specs()
F32, I32 = torch.float32, torch.int32


def _inputs(op: str, case: str) -> dict[str, Any]:
    return case_inputs(SPECS[op], SPECS[op].case(case), 0)


ATTENTION = [
    ("ragged", {"q": torch.zeros(5, 64)}, "q has shape"),
    ("ragged", {"q": torch.zeros(5, 4, 64, dtype=torch.int32)}, "q has dtype torch.int32; allowed"),
    ("ragged", {"q": torch.zeros(5, 3, 64)}, "3 query heads cannot share 2 KV heads"),
    ("ragged", {"q": torch.zeros(5, 4, 32)}, "k_cache has shape"),
    ("ragged", {"v_cache": torch.zeros(3, 2, 16, 64)}, "v_cache has shape"),
    ("ragged", {"k_cache": torch.zeros(4, 64)}, "expected 4 axes"),
    ("ragged", {"seq_lens": torch.zeros(2, dtype=I32)}, "cu_seqlens_q has shape"),
    ("ragged", {"seq_lens": torch.zeros(6, dtype=F32)}, "seq_lens has dtype torch.float32; allowed: int32, int64"),
    ("ragged", {"block_table": torch.zeros(2, 3, dtype=I32)}, "block_table has shape"),
    ("ragged", {"window": 0}, "window is 0; it must be an int above 0"),
    ("ragged", {"window": True}, "window is True; it must be an int above 0"),
    ("ragged", {"window": 7.0}, "window is 7.0; it must be an int above 0"),
    ("ragged", {"soft_cap": -1.0}, "soft_cap is -1.0"),
    ("ragged", {"soft_cap": float("inf")}, "soft_cap is inf; it must be above 0 and finite"),
    ("ragged", {"soft_cap": float("nan")}, "soft_cap is nan"),
    ("ragged", {"sinks": torch.zeros(3)}, r"sinks has shape \(3,\); expected \(4,\)"),
    ("ragged", {"out": torch.zeros(2, 4, 64)}, "out is"),
    ("ragged", {"k_scale": 1.0}, "k_scale and v_scale must be given together"),
    ("ragged", {"k_scale": 1.0, "v_scale": 1.0}, "takes no k_scale"),
    ("int8", {"k_scale": None, "v_scale": None}, "needs k_scale and v_scale"),
    ("int8", {"k_scale": torch.ones(3)}, "k_scale has shape"),
    ("int8", {"v_scale": 1.0}, "v_scale of an int8 cache must be a float32 tensor"),
    ("e4m3-fp16", {"k_scale": torch.ones(3)}, "takes one number per layer"),
]
WRITE = [
    ("neox-float32", {"q": torch.zeros(8, 4, 64)}, "q has shape"),
    ("neox-float32", {"q": torch.zeros(9, 4, 64, dtype=torch.float16)}, "they must be one dtype"),
    ("neox-float32", {"v": torch.zeros(9, 1, 64)}, "v has shape"),
    ("neox-float32", {"slot_mapping": torch.zeros(8, dtype=torch.int64)}, "slot_mapping has shape"),
    ("neox-float32", {"positions": torch.zeros(9)}, "positions has dtype"),
    ("neox-float32", {"cos_sin": torch.zeros(300, 66)}, "rotary_dim even and at most 64"),
    ("neox-float32", {"rope_style": "gptj"}, "rope_style is 'gptj'; allowed: neox, interleaved"),
    ("neox-float32", {"q_norm": torch.zeros(63)}, "q_norm has shape"),
    ("neox-float32", {"k_cache": torch.zeros(6, 3, 5, 64)}, "k_cache has shape"),
    ("int8", {"k_scale": None, "v_scale": None}, "needs k_scale"),
]
NORM = [
    ("rms_norm", {"weight": torch.zeros(575)}, "weight has shape"),
    ("rms_norm", {"x": torch.zeros(33, 576, dtype=torch.int64)}, "x has dtype"),
    ("rms_norm", {"residual": torch.zeros(4, 576)}, "residual is"),
    ("rms_norm", {"residual": torch.zeros(33, 576, dtype=torch.float64)}, "residual is"),
    ("rms_norm", {"out": torch.zeros(33, 576, dtype=torch.float64)}, "out is"),
    ("layer_norm", {"bias": torch.zeros(575)}, "bias has shape"),
]
ACTIVATION = [
    ("gated_activation", {"kind": "relu"}, "kind is 'relu'; allowed: silu, gelu, gelu_tanh"),
    ("gated_activation", {"x": torch.zeros(2, 3)}, "x has shape"),
    ("gated_activation", {"out": torch.zeros(33, 7)}, "out is"),
    ("ungated_activation", {"out": torch.zeros(33, 7)}, "out is"),
]
CASES = [
    *((op, *rest) for op in ("paged_attention_prefill", "paged_attention_decode") for rest in ATTENTION),
    *(("write_kv", *rest) for rest in WRITE),
    *((op, "float32", *rest) for op, *rest in NORM),
    *((op, "silu-float32", *rest) for op, *rest in ACTIVATION),
    ("paged_attention_decode", "ragged", {"draft_mask": torch.zeros(4, dtype=torch.int64)}, "draft_mask has shape"),
    ("paged_attention_decode", "draft", {"draft_mask": torch.zeros(27, 1, dtype=torch.int64)}, "draft_mask has shape"),
    ("paged_attention_decode", "draft", {"draft_mask": torch.zeros(27, dtype=I32)}, "draft_mask has dtype torch.int32"),
    ("paged_attention_decode", "draft", {"draft_mask": torch.zeros(27)}, "draft_mask has dtype torch.float32"),
    ("copy_blocks", "chain", {"dst": torch.zeros(3, dtype=torch.int64)}, "dst has shape"),
]


@pytest.mark.parametrize(("op", "case", "changes", "message"), CASES)
def test_refused(backend: str, op: str, case: str, changes: dict[str, Any], message: str) -> None:
    inputs = _inputs(op, case)
    getattr(octavo.kernels, op)(**_inputs(op, case))  # what is refused below is the change alone
    with pytest.raises(ValueError, match=message):
        getattr(octavo.kernels, op)(**{**inputs, **changes})


def test_decode_takes_at_most_16_query_tokens(backend: str) -> None:
    inputs = _inputs("paged_attention_prefill", "ragged")
    with pytest.raises(ValueError, match="17 query tokens; decode takes at most 16"):
        octavo.kernels.paged_attention_decode(**inputs)


def test_caches_must_be_contiguous(backend: str) -> None:
    inputs = _inputs("paged_attention_decode", "ragged")
    inputs["k_cache"] = inputs["k_cache"].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="must be contiguous"):
        octavo.kernels.paged_attention_decode(**inputs)


def _apart(x: Tensor) -> Tensor:
    """Return `x` with elements of its last axis two places apart."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


METADATA = [
    *(
        (op, "sinks", name)
        for op in ("paged_attention_prefill", "paged_attention_decode")
        for name in ("cu_seqlens_q", "seq_lens", "block_table", "sinks")
    ),
    ("paged_attention_decode", "draft", "draft_mask"),
    ("paged_attention_decode", "int8", "k_scale"),
    ("paged_attention_prefill", "int8", "v_scale"),
    ("write_kv", "neox-float32", "slot_mapping"),
    ("write_kv", "neox-float32", "positions"),
    ("write_kv", "int8", "v_scale"),
    ("copy_blocks", "chain", "src"),
    ("copy_blocks", "chain", "dst"),
]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(("op", "case", "name"), METADATA)
def test_kernels_refuse_metadata_whose_elements_lie_apart(backend: str, op: str, case: str, name: str) -> None:
    inputs = _inputs(op, case)
    with pytest.raises(ValueError, match=f"{name} has strides"):
        getattr(octavo.kernels, op)(**{**inputs, name: _apart(inputs[name])})


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("name", ["src", "dst"])
def test_blocks_are_named_by_integers(backend: str, name: str) -> None:
    inputs = _inputs("copy_blocks", "chain")
    with pytest.raises(ValueError, match=f"{name} has dtype torch.float32; allowed: int32, int64"):
        octavo.kernels.copy_blocks(**{**inputs, name: inputs[name].float()})


SAMPLING = [
    (SampleParams(temperature=torch.ones(2, dtype=torch.float64)), "temperature has dtype torch.float64"),
    (SampleParams(top_k=torch.ones(2, dtype=torch.int64)), "top_k has dtype torch.int64; expected torch.int32"),
    (SampleParams(top_p=torch.ones(2)), "top_p has dtype torch.float32; expected torch.float64"),
    (SampleParams(min_p=torch.ones(2)), "min_p has dtype torch.float32"),
    (SampleParams(seed=torch.ones(2, dtype=I32)), "seed has dtype torch.int32"),
    (SampleParams(choice=torch.ones(2, dtype=torch.int64)), "choice has dtype torch.int64"),
    (SampleParams(position=torch.ones(2, dtype=I32)), "position has dtype torch.int32"),
    (
        SampleParams(allowed=AllowedTokens(torch.tensor([1]), torch.ones((1, 1), dtype=I32))),
        "allowed.bitmask has 1 words; 40 ids need 2",
    ),
    (
        SampleParams(allowed=AllowedTokens(torch.tensor([1]), torch.ones((1, 2), dtype=torch.int64))),
        "allowed.bitmask has dtype torch.int64; expected torch.int32",
    ),
]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(("params", "message"), SAMPLING)
def test_kernels_refuse_sampling_parameters(backend: str, params: SampleParams, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        octavo.kernels.sample(torch.zeros(2, 40), params)


@pytest.mark.parametrize("num_valid_ids", [0, -1])
def test_a_vocabulary_without_ids_is_refused(num_valid_ids: int) -> None:
    with pytest.raises(ValueError, match=f"num_valid_ids is {num_valid_ids}; it must be above 0, or None"):
        SampleParams(num_valid_ids=num_valid_ids)
