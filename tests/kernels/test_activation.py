"""The activations against Python's own math, in float64."""

from __future__ import annotations

import octavo.kernels
import pytest
import torch
from octavo.kernels.activation import Activation
from octavo.kernels.spec import Case

from . import mlp_checks
from .attention_checks import same_bits


@pytest.mark.parametrize("case", mlp_checks.CASES, ids=lambda case: case.name)
def test_gated(backend: str, case: Case, seeds: range) -> None:
    for seed in seeds:
        mlp_checks.gated_rounding(case, seed)


@pytest.mark.parametrize("case", mlp_checks.CASES, ids=lambda case: case.name)
def test_ungated(backend: str, case: Case, seeds: range) -> None:
    for seed in seeds:
        mlp_checks.ungated_rounding(case, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_comes_first(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 100.0, 3.0, 5.0]], dtype=dtype)
    assert octavo.kernels.gated_activation(x, "silu").tolist() == [[0.0, 500.0]]


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out(backend: str, kind: Activation, dtype: torch.dtype) -> None:
    x = torch.linspace(-5, 5, 24).view(2, 12).to(dtype)
    expected, plain, kept = (
        octavo.kernels.gated_activation(x, kind),
        octavo.kernels.ungated_activation(x, kind),
        x.clone(),
    )
    out = torch.full((2, 6), float("nan"), dtype=dtype)
    assert octavo.kernels.gated_activation(x, kind, out=out) is out
    assert same_bits(out, expected)
    assert same_bits(x, kept)
    assert octavo.kernels.ungated_activation(x, kind, out=x) is x
    assert same_bits(x, plain)


def test_large_arguments(backend: str) -> None:
    x = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    for kind in ("silu", "gelu", "gelu_tanh"):
        assert octavo.kernels.gated_activation(x, kind).tolist() == [[0.0, 200.0]]
