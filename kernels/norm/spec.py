"""This module holds the specs of the normalisation ops. It does not know any backend."""

from __future__ import annotations

from typing import Any, Final

import torch

from ..spec import Axis, Case, OpSpec, TensorSpec

__all__ = ["SPECS"]

AXES: Final = {
    "num_tokens": Axis("var", "rows"),
    "hidden_size": Axis("const", "elements normalised together"),
}
_X = ("num_tokens", "hidden_size")
_INPUTS: Final = {
    "x": TensorSpec(_X, "float", "rows to normalise, or to add to the residual"),
    "weight": TensorSpec(("hidden_size",), "float", "gain"),
    "residual": TensorSpec(_X, "float", "running sum, updated", optional=True, written=True),
}
_BIAS: Final = {"bias": TensorSpec(("hidden_size",), "float", "offset", optional=True)}
_OUTPUTS: Final = {"out": TensorSpec(_X, "float", "normalised rows")}
_OPTIONS: Final = {"eps": "added to the mean square (or variance)"}


def _make_rms_inputs(case: Case, generator: torch.Generator) -> dict[str, Any]:
    shape, dtype = (case["num_tokens"], case["hidden_size"]), case.torch_dtype
    # Rows of very different size: a mean over the wrong row, or eps in the wrong place, shows.
    size = torch.logspace(-3, 2, max(shape[0], 1))[: shape[0], None]
    inputs: dict[str, Any] = {
        "x": ((torch.randn(shape, generator=generator) + case.get("mean", 0.0)) * size).to(dtype),
        "weight": (torch.randn(shape[1], generator=generator) + 1).to(dtype),
        "eps": 1e-5,
    }
    if case.get("residual"):
        inputs["residual"] = (torch.randn(shape, generator=generator) * size).to(dtype)
    if case.get("weight_offset"):
        inputs["weight_offset"] = case["weight_offset"]
    return inputs


def _make_layer_inputs(case: Case, generator: torch.Generator) -> dict[str, Any]:
    inputs = _make_rms_inputs(case, generator)
    bias = torch.randn(case["hidden_size"], generator=generator).to(case.torch_dtype)
    inputs["bias"] = None if case.get("no_bias") else bias
    return inputs


def _num_bytes(case: Case) -> int:
    passes = 4 if case.get("residual") else 2
    return int((passes * case["num_tokens"] + 1) * case["hidden_size"] * case.itemsize)


def _cases(**extra: Any) -> tuple[Case, ...]:
    return (
        *(
            Case(
                f"{dtype}{'-residual' if residual else ''}",
                {"num_tokens": 33, "hidden_size": 576, "residual": residual},
                dtype,
            )
            for dtype in ("float32", "bfloat16", "float16", "float64")
            for residual in (False, True)
        ),
        Case("odd", {"num_tokens": 3, "hidden_size": 77, **extra}),
        Case("one", {"num_tokens": 1, "hidden_size": 1}),
        Case("empty", {"num_tokens": 0, "hidden_size": 64, "residual": True}),
        Case("llama-8b", {"num_tokens": 64, "hidden_size": 4096, "residual": True}, "bfloat16", "bench"),
        Case("llama-8b-chunk", {"num_tokens": 8192, "hidden_size": 4096, "residual": True}, "bfloat16", "bench"),
    )


SPECS: Final = (
    OpSpec(
        name="rms_norm",
        axes=AXES,
        inputs=_INPUTS,
        outputs=_OUTPUTS,
        options={**_OPTIONS, "weight_offset": "added to the weight"},
        make_inputs=_make_rms_inputs,
        cases=_cases(weight_offset=1.0),
        bounds="elementwise",
        bytes=_num_bytes,
        flops=lambda case: 4 * case["num_tokens"] * case["hidden_size"],
    ),
    OpSpec(
        name="layer_norm",
        axes=AXES,
        inputs={**_INPUTS, **_BIAS},
        outputs=_OUTPUTS,
        options=_OPTIONS,
        make_inputs=_make_layer_inputs,
        cases=_cases(no_bias=True),
        bounds="elementwise",
        bytes=_num_bytes,
        flops=lambda case: 7 * case["num_tokens"] * case["hidden_size"],
    ),
)
