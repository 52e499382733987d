"""This module holds the storage of keys and values: its shapes, its bytes and its scales. It does not know a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from octavo.engine.config import ModelConfig
from octavo.engine.footprint import CacheDTypeName, kv_pool_bytes
from octavo.engine.runner.kv_cache import allocate_kv_cache, allocate_like, storage_dtype
from octavo.kernels import copy_blocks, write_kv

CONFIG = ModelConfig("llama", 100, 64, 128, 3, 4, 2, 16, 256)
CPU = torch.device("cpu")


def allocate(name: CacheDTypeName, **more: Any) -> Any:
    return allocate_kv_cache(CONFIG, num_blocks=5, block_size=8, dtype=storage_dtype(name), device=CPU, **more)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8", "fp8"])
def test_it_is_zero_and_as_large_as_said(name: CacheDTypeName) -> None:
    cache = allocate(name)
    tensors = [tensor for layer in cache for tensor in layer.tensors]
    assert len(cache) == 3
    assert all(
        each.shape == (6, 2, 8, 16) and each.dtype is storage_dtype(name) for layer in cache for each in layer[:2]
    )
    assert not any(tensor.view(torch.uint8).any() for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors) == (12 if name == "int8" else 6)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert num_bytes == kv_pool_bytes(CONFIG, name, num_blocks=5, block_size=8)
    for layer in cache:
        if name == "int8":
            assert all(scale.shape == (6, 2, 8) and scale.dtype is torch.float32 for scale in layer[2:])
        else:
            assert layer[2:] == ((1.0, 1.0) if name == "fp8" else (None, None))


def test_scales_of_e4m3_are_those_that_are_given() -> None:
    given = [(0.5, 0.25), (2.0, 3.0), (1.0, 4.0)]
    cache = allocate("fp8", scales=given)
    assert [layer[2:] for layer in cache] == given
    assert [layer[2:] for layer in allocate_like(cache, CONFIG, num_blocks=2, block_size=4)] == given


@pytest.mark.parametrize("name", ["bfloat16", "int8", "fp8"])
def test_another_of_its_kind(name: CacheDTypeName) -> None:
    cache = allocate_like(allocate(name), CONFIG, num_blocks=2, block_size=4)
    assert len(cache) == 3
    assert all(layer.k.shape == (3, 2, 4, 16) and layer.v.dtype is storage_dtype(name) for layer in cache)
    assert len(cache[0].tensors) == (4 if name == "int8" else 2)


@pytest.mark.parametrize("name", ["float32", "int8", "fp8"])
def test_a_copied_block_has_its_scales(name: CacheDTypeName) -> None:
    layer = allocate(name)[0]
    q, k, v = torch.randn((3, 4, 2, 16), generator=torch.Generator().manual_seed(0)).mul_(3.0)
    slots, positions = torch.tensor([8, 11, 9, 15]), torch.arange(4)
    write_kv(q, k, v, layer.k, layer.v, slots, positions=positions, k_scale=layer.k_scale, v_scale=layer.v_scale)
    source, target = torch.tensor([1]), torch.tensor([4])
    for pair in (layer.tensors[i : i + 2] for i in range(0, len(layer.tensors), 2)):
        copy_blocks(*pair, source, target)
    for tensor in layer.tensors:
        bits = tensor.view(torch.uint8)
        assert bits[1].any()
        assert torch.equal(bits[4], bits[1])
