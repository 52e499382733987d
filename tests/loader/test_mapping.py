"""The decoder's parameters add up to the published size of real models, and sources fill each of them exactly once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.engine.errors import CheckpointError
from octavo.engine.footprint import weight_shapes
from octavo.engine.loader import resolve_model
from octavo.engine.loader.mapping import gguf_sources, hf_sources, match

# The fields of published config.json files that matter here, and the models' parameter counts.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "SmolLM2-135M": (
        134_515_008,
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
        | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000}
        | {"max_position_embeddings": 8192, "tie_word_embeddings": True, "rope_interleaved": False},
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
        | {"max_position_embeddings": 131072, "tie_word_embeddings": True, "eos_token_id": [128001, 128008, 128009]}
        | {"rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}},
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {"architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096}
        | {"max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
        | {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "use_mrope": False}
        | {"max_position_embeddings": 32768, "tie_word_embeddings": True, "use_sliding_window": False},
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072}
        | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
        | {"max_position_embeddings": 40960, "tie_word_embeddings": True, "attention_bias": False},
    ),
    "gpt2": (
        124_439_808,
        {"architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
        | {"n_positions": 1024, "n_ctx": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str, tmp_path: Path) -> None:
    num_parameters, fields = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    checkpoint = resolve_model(str(tmp_path), load_format="dummy")
    config = checkpoint.model_config
    assert checkpoint.num_bytes(torch.bfloat16) == 2 * num_parameters
    formats = [hf_sources(config)] + ([gguf_sources(config)] if config.family == "llama" else [])
    for sources in formats:
        assert sum(math.prod(source.shape) for source in sources) == num_parameters
        assert len({source.name for source in sources}) == len(sources)
        filled = dict.fromkeys(weight_shapes(config), 0)
        for source in sources:
            rows = source.shape[1] if source.layout == "transposed" else source.shape[0]
            assert source.row == filled[source.target], source
            filled[source.target] += rows
        assert filled == {target: shape[0] for target, shape in weight_shapes(config).items()}


def test_match_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt2"][1]))
    sources = hf_sources(resolve_model(str(tmp_path), load_format="dummy").model_config)
    shapes = {f"transformer.{source.name}": source.shape for source in sources}
    harmless = {"transformer.h.3.attn.bias": (1, 1, 4, 4), "h.3.attn.masked_bias": ()}
    found = match(sources, shapes | harmless, file="f")
    assert found == {source.name: f"transformer.{source.name}" for source in sources}
    assert match(sources, shapes | {"lm_head.weight": (1,)}, file="f", ignored=("lm_head.weight",)) == found
    with pytest.raises(CheckpointError, match=r"f: tensor 'lm_head\.weight': is not a tensor"):
        match(sources, shapes | {"lm_head.weight": (1,)}, file="f")
    del shapes["transformer.wpe.weight"], shapes["transformer.h.0.ln_1.bias"]
    with pytest.raises(CheckpointError, match=r"'wpe\.weight': is missing \(2 of 148 tensors are\)"):
        match(sources, shapes, file="f")
