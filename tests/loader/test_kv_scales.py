"""This module holds the scales of keys and values that a checkpoint brings. It does not know what is done with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine.errors import CheckpointError
from octavo.engine.loader import resolve_model

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]
AT = "model.layers.{}.self_attn."
KV_ONLY: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "config_groups": {},
    "format": "dense",
    "ignore": [],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
}


def scales(spelling: str = "{}_scale", shape: tuple[int, ...] = (1,), dtype: str = "float32") -> Tensors:
    """Return 0.25, 0.5, 0.75, 1 for k and v of two layers."""
    return {
        (AT + spelling).format(layer, *[kind] * spelling.count("{}")): np.full(shape, (2 * layer + i + 1) / 4, dtype)
        for layer in range(2)
        for i, kind in enumerate("kv")
    }


@pytest.mark.parametrize("spelling", ["{}_scale", "{}_proj.{}_scale"])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scales_are_found(
    spelling: str, shape: tuple[int, ...], dtype: str, write_folder: Write, tensors: Tensors, load: Any
) -> None:
    found = resolve_model(str(write_folder(tensors | scales(spelling, shape, dtype))))
    assert found.kv_scales == [(0.25, 0.5), (0.75, 1.0)]
    assert set(load(found)) == set(found.shapes)


def test_there_need_be_none(write_folder: Write, tensors: Tensors) -> None:
    assert resolve_model(str(write_folder(tensors))).kv_scales is None
    assert resolve_model(str(write_folder(tensors | scales())), load_format="dummy").kv_scales is None


K0, V1 = AT.format(0) + "k_scale", AT.format(1) + "v_scale"
FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "one is missing": (
        lambda t: {name: each for name, each in t.items() if name != V1},
        "the v_scale of layer 1 is missing",
    ),
    "a layer too many": (
        lambda t: t | {K0.replace("0", "2"): t[K0]},
        "the k_scale of layer 2 is there, and there are 2 layers",
    ),
    "in both spellings": (lambda t: t | {K0.replace("k_scale", "k_proj.k_scale"): t[K0]}, "is there twice, also as"),
    "one for each head": (lambda t: t | {K0: np.ones(2, np.float32)}, r"has shape [2]; one number is supported"),
    "zero": (lambda t: t | {K0: np.zeros(1, np.float32)}, "is 0; a scale is a number above 0"),
    "negative": (lambda t: t | {K0: -np.ones(1, np.float32)}, "is -1; a scale is"),
    "NaN": (lambda t: t | {K0: np.full(1, np.nan, np.float32)}, "is nan; a scale is"),
    "infinite": (lambda t: t | {K0: np.full(1, np.inf, np.float32)}, "is inf; a scale is"),
    "an integer": (lambda t: t | {K0: np.ones(1, np.int32)}, "has dtype I32"),
    "of k in v": (lambda t: t | {K0.replace("k_scale", "v_proj.k_scale"): t[K0]}, "not a tensor of this model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_scales_are_refused(fault: str, write_folder: Write, tensors: Tensors) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(CheckpointError) as caught:
        resolve_model(str(write_folder(tensors | change(scales()))))
    assert message in str(caught.value)


def test_a_config_may_say_so(write_folder: Write, tensors: Tensors, llama_config: dict[str, Any]) -> None:
    folder = write_folder(tensors | scales(), config=llama_config | {"quantization_config": KV_ONLY})
    assert resolve_model(str(folder)).kv_scales is not None


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "fp8"},
        {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"transform_config": {"config_groups": {"u": {}}}},
        {"kv_cache_scheme": None},
        *({"kv_cache_scheme": KV_ONLY["kv_cache_scheme"] | each} for each in (
            {"num_bits": 4}, {"type": "int"}, {"strategy": "attn_head"}, {"dynamic": True}, {"symmetric": False}
        )),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_says_more_is_refused(
    change: dict[str, Any], write_folder: Write, tensors: Tensors, llama_config: dict[str, Any]
) -> None:
    folder = write_folder(tensors, config=llama_config | {"quantization_config": KV_ONLY | change})
    with pytest.raises(CheckpointError, match=r"quantization_config is .*; supported: absent, or compressed-tensors"):
        resolve_model(str(folder))


def test_a_scale_is_read_as_it_is(write_folder: Write, tensors: Tensors) -> None:
    """Not rounded to anything: it is kept as a number."""
    exact = float(np.float32(0.1))
    found = resolve_model(str(write_folder(tensors | scales() | {K0: np.float32([0.1])}))).kv_scales
    assert found is not None
    assert found[0][0] == exact == float(torch.tensor(0.1))
