"""Folders written by transformers load as the very weights of its modules, fused our way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from octavo.engine.config import ModelConfig
from octavo.engine.loader import Checkpoint, resolve_model

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama tied, one head size": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=16),
    "llama with biases": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(**GPT2_SIZES),
    "gpt2 untied, inner size": lambda: transformers.GPT2Config(**GPT2_SIZES, n_inner=24, tie_word_embeddings=False),
}
Load = Callable[..., dict[str, torch.Tensor]]


def save(config: Any, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Mapping[str, torch.Tensor]:
    """Write a model of random weights, biases and norms included, and return its state."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, **how)
    return model.state_dict()


def expected(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Fuse transformers' weights by hand, with the names written out."""
    gpt2 = config.family == "gpt2"
    top = {"wte": "embedding", "wpe": "position_embedding", "ln_f": "final_norm"}
    top |= {"embed_tokens": "embedding", "norm": "final_norm", "lm_head": "lm_head"}
    inner = {"ln_1": "attention_norm", "ln_2": "mlp_norm", "attn.c_attn": "qkv", "attn.c_proj": "o"}
    inner |= {"mlp.c_fc": "up", "mlp.c_proj": "down"}
    inner |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm", "mlp.down_proj": "down"}
    inner |= {"self_attn.o_proj": "o", "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        words = name.removeprefix("model.").removeprefix("transformer.").split(".")
        kind = words[-1]
        if words[0] in top:
            if not (words[0] == "lm_head" and config.tie_embeddings):
                found[f"{top[words[0]]}.{kind}"] = value
        elif (part := ".".join(words[2:-1])) in inner:
            transposed = gpt2 and part not in ("ln_1", "ln_2") and kind == "weight"
            found[f"layers.{words[1]}.{inner[part]}.{kind}"] = value.T if transposed else value
    for layer in range(config.num_layers if not gpt2 else 0):
        at = f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{at}self_attn.q_proj.{kind}" in state:
                parts = [state[f"{at}self_attn.{one}_proj.{kind}"] for one in "qkv"]
                found[f"layers.{layer}.qkv.{kind}"] = torch.cat(parts)
            if f"{at}mlp.gate_proj.{kind}" in state:
                parts = [state[f"{at}mlp.{one}_proj.{kind}"] for one in ("gate", "up")]
                found[f"layers.{layer}.gate_up.{kind}"] = torch.cat(parts)
    return found


def assert_same(params: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert sorted(params) == sorted(wanted)
    for name, tensor in params.items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_weight_of_a_family_is_transformers_own(kind: str, tmp_path: Path, load: Load) -> None:
    state = save(FAMILIES[kind](), tmp_path)
    checkpoint = resolve_model(str(tmp_path))
    params = load(checkpoint)
    assert_same(params, expected(state, checkpoint.model_config))
    assert checkpoint.num_bytes(torch.float32) == sum(tensor.nbytes for tensor in params.values())
    assert checkpoint.generation_config.eos_token_ids == (2,)
    assert checkpoint.generation_config.bos_token_id == 1


def test_configs_of_the_families(tmp_path: Path) -> None:
    configs: dict[str, ModelConfig] = {}
    for kind, make in FAMILIES.items():
        folder = tmp_path / kind
        config = make()
        config.architectures = [type(transformers.AutoModelForCausalLM.from_config(config)).__name__]
        config.save_pretrained(folder)
        configs[kind] = resolve_model(str(folder), load_format="dummy").model_config
    assert configs["llama"] == ModelConfig(
        family="llama",
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_layers=3,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=64,
        rope=configs["llama"].rope,
    )
    assert configs["llama"].rope is not None
    assert (configs["llama"].rope.theta, configs["llama"].rope.rotary_dim) == (10000.0, 8)
    assert configs["llama tied, one head size"].tie_embeddings
    assert configs["llama tied, one head size"].head_dim == 16
    biased = configs["llama with biases"]
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    assert configs["mistral"].windows == (8, 8, 8)
    assert (configs["qwen2"].qkv_bias, configs["qwen2"].o_bias, configs["qwen2"].qk_norm) == (True, False, False)
    assert (configs["qwen3"].qkv_bias, configs["qwen3"].qk_norm, configs["qwen3"].head_dim) == (False, True, 16)
    gpt2 = configs["gpt2"]
    assert (gpt2.norm, gpt2.norm_eps, gpt2.activation, gpt2.gated_mlp) == ("layer", 1e-5, "gelu_tanh", False)
    assert (gpt2.rope, gpt2.intermediate_size, gpt2.max_position, gpt2.tie_embeddings) == (None, 128, 16, True)
    assert configs["gpt2 untied, inner size"].intermediate_size == 24


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_dtypes_are_converted_as_torch_converts_them(stored: torch.dtype, tmp_path: Path, load: Load) -> None:
    state = save(transformers.LlamaConfig(**SIZES), tmp_path, stored)
    checkpoint = resolve_model(str(tmp_path))
    assert checkpoint.model_config.dtype == str(stored).removeprefix("torch.")
    for wanted in (torch.float32, torch.bfloat16, torch.float16):
        converted = {name: value.to(wanted) for name, value in expected(state, checkpoint.model_config).items()}
        assert_same(load(checkpoint, wanted), converted)


def test_shards_load_as_one(tmp_path: Path, load: Load) -> None:
    state = save(transformers.LlamaConfig(**SIZES), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = resolve_model(str(tmp_path))
    assert_same(load(checkpoint), expected(state, checkpoint.model_config))


def test_large_tensors_are_read_in_several_chunks(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.engine.loader.checkpoint.CHUNK_BYTES", 7 * 32 * 4)
    for kind in ("llama with biases", "gpt2"):
        state = save(FAMILIES[kind](), tmp_path / kind)
        checkpoint = resolve_model(str(tmp_path / kind))
        assert_same(load(checkpoint), expected(state, checkpoint.model_config))


def test_parameters_complete_in_the_order_of_the_forward_pass_and_progress_reaches_the_end(tmp_path: Path) -> None:
    save(transformers.LlamaConfig(**SIZES), tmp_path)
    checkpoint: Checkpoint = resolve_model(str(tmp_path))
    events: list[str] = []
    progress: list[tuple[int, int]] = []

    def allocate(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        events.append(f"allocate {name}")
        return torch.empty(shape)

    checkpoint.load_weights(
        allocate, lambda name, _: events.append(f"loaded {name}"), lambda done, total: progress.append((done, total))
    )
    assert events == [f"{verb} {name}" for name in checkpoint.shapes for verb in ("allocate", "loaded")]
    layers = [int(event.split(".")[1]) for event in events if "layers." in event]
    assert layers == sorted(layers)
    assert events[1] == "loaded embedding.weight"
    assert events[-1] == "loaded lm_head.weight"
    dones = [done for done, _ in progress]
    assert dones == sorted(dones)
    assert progress[-1] == (checkpoint.num_bytes(torch.float32),) * 2


def test_harmless_leftovers_are_ignored_and_prefixes_optional(tmp_path: Path, load: Load) -> None:
    from safetensors.torch import load_file, save_file

    state = save(FAMILIES["gpt2"](), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool), "h.1.attn.masked_bias": torch.ones(())}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, file)
    checkpoint = resolve_model(str(tmp_path))
    assert_same(load(checkpoint), expected(state, checkpoint.model_config))


def test_generation_config_goes_before_config(tmp_path: Path) -> None:
    save(transformers.LlamaConfig(**SIZES), tmp_path)
    own = {"eos_token_id": [5, 2, 5], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    config = resolve_model(str(tmp_path)).generation_config
    assert (config.eos_token_ids, config.bos_token_id) == ((5, 2), 1)
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (0.6, 0.9, 20, None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "top_k": 0}))
    config = resolve_model(str(tmp_path)).generation_config
    assert (config.eos_token_ids, config.temperature, config.top_k) == ((2,), 0.0, None)


def test_fingerprints_tell_weights_and_configs_apart(tmp_path: Path) -> None:
    def print_of(name: str) -> str:
        return resolve_model(str(tmp_path / name)).fingerprint

    save(transformers.LlamaConfig(**SIZES), tmp_path / "a")
    save(transformers.LlamaConfig(**SIZES), tmp_path / "b")
    assert print_of("a") == print_of("b")
    file = tmp_path / "b" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    save(transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-4), tmp_path / "c")
    assert len({print_of("a"), print_of("b"), print_of("c")}) == 3
