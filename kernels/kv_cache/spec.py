"""This module holds the specs of the ops that write the KV cache. It does not know any backend."""

from __future__ import annotations

from typing import Any, Final

import torch

from ..attention.spec import AXES as ATTENTION_AXES
from ..attention.spec import CACHE_DTYPES, poisoned_cache
from ..rope.reference import build_cos_sin
from ..spec import Axis, Case, OpSpec, TensorSpec

__all__ = ["SPECS"]

AXES: Final = {
    **{
        name: ATTENTION_AXES[name]
        for name in ("num_tokens", "num_blocks", "num_q_heads", "num_kv_heads", "head_dim", "block_size")
    },
    "max_position": Axis("const", "rows of the RoPE table"),
    "rotary_dim": Axis("const", "elements of a head that are rotated"),
    "num_copies": Axis("var", "blocks to copy"),
}
_CACHE = ("num_blocks", "num_kv_heads", "block_size", "head_dim")
_KV = ("num_tokens", "num_kv_heads", "head_dim")


def _make_write_inputs(case: Case, generator: torch.Generator) -> dict[str, Any]:
    """Draw tokens whose slots are scattered over the pool, every fourth of them padding (slot -1)."""
    num_tokens, num_kv_heads, head_dim = case["num_tokens"], case["num_kv_heads"], case["head_dim"]
    block_size, num_blocks = case["block_size"], case["num_blocks"]
    dtype, kind = case.torch_dtype, case.get("cache")

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    slots = torch.randperm((num_blocks - 1) * block_size, generator=generator)[:num_tokens] + block_size
    slots[3::4] = -1
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    inputs: dict[str, Any] = {
        "q": randn(num_tokens, num_kv_heads * case["group_size"], head_dim),
        "k": randn(num_tokens, num_kv_heads, head_dim),
        "v": randn(num_tokens, num_kv_heads, head_dim),
        "k_cache": poisoned_cache(shape, CACHE_DTYPES.get(kind or "", dtype)),
        "v_cache": poisoned_cache(shape, CACHE_DTYPES.get(kind or "", dtype)),
        "slot_mapping": slots,
        "positions": torch.randint(0, case["max_position"], (num_tokens,), generator=generator),
        "rope_style": case.get("rope_style", "neox"),
    }
    if case.get("rotary_dim"):
        inputs["cos_sin"] = build_cos_sin(case["max_position"], theta=10_000.0, rotary_dim=case["rotary_dim"])
    if case.get("norm"):
        inputs |= {"q_norm": randn(head_dim) + 1, "k_norm": randn(head_dim) + 1, "eps": 1e-5}
    if kind == "int8":
        inputs |= {name: torch.full(shape[:3], float("nan")) for name in ("k_scale", "v_scale")}
    if kind == "e4m3":
        # Small enough that some elements lie beyond 448 steps and must be clamped.
        inputs |= {"k_scale": torch.tensor(0.005), "v_scale": torch.tensor(0.004)}
    return inputs


def _make_copy_inputs(case: Case, generator: torch.Generator) -> dict[str, Any]:
    """Draw copies among which some blocks are read by one and written by another."""
    shape = (case["num_blocks"], case["num_kv_heads"], case["block_size"], case["head_dim"])
    num_copies = case["num_copies"]
    return {
        "k_cache": torch.randn(shape, generator=generator).to(case.torch_dtype),
        "v_cache": torch.randn(shape, generator=generator).to(case.torch_dtype),
        "src": torch.randint(0, shape[0], (num_copies,), generator=generator),
        "dst": torch.randperm(shape[0], generator=generator)[:num_copies],
    }


def _write_bytes(case: Case) -> int:
    q = 2 * case["num_kv_heads"] * case["group_size"] * case["head_dim"] * case.itemsize
    kv = 2 * case["num_kv_heads"] * case["head_dim"] * (case.itemsize + (1 if case.get("cache") else case.itemsize))
    return int(case["num_tokens"] * (q + kv + 4 * case.get("rotary_dim", 0)))


def _case(name: str, dtype: str = "float32", tier: Any = "test", **values: Any) -> Case:
    shape = {
        "num_tokens": 9,
        "num_kv_heads": 2,
        "group_size": 2,
        "head_dim": 64,
        "block_size": 5,
        "num_blocks": 6,
        "max_position": 300,
        "rotary_dim": 64,
    }
    return Case(name, {**shape, **values}, dtype, tier)


_WRITE_CASES: Final = (
    *(_case(f"neox-{dtype}", dtype) for dtype in ("float32", "bfloat16", "float16", "float64")),
    _case("plain", rotary_dim=0),
    _case("interleaved", rope_style="interleaved"),
    _case("partial", rotary_dim=24),
    _case("partial-interleaved-bf16", "bfloat16", rotary_dim=24, rope_style="interleaved"),
    _case("norm", norm=True),
    _case("norm-bf16", "bfloat16", norm=True, head_dim=80, rotary_dim=32),
    _case("norm-only", norm=True, rotary_dim=0),
    _case("int8", cache="int8"),
    _case("int8-bf16", "bfloat16", cache="int8", norm=True),
    _case("e4m3", cache="e4m3"),
    _case("empty", num_tokens=0),
    _case(
        "llama-8b",
        "bfloat16",
        "bench",
        num_tokens=64,
        num_kv_heads=8,
        group_size=4,
        head_dim=128,
        rotary_dim=128,
        block_size=64,
        num_blocks=2049,
        max_position=8192,
    ),
)

SPECS: Final = (
    OpSpec(
        name="write_kv",
        axes=AXES,
        inputs={
            "q": TensorSpec(("num_tokens", "num_q_heads", "head_dim"), "float", "queries", written=True),
            "k": TensorSpec(_KV, "float", "keys, before norm and rotation"),
            "v": TensorSpec(_KV, "float", "values"),
            "k_cache": TensorSpec(_CACHE, "cache", "keys", written=True),
            "v_cache": TensorSpec(_CACHE, "cache", "values", written=True),
            "slot_mapping": TensorSpec(("num_tokens",), "int64", "slot to write, -1 for none"),
            "positions": TensorSpec(("num_tokens",), "int64", "row of cos_sin"),
            "cos_sin": TensorSpec(("max_position", "rotary_dim"), "float32", "cos, then sin", optional=True),
            "q_norm": TensorSpec(("head_dim",), "float", "RMSNorm weight of q", optional=True),
            "k_norm": TensorSpec(("head_dim",), "float", "RMSNorm weight of k", optional=True),
            "k_scale": TensorSpec(
                _CACHE[:3], "float32", "int8: written; e4m3: one number", optional=True, written=True
            ),
            "v_scale": TensorSpec(
                _CACHE[:3], "float32", "int8: written; e4m3: one number", optional=True, written=True
            ),
        },
        outputs={},
        options={"rope_style": "neox or interleaved", "eps": "of the norms"},
        make_inputs=_make_write_inputs,
        cases=_WRITE_CASES,
        bounds="elementwise",
        bytes=_write_bytes,
        flops=lambda case: int(
            3 * case["num_tokens"] * case["num_kv_heads"] * (case["group_size"] + 1) * case.get("rotary_dim", 0)
        ),
    ),
    OpSpec(
        name="copy_blocks",
        axes=AXES,
        inputs={
            "k_cache": TensorSpec(_CACHE, "cache", "keys", written=True),
            "v_cache": TensorSpec(_CACHE, "cache", "values", written=True),
            "src": TensorSpec(("num_copies",), "int64", "blocks to read"),
            "dst": TensorSpec(("num_copies",), "int64", "blocks to write"),
        },
        outputs={},
        make_inputs=_make_copy_inputs,
        cases=(
            _case("chain", num_copies=4),
            _case("chain-bf16", "bfloat16", num_copies=5),
            _case("none", num_copies=0),
        ),
        bounds="copy",
        bytes=lambda case: int(
            4 * case["num_copies"] * case["num_kv_heads"] * case["block_size"] * case["head_dim"] * case.itemsize
        ),
        flops=lambda case: 0,
    ),
)
