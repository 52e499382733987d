"""This module holds the specs of the activations. It does not know any backend."""

from __future__ import annotations

from typing import Any, Final

import torch

from ..spec import Axis, Case, OpSpec, TensorSpec

__all__ = ["SPECS"]

AXES: Final = {
    "num_tokens": Axis("var", "rows"),
    "intermediate_size": Axis("const", "elements of the MLP's inner layer"),
}
_OUTPUTS: Final = {"out": TensorSpec(("num_tokens", "intermediate_size"), "float", "activated rows")}
_OPTIONS: Final = {"kind": "silu, gelu or gelu_tanh"}
_KINDS: Final = ("silu", "gelu", "gelu_tanh")
# x · Φ(x) and the like underflow for large negative x; 3σ keeps rows where every element still counts.
_SPREAD = 3.0


def _make_inputs(width: int, case: Case, generator: torch.Generator) -> dict[str, Any]:
    shape = (case["num_tokens"], width * case["intermediate_size"])
    return {"x": (torch.randn(shape, generator=generator) * _SPREAD).to(case.torch_dtype), "kind": case["kind"]}


_CASES: Final = (
    *(
        Case(f"{kind}-{dtype}", {"num_tokens": 33, "intermediate_size": 67, "kind": kind}, dtype)
        for kind in _KINDS
        for dtype in ("float32", "bfloat16", "float16", "float64")
    ),
    Case("empty", {"num_tokens": 0, "intermediate_size": 8, "kind": "silu"}),
    Case("llama-8b", {"num_tokens": 64, "intermediate_size": 14336, "kind": "silu"}, "bfloat16", "bench"),
)

SPECS: Final = (
    OpSpec(
        name="gated_activation",
        axes=AXES,
        inputs={"x": TensorSpec(("num_tokens", "2 * intermediate_size"), "float", "gate, then up")},
        outputs=_OUTPUTS,
        options=_OPTIONS,
        make_inputs=lambda case, generator: _make_inputs(2, case, generator),
        cases=_CASES,
        bounds="elementwise",
        bytes=lambda case: 3 * case["num_tokens"] * case["intermediate_size"] * case.itemsize,
        flops=lambda case: 5 * case["num_tokens"] * case["intermediate_size"],
    ),
    OpSpec(
        name="ungated_activation",
        axes=AXES,
        inputs={"x": TensorSpec(("num_tokens", "intermediate_size"), "float", "rows to activate")},
        outputs=_OUTPUTS,
        options=_OPTIONS,
        make_inputs=lambda case, generator: _make_inputs(1, case, generator),
        cases=_CASES,
        bounds="elementwise",
        bytes=lambda case: 2 * case["num_tokens"] * case["intermediate_size"] * case.itemsize,
        flops=lambda case: 4 * case["num_tokens"] * case["intermediate_size"],
    ),
)
