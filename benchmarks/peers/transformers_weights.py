"""This module builds transformers' model with the very weights our engine has. It does not know how either runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from octavo.engine.config import ModelConfig
from torch import Tensor

from .layouts import Unsuitable

__all__ = ["build", "hf_config"]

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def hf_config(c: ModelConfig) -> Any:
    """Return transformers' config of a decoder.

    Raises:
        Unsuitable: it is of a family whose tensors have no names here.
    """
    import transformers

    if c.family not in CLASSES or c.rope is None or any(window is not None for window in c.windows):
        raise Unsuitable(f"{c.family}, or its windows, are not set up here for transformers")
    rope: dict[str, Any] = {"rope_type": "default" if c.rope.scaling == "none" else c.rope.scaling}
    rope["rope_theta"] = c.rope.theta
    if c.rope.scaling == "llama3":
        rope |= {
            "factor": c.rope.factor,
            "low_freq_factor": c.rope.low_freq_factor,
            "high_freq_factor": c.rope.high_freq_factor,
            "original_max_position_embeddings": c.rope.original_max_position,
        }
    elif c.rope.scaling != "none":
        raise Unsuitable(f"rotations of kind {c.rope.scaling} are not set up here for transformers")
    return getattr(transformers, f"{CLASSES[c.family]}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_q_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position,
        rms_norm_eps=c.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=c.tie_embeddings,
    )


def tensors(c: ModelConfig, ours: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield transformers' names with rows of our fused tensors."""
    yield "model.embed_tokens.weight", ours["embedding.weight"]
    yield "model.norm.weight", ours["final_norm.weight"]
    if "lm_head.weight" in ours:
        yield "lm_head.weight", ours["lm_head.weight"]
    q, k = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for layer in range(c.num_layers):
        own, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{own}qkv.{kind}" in ours:
                for name, rows in zip("qkv", ours[f"{own}qkv.{kind}"].split((q, k, k)), strict=True):
                    yield f"{theirs}self_attn.{name}_proj.{kind}", rows
            if f"{own}o.{kind}" in ours:
                yield f"{theirs}self_attn.o_proj.{kind}", ours[f"{own}o.{kind}"]
            if f"{own}gate_up.{kind}" in ours:
                for name, rows in zip(("gate", "up"), ours[f"{own}gate_up.{kind}"].chunk(2), strict=True):
                    yield f"{theirs}mlp.{name}_proj.{kind}", rows
            if f"{own}down.{kind}" in ours:
                yield f"{theirs}mlp.down_proj.{kind}", ours[f"{own}down.{kind}"]
        for name in ("q_norm", "k_norm"):
            if f"{own}{name}.weight" in ours:
                yield f"{theirs}self_attn.{name}.weight", ours[f"{own}{name}.weight"]
        yield f"{theirs}input_layernorm.weight", ours[f"{own}attention_norm.weight"]
        yield f"{theirs}post_attention_layernorm.weight", ours[f"{own}mlp_norm.weight"]


def build(checkpoint: Any, dtype: torch.dtype, device: str) -> Any:
    """Return transformers' model of a checkpoint.

    Args:
        checkpoint: from `resolve_model`; random weights are drawn once more, by name, and so are the same.
    """
    import transformers

    c = checkpoint.model_config
    config, ours = hf_config(c), dict[str, Tensor]()
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    checkpoint.load_weights(lambda _, shape: torch.empty(shape, dtype=dtype, device=device), ours.__setitem__)
    # Taken over, not copied: a model of 16 GB would be there a third time.
    missing, unexpected = model.load_state_dict(dict(tensors(c, ours)), strict=False, assign=True)
    assert not unexpected, f"transformers has no {unexpected}"
    assert set(missing) <= ({"lm_head.weight"} if c.tie_embeddings else set()), f"transformers also wants {missing}"
    if c.tie_embeddings:
        model.tie_weights()
    return model.eval().requires_grad_(False)
