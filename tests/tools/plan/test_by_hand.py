"""This module holds plans of published models against numbers worked out by hand. It does not know an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from octavo.engine.config import EngineConfig
from octavo.engine.footprint import kv_bytes_per_token, kv_pool_bytes, num_weights, weight_groups
from octavo.engine.tools.gpus import CUDA_CONTEXT_BYTES, find_gpu
from octavo.engine.tools.plan import make_plan, read_model

CONFIGS = Path(__file__).parent / "configs"

BY_HAND = {
    "llama-3.1-8b": {
        "embedding": 128_256 * 4096,
        # 32 query and 2 times 8 KV heads of 128; the output projection.
        "attention": 32 * (4096 * (4096 + 1024 + 1024) + 4096 * 4096),
        "mlp": 32 * 3 * 4096 * 14_336,
        "norms": (2 * 32 + 1) * 4096,
        "head": 128_256 * 4096,
    },
    "qwen3-0.6b": {
        "embedding": 151_936 * 1024,
        # 16 query heads of 128 are wider than the model.
        "attention": 28 * (1024 * (2048 + 1024 + 1024) + 2048 * 1024),
        "mlp": 28 * 3 * 1024 * 3072,
        # Every layer has one more for the heads of q and one for those of k.
        "norms": (2 * 28 + 1) * 1024 + 28 * 2 * 128,
        "head": 0,
    },
    "smollm2-135m": {
        "embedding": 49_152 * 576,
        "attention": 30 * (576 * (576 + 192 + 192) + 576 * 576),
        "mlp": 30 * 3 * 576 * 1536,
        "norms": (2 * 30 + 1) * 576,
        "head": 0,
    },
}
TOTALS = {"llama-3.1-8b": 8_030_261_248, "qwen3-0.6b": 596_049_920, "smollm2-135m": 134_515_008}
KV_BYTES = {  # keys and values, layers, KV heads, head_dim, bytes of bfloat16
    "llama-3.1-8b": 2 * 32 * 8 * 128 * 2,
    "qwen3-0.6b": 2 * 28 * 8 * 128 * 2,
    "smollm2-135m": 2 * 30 * 3 * 64 * 2,
}


@pytest.mark.parametrize("name", TOTALS)
def test_weights_and_keys_and_values(name: str) -> None:
    model = read_model(str(CONFIGS / f"{name}.json"))
    assert weight_groups(model) == BY_HAND[name]
    assert num_weights(model) == sum(BY_HAND[name].values()) == TOTALS[name]
    assert kv_bytes_per_token(model, "bfloat16") == KV_BYTES[name]
    assert kv_bytes_per_token(model, "float32") == 2 * KV_BYTES[name]
    assert kv_bytes_per_token(model, "fp8") == KV_BYTES[name] // 2
    # With int8 goes a float32 scale for each head of k and of v.
    assert kv_bytes_per_token(model, "int8") == KV_BYTES[name] // 2 + 2 * model.num_layers * model.num_kv_heads * 4
    assert kv_pool_bytes(model, "bfloat16", num_blocks=10, block_size=16) == 11 * 16 * KV_BYTES[name]


def test_a_plan_of_llama_on_an_h100() -> None:
    """All but the pool by hand; the pool is nine tenths of what is left, in whole blocks, the null block among them."""
    plan = make_plan(EngineConfig(), read_model(str(CONFIGS / "llama-3.1-8b.json")), find_gpu("h100"))
    found = {part.name: part.num_bytes for part in plan.parts}
    for group, num in BY_HAND["llama-3.1-8b"].items():
        assert found[f"weights: {group}"] == 2 * num
    # The rows to sample, their logits in bfloat16 and in float32, and the states of a step of 2,048 tokens.
    assert found["a step's tensors"] == 2048 * (24 + 4096 * 2) + 256 * (4096 * 2 + 128_256 * 6)
    assert found["rotations"] == 131_072 * 128 * 4
    block, split = 64 * 131_072, 16 * 32 * 130 * 4
    left = 81_559 * 2**20 - CUDA_CONTEXT_BYTES - 2 * TOTALS["llama-3.1-8b"] - found["a step's tensors"]
    # Graphs: what a step of 256 tokens holds in the MLP, gate and up beside what becomes of them.
    assert found["CUDA graphs"] == 256 * 2**20 + 256 * (24 + 2 * (2 * 4096 + 14_336 + 28_672))
    left -= found["rotations"] + 2 * 256 * split + found["CUDA graphs"]
    num_blocks = (int(left * 0.9) - block) // (block + split // 8)
    assert plan.resolved.num_blocks == num_blocks
    assert found["KV pool"] == (num_blocks + 1) * block
    assert found["splits of decode"] == 2 * 256 * split + num_blocks * split // 8
    assert sum(found.values()) == 81_559 * 2**20
    assert dict(plan.concurrency)[8192] == num_blocks // 128 == 56


@pytest.mark.parametrize("name", TOTALS)
@pytest.mark.parametrize("gpu", ["b200", "a100-40gb", "4090", "l4"])
def test_the_parts_are_the_whole(name: str, gpu: str) -> None:
    plan = make_plan(EngineConfig(), read_model(str(CONFIGS / f"{name}.json")), find_gpu(gpu))
    assert sum(part.num_bytes for part in plan.parts) == find_gpu(gpu).memory_bytes
    assert all(part.num_bytes >= 0 for part in plan.parts)
    for context, num_seqs in plan.concurrency:
        blocks = -(-context // 64)
        assert num_seqs * blocks <= plan.resolved.num_blocks
        assert num_seqs == 256 or (num_seqs + 1) * blocks > plan.resolved.num_blocks
