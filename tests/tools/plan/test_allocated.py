"""This module holds plans against what engines allocate, to the byte. It does not know how a plan is worked out."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine import hardware
from octavo.engine.config import EngineConfig
from octavo.engine.footprint import MAX_DECODE_QUERY_LEN, SPLIT_TOKENS, split_bytes, step_memory
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import ModelOutput
from octavo.engine.tools.gpus import Gpu
from octavo.engine.tools.plan import make_plan, read_model
from octavo.kernels import attention, dispatch, interpreted, use_backend
from octavo.kernels.attention import reference
from triton.runtime.interpreter import GridExecutor

from .live_tensors import LiveTensors

# All sizes are multiples of 64 and of 48, the tiles in which oneDNN packs weights: it pads others.
_ROTARY: dict[str, Any] = {
    "vocab_size": 1920,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT2 = {"vocab_size": 1920, "n_embd": 192, "n_layer": 2, "n_head": 4, "n_positions": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _ROTARY | {"architectures": ["LlamaForCausalLM"]},
    "llama, tied and biased": _ROTARY
    | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama, tied, a small head": _ROTARY
    | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 192},
    "mistral": _ROTARY | {"architectures": ["MistralForCausalLM"], "sliding_window": 24},
    "qwen2": _ROTARY | {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": _ROTARY | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 96, "tie_word_embeddings": True},
    "gpt2": _GPT2 | {"architectures": ["GPT2LMHeadModel"]},
    "gpt2, untied": _GPT2 | {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": False, "n_inner": 384},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {},
    "transposed": {"max_num_seqs": 1},
    "bfloat16": {"dtype": "bfloat16", "block_size": 16},
    "a pool of its own": {"kv_cache_tokens": 1000, "block_size": 24, "max_num_seqs": 3},
    "int8 keys and values": {"kv_cache_dtype": "int8", "block_size": 24},
    "fp8 keys and values": {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
}
AVAILABLE_BYTES = 48 << 20


@pytest.fixture(autouse=True)
def _steady_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: AVAILABLE_BYTES)


def planned(model: str, settings: dict[str, Any]) -> Any:
    config = EngineConfig.from_settings({"model": model} | settings)
    flops = dict.fromkeys(("float32", "bfloat16"), 1e11)
    cpu = Gpu("cpu", "this CPU", "cpu", hardware.available_memory_bytes(), 1e10, flops, 2, "made up")
    return make_plan(config, read_model(model), cpu)


def weight_bytes(decoder: Any) -> int:
    """Return the bytes of every tensor that a decoder refers to, packed ones as oneDNN counts them."""
    tensors: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    todo = [decoder]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            tensors[id(one)] = one
        elif isinstance(one, list | tuple | dict) or type(one).__module__.startswith("octavo.engine"):
            todo += gc.get_referents(one)
    packed = [one for one in tensors.values() if one.layout != torch.strided]
    return storage_bytes(one for one in tensors.values() if one.layout == torch.strided) + sum(
        torch.ops.mkldnn._nbytes(one) for one in packed
    )


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages behind tensors, each counted once."""
    storages = [one.untyped_storage() for one in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def check(plan: Any, llm: LLM) -> None:
    resolved, runner = llm.engine.resolved, llm.engine.core.runner
    assert plan.resolved == resolved
    parts = {part.name: part.num_bytes for part in plan.parts}
    pool = storage_bytes(one for layer in runner.cache for one in layer.tensors)
    assert pool == parts["KV pool"] == resolved.kv_cache_bytes
    weights = sum(num_bytes for name, num_bytes in parts.items() if name.startswith("weights"))
    assert weight_bytes(runner.model) == weights + parts.get("rotations", 0)
    assert weights == resolved.weight_bytes


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_model_of_every_family(name: str, settings: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    llm = LLM(str(tmp_path), device="cpu", load_format="dummy", **SETTINGS[settings])
    check(planned(str(tmp_path), SETTINGS[settings]), llm)


def test_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 2 << 30)
    plan = planned("smollm2-135m", {})
    check(plan, LLM("smollm2-135m", device="cpu"))
    assert ("weights: head, packed", 4 * 49_152 * 576) in [(part.name, part.num_bytes) for part in plan.parts]


def test_what_decode_attention_keeps_is_counted_as_it_is_made() -> None:
    assert (SPLIT_TOKENS, MAX_DECODE_QUERY_LEN) == (attention.SPLIT_TOKENS, reference.MAX_DECODE_QUERY_LEN)


@pytest.mark.parametrize(
    ("place", "sizes"),
    {
        "attention": {"num_attention_heads": 12, "head_dim": 64},
        "mlp": {"intermediate_size": 640},
        "head": {"vocab_size": 8192},
    }.items(),
)
def test_a_step_of_the_kernels_holds_what_is_said(
    place: str, sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the three peaks, with a model in which it is the greatest; no kernel need run for that."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama"] | sizes))
    if interpreted():
        monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    # But for this one: tables are looked up with what it makes.
    monkeypatch.setitem(dispatch.OPS["expand_rows"], "triton", dispatch.OPS["expand_rows"]["torch"])
    found: list[tuple[int, int, int, int]] = []
    with use_backend("torch"):  # an engine chooses the backend of its process
        llm = LLM(
            str(tmp_path), device="cpu" if interpreted() else "cuda", backend="triton", load_format="dummy",
            dtype="float32", block_size=16, max_num_seqs=4, kv_cache_tokens=1024, max_num_batched_tokens=96,
            prefix_caching=False,
        )  # fmt: skip
        runner = llm.engine.core.runner
        execute = runner.execute

        def watched(step: Any) -> Any:
            with LiveTensors() as live:
                output = execute(step).wait()
            kv_tokens = int((step.num_computed_tokens + step.num_scheduled_tokens).sum())
            found.append((step.num_tokens, len(step.rows), kv_tokens, live.peak))
            return ModelOutput(np.zeros(len(output.token_ids), dtype=np.int32))

        runner.execute = watched  # type: ignore[method-assign]
        # A penalty makes sampling copy the logits; ten tokens run as decode does, and make it keep ten rows of each.
        params = SamplingParams(max_tokens=1, temperature=0.8, presence_penalty=0.1)
        for lengths in ([1] * 4, [40, 40, 10]):
            llm.generate([[7] * length for length in lengths], params)
        llm.generate([[6] * 96], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert [num_tokens for num_tokens, *_ in found] == [4, 90, 96]
    for num_tokens, num_seqs, kv_tokens, peak in found:
        step = step_memory(llm.engine.model_config, "float32", num_tokens=num_tokens, num_seqs=num_seqs)
        splits = split_bytes(llm.engine.model_config, num_seqs=num_seqs, kv_tokens=kv_tokens)
        assert getattr(step, place) == step.peak or num_tokens == 4
        assert peak <= step.peak + splits
        if num_tokens == 96 or (num_tokens, place) == (4, "head"):
            # Ids, positions and slots come from numpy, which is not watched.
            assert peak == pytest.approx(step.peak - 24 * num_tokens, rel=0.03)
