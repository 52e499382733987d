"""The activations against Python's own math, in float64."""

from __future__ import annotations

import pytest
import torch
from octavo.kernels.activation import Activation
from octavo.kernels.dispatch import available_backends
from octavo.kernels.spec import Case

from . import calls, mlp_checks
from .attention_checks import same_bits

OPS = ("gated_activation", "ungated_activation")


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
    assert calls.gated_activation(x, "silu").tolist() == [[0.0, 500.0]]


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out(backend: str, kind: Activation, dtype: torch.dtype) -> None:
    x = torch.linspace(-5, 5, 24).view(2, 12).to(dtype)
    expected, plain, kept = (
        calls.gated_activation(x, kind),
        calls.ungated_activation(x, kind),
        x.clone(),
    )
    out = torch.full((2, 6), float("nan"), dtype=dtype)
    assert calls.gated_activation(x, kind, out=out) is out
    assert same_bits(out, expected)
    assert same_bits(x, kept)
    assert calls.ungated_activation(x, kind, out=x) is x
    assert same_bits(x, plain)


def test_large_arguments(backend: str) -> None:
    x = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    for kind in ("silu", "gelu", "gelu_tanh"):
        assert calls.gated_activation(x, kind).tolist() == [[0.0, 200.0]]


def test_rows_may_lie_apart(backend: str) -> None:
    wide = torch.linspace(-4, 4, 2 * 50).view(2, 50)
    x, out = wide[:, :42], torch.full((2, 22), 7.0)
    calls.gated_activation(x, "silu", out=out[:, :21])
    assert same_bits(out[:, :21], calls.gated_activation(x.contiguous(), "silu"))
    assert bool((out[:, 21:] == 7).all())


def test_addresses_beyond_31_bits(backend: str) -> None:
    mlp_checks.rows_beyond_31_bits()


@pytest.mark.parametrize("backend", [b for b in available_backends(*OPS) if b == "triton"], indirect=True)
def test_what_kernels_cannot_compute_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch.float64; the triton backend takes float32"):
        calls.gated_activation(torch.ones(1, 4, dtype=torch.float64), "silu")
    with pytest.raises(ValueError, match=r"x has strides \(1, 4\); the last one must be 1"):
        calls.ungated_activation(torch.ones(2, 4).t(), "silu")
