"""This module holds the shapes of real models, to be run with random weights where no checkpoint can be brought. It
does not know an engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

__all__ = ["MODELS", "find", "write"]

_LLAMA: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
_QWEN3: Final = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "max_position_embeddings": 40_960,
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}
MODELS: Final[dict[str, dict[str, Any]]] = {
    "llama-3.1-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny": _LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "vocab_size": 320,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
}
"""config.json by name; "tiny" is for machines without a GPU."""


def write(folder: Path, name: str) -> Path:
    """Write a model's config.json, all that random weights need; return its folder."""
    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    (own / "config.json").write_text(json.dumps(MODELS[name]), encoding="utf-8")
    return own


def find(folder: Path, name: str) -> tuple[str, dict[str, Any]]:
    """Return what an engine takes for a model, and the settings that go with it: random weights where it is a shape."""
    if name in MODELS:
        return str(write(folder, name)), {"load_format": "dummy"}
    return name, {}
