"""Builders of small checkpoints, good ones and ones with a chosen fault."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


@pytest.fixture
def llama_config() -> dict[str, Any]:
    """The config.json of a llama of 48 tokens and two layers."""
    return json.loads(json.dumps(LLAMA))


def llama_tensors(prefix: str = "model.") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    hidden, inner, kv, vocab = 32, 40, 16, 48
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (vocab, hidden),
        f"{prefix}norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(2):
        at = f"{prefix}layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (kv, hidden),
            f"{at}self_attn.v_proj.weight": (kv, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}post_attention_layernorm.weight": (hidden,),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
        }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """The float32 tensors that belong to `llama_config`, by their Hugging Face names."""
    return llama_tensors()


def safetensors_bytes(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def table(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    names = {"float32": "F32", "float16": "F16", "float64": "F64", "int32": "I32", "uint8": "U8", "bool": "BOOL"}
    header, data = dict[str, Any](), b""
    for name, array in tensors.items():
        raw = array.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    return header, data


Change = Callable[[dict[str, Any], bytes], tuple[Mapping[str, Any] | bytes, bytes]]
Write = Callable[..., Path]


@pytest.fixture
def write_folder(tmp_path: Path, llama_config: dict[str, Any]) -> Write:
    """Return `write(tensors, change=None, config=None)`: a folder with config.json and model.safetensors."""

    def write(
        tensors: Mapping[str, np.ndarray], change: Change | None = None, config: Mapping[str, Any] | None = None
    ) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(llama_config if config is None else config))
        header, data = table(tensors)
        changed = (header, data) if change is None else change(header, data)
        (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(*changed))
        return tmp_path

    return write


@pytest.fixture
def write_shards(tmp_path: Path, llama_config: dict[str, Any]) -> Write:
    """Return `write(shards, weight_map=None)`: a folder with config.json, shards and their index."""

    def write(
        shards: Mapping[str, Mapping[str, np.ndarray]], weight_map: Mapping[str, Any] | bytes | None = None
    ) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(llama_config))
        for file, tensors in shards.items():
            (tmp_path / file).write_bytes(safetensors_bytes(*table(tensors)))
        if weight_map is None:
            weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        raw = weight_map if isinstance(weight_map, bytes) else json.dumps({"weight_map": weight_map}).encode()
        (tmp_path / "model.safetensors.index.json").write_bytes(raw)
        return tmp_path

    return write


@pytest.fixture
def load() -> Callable[..., dict[str, torch.Tensor]]:
    """Return `load(checkpoint, dtype=float32)`: all its parameters, from memory that was NaN before."""

    def run(checkpoint: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        params: dict[str, torch.Tensor] = {}
        checkpoint.load_weights(lambda name, shape: torch.full(shape, float("nan"), dtype=dtype), params.__setitem__)
        return params

    return run
