"""The RoPE table, against transformers to the bit and against the formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from octavo.kernels import build_cos_sin
from octavo.kernels.rope.reference import inverse_frequencies

SCALINGS: list[dict[str, Any]] = [
    {},
    {"scaling": "linear", "factor": 4.0},
    {"scaling": "llama3", "factor": 8.0, "original_max_position": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"scaling": "yarn", "factor": 4.0, "original_max_position": 64},
    {"scaling": "yarn", "factor": 40.0, "original_max_position": 4096, "beta_fast": 16.0, "truncate": False},
    {"scaling": "yarn", "factor": 4.0, "original_max_position": 64, "attention_factor": 1.3},
]
PUBLISHED_NAMES = {"scaling": "rope_type", "original_max_position": "original_max_position_embeddings"}


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(str(v) for v in s.values()) or "none")
@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (500_000.0, 128), (1e6, 80)])
def test_equals_the_published_code(scaling: dict[str, Any], theta: float, head_dim: int) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    parameters = {PUBLISHED_NAMES.get(key, key): value for key, value in scaling.items()}
    config = llama.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=300,
        rope_parameters={"rope_type": "default", "rope_theta": theta, **parameters},
    )
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None])
    table = build_cos_sin(300, theta=theta, rotary_dim=head_dim, **scaling)
    half = head_dim // 2
    assert table.dtype == torch.float32
    assert torch.equal(table[:, :half], cos[0, :, :half])
    assert torch.equal(table[:, half:], sin[0, :, half:])


def test_equals_the_formula() -> None:
    table = build_cos_sin(50, theta=10_000.0, rotary_dim=6)
    for position in (0, 1, 7, 49):
        for i in range(3):
            angle = position * 10_000.0 ** (-2 * i / 6)
            assert float(table[position, i]) == pytest.approx(math.cos(angle), abs=1e-5)
            assert float(table[position, 3 + i]) == pytest.approx(math.sin(angle), abs=1e-5)
    assert table[0].tolist() == [1, 1, 1, 0, 0, 0]


def test_scaling_leaves_fast_pairs_alone() -> None:
    plain = inverse_frequencies(theta=10_000.0, rotary_dim=64)
    for scaling in SCALINGS[2:4]:
        scaled = inverse_frequencies(theta=10_000.0, rotary_dim=64, **scaling)
        assert scaled[0] == plain[0]
        assert scaled[-1] == pytest.approx(float(plain[-1]) / scaling["factor"], rel=1e-6)
        assert bool((scaled <= plain).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 5}, "rotary_dim is 5"),
        ({"scaling": "dynamic"}, "allowed: none, linear, llama3, yarn"),
        ({"scaling": "yarn", "factor": 2.0}, "original_max_position"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_cos_sin(4, **{"theta": 1e4, "rotary_dim": 8, **changes})
