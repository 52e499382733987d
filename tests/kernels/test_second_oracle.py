"""Every op, on every backend, against a second oracle that was written without a look at the first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from octavo.kernels.spec import Case, OpSpec, load_specs

from . import calls, oracle, second_oracle
from .attention_checks import call_lse, same_bits
from .norm_checks import LAYER_CASES, RMS_CASES
from .rounding import assert_rounding
from .seeds import case_inputs

OPS = ("paged_attention_prefill", "paged_attention_decode", "write_kv", "rms_norm", "sample", "log_softmax_top")
SPECS = load_specs()
SEQS = {
    "paged_attention_prefill": ((17, 17), (3, 35), (0, 9), (1, 16), (34, 70)),
    "paged_attention_decode": ((1, 1), (1, 33), (0, 5), (3, 70), (16, 16), (1, 129)),
}
SETTINGS = {
    "mha-bf16": ("bfloat16", {"group_size": 1, "num_kv_heads": 3}),
    "group-3-window-fp16": ("float16", {"group_size": 3, "head_dim": 80, "window": 18, "kind": "spotlight"}),
    "group-4-cap-bf16": ("bfloat16", {"group_size": 4, "head_dim": 128, "soft_cap": 5.0, "q_gain": 8.0}),
    "group-8-all-fp32": ("float32", {"group_size": 8, "sinks": True, "window": 33, "soft_cap": 8.0, "q_gain": 6.0}),
    "group-4-sinks-fp16": ("float16", {"group_size": 4, "sinks": True, "block_size": 64}),
    "deep-fp32": ("float32", {"group_size": 3, "head_dim": 128, "kind": "deep_negative"}),
    "int8": ("bfloat16", {"group_size": 4, "cache": "int8"}),
    "group-3-fp64": ("float64", {"group_size": 3, "sinks": True, "window": 18}),
}


def _cases(op: str) -> list[Case]:
    shape = {"seqs": SEQS[op], "num_kv_heads": 2, "head_dim": 64, "block_size": 16}
    found = [Case(name, {**shape, **values}, dtype) for name, (dtype, values) in SETTINGS.items()]
    if op == "paged_attention_decode":
        found.append(Case("draft-fp16", {**shape, "group_size": 4, "draft": True, "window": 9}, "float16"))
    return found


@pytest.mark.parametrize(
    ("spec", "case"),
    [pytest.param(SPECS[op], case, id=f"{op[16:]}-{case.name}") for op in SEQS for case in _cases(op)],
)
def test_attention(backend: str, spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case, 0)
    out, lse = call_lse(spec.name, inputs)
    exact, exact_lse = map(torch.from_numpy, second_oracle.attention(inputs))
    wider = torch.promote_types(out.dtype, torch.float32)
    plain = torch.from_numpy(second_oracle.attention(inputs, np.float32 if wider == torch.float32 else np.float64)[0])
    assert_rounding("attention", out, exact, [plain, oracle.plain_attention(inputs, wider)[0]])
    # The lse is float32: a few roundings of scores up to some dozens, of thousands where they are deep.
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("op", SEQS)
def test_the_two_oracles_agree(op: str) -> None:
    for case in _cases(op):
        inputs = case_inputs(SPECS[op], case, 1)
        for one, other in zip(oracle.attention(inputs), second_oracle.attention(inputs), strict=True):
            assert torch.allclose(one, torch.from_numpy(other), rtol=1e-12, atol=1e-13)


def test_the_oracle_would_notice() -> None:
    op = "paged_attention_decode"
    inputs = case_inputs(SPECS[op], _cases(op)[0], 0)
    exact = torch.from_numpy(second_oracle.attention(inputs)[0])
    wrong = torch.from_numpy(second_oracle.attention({**inputs, "window": 128})[0])
    with pytest.raises(AssertionError, match="row max"):
        assert_rounding("attention", wrong.to(torch.bfloat16), exact)


@pytest.mark.parametrize("case", [c for c in SPECS["write_kv"].cases if c.tier != "bench"], ids=lambda c: c.name)
def test_write_kv(backend: str, case: Case) -> None:
    inputs = case_inputs(SPECS["write_kv"], case, 2)
    before = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    calls.write_kv(**inputs)
    if not len(inputs["q"]):
        return
    q = second_oracle.prepared(before["q"], before.get("q_norm"), before)
    assert_rounding("elementwise", inputs["q"], torch.from_numpy(q))
    k = second_oracle.prepared(before["k"], before.get("k_norm"), before)
    slots = before["slot_mapping"].numpy()
    block_size = before["k_cache"].shape[2]
    for name, exact in (("k", k), ("v", second_oracle.wide(before["v"]))):
        found, old = (x[f"{name}_cache"].transpose(1, 2).flatten(0, 1) for x in (inputs, before))
        kept = np.setdiff1d(np.arange(len(old)), slots)
        assert same_bits(found.view(torch.uint8)[kept], old.view(torch.uint8)[kept])
        stored = second_oracle.wide(found)[slots[slots >= 0]]
        exact, limit = exact[slots >= 0], None
        if found.dtype == torch.int8:
            scale = second_oracle.wide(inputs[f"{name}_scale"])[slots // block_size, :, slots % block_size]
            stored = stored * scale[slots >= 0][..., None]
            limit = np.abs(exact).max(-1, keepdims=True) * (0.5 / 127 + 2.0**-8)
        elif found.dtype == torch.float8_e4m3fn:
            scale = float(before[f"{name}_scale"])
            stored, exact = stored * scale, np.clip(exact, -448 * scale, 448 * scale)
            limit = np.maximum(np.abs(exact) / 16, scale * 2.0**-10) + np.abs(exact) * 2.0**-8
        if limit is None:
            assert_rounding("elementwise", torch.from_numpy(stored).to(found.dtype), torch.from_numpy(exact))
        else:
            assert bool((np.abs(stored - exact) <= limit).all())


@pytest.mark.parametrize("case", RMS_CASES, ids=lambda case: case.name)
def test_rms_norm(backend: str, case: Case) -> None:
    inputs = case_inputs(SPECS["rms_norm"], case, 2)
    x = inputs["x"] + inputs["residual"] if "residual" in inputs else inputs["x"].clone()
    out = calls.rms_norm(**inputs)
    options = {"eps": inputs["eps"], "weight_offset": inputs.get("weight_offset", 0.0)}
    assert_rounding("elementwise", out, torch.from_numpy(second_oracle.rms_norm(x, inputs["weight"], **options)))


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
def test_layer_norm(backend: str, case: Case) -> None:
    inputs = case_inputs(SPECS["layer_norm"], case, 2)
    x = inputs["x"] + inputs["residual"] if "residual" in inputs else inputs["x"].clone()
    out = calls.layer_norm(**inputs)
    exact = second_oracle.layer_norm(x, inputs["weight"], inputs["bias"], eps=inputs["eps"])
    assert_rounding("elementwise", out, torch.from_numpy(exact))


@pytest.mark.parametrize("op", ["gated_activation", "ungated_activation"])
@pytest.mark.parametrize(
    "case", [c for c in SPECS["gated_activation"].cases if c.tier != "bench"], ids=lambda c: c.name
)
def test_activation(backend: str, op: str, case: Case) -> None:
    inputs = case_inputs(SPECS[op], case, 2)
    if op == "gated_activation":
        gate, up = inputs["x"].chunk(2, dim=1)
        exact = second_oracle.activation(gate, inputs["kind"]) * second_oracle.wide(up)
    else:
        exact = second_oracle.activation(inputs["x"], inputs["kind"])
    assert_rounding("elementwise", calls.call(op, **inputs), torch.from_numpy(exact))


@pytest.mark.parametrize("case", [c for c in SPECS["sample"].cases if c.tier != "bench"], ids=lambda c: c.name)
def test_sample(backend: str, case: Case, seeds: range) -> None:
    """Rows whose settings differ from each other, and tokens wherever float32 can tell."""
    for seed in seeds:
        inputs = case_inputs(SPECS["sample"], case, seed)
        params = inputs["params"]
        if params.temperature is not None:
            mixed = torch.arange(len(params.temperature)) % 3 > 0
            params = replace(params, temperature=params.temperature * mixed)
        found = calls.sample(inputs["logits"], params)
        expected = second_oracle.sample(inputs["logits"], params)
        assert not found.failed.any()
        for row, choice in enumerate(expected):
            assert not choice.sure or int(found.token_ids[row]) == choice.token_id, f"row {row}"
        assert sum(not choice.sure for choice in expected) <= len(expected) // 3


@pytest.mark.parametrize("case", [c for c in SPECS["log_softmax_top"].cases if c.tier != "bench"], ids=lambda c: c.name)
def test_log_softmax_top(backend: str, case: Case) -> None:
    inputs = case_inputs(SPECS["log_softmax_top"], case, 2)
    found = calls.log_softmax_top(**inputs)
    exact = second_oracle.log_softmax(inputs["logits"])
    assert (
        np.abs(found.top_values.double().numpy() - np.sort(exact)[:, ::-1][:, : inputs["num_top"]]).max(initial=0)
        < 1e-6
    )
    chosen = np.take_along_axis(exact, inputs["token_ids"].numpy()[:, None], 1)
    assert np.abs(found.values.double().numpy() - chosen[:, 0]).max(initial=0) < 1e-6
    assert found.ranks.tolist() == (exact >= chosen).sum(1).tolist()
