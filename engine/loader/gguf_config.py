"""This module holds what a GGUF file's metadata says of its model and tokenizer. It does not know bytes.

llama is the one architecture; every field that changes the arithmetic is honoured or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..config import DTypeName, GenerationConfig, ModelConfig, RopeConfig
from ..errors import CheckpointError
from .fields import Fields
from .store import Entry, TensorStore

__all__ = ["ROPE_FACTORS", "parse_gguf_configs", "tokenizer_metadata"]

ROPE_FACTORS = "rope_freqs.weight"
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "split.count": (0, 1),
    "llama.expert_count": (0,),
    "llama.attention.sliding_window": (0,),
    "llama.attention.logit_softcapping": (),
    "llama.final_logit_softcapping": (),
    "llama.logit_scale": (),
    "llama.attention.scale": (),
    "llama.embedding_scale": (),
    "llama.residual_scale": (),
    "llama.use_parallel_residual": (False,),
    "llama.attention.causal": (True,),
}


def parse_gguf_configs(metadata: Mapping[str, Any], store: TensorStore) -> tuple[ModelConfig, GenerationConfig]:
    """Turn a GGUF file's metadata into the shape of a decoder and its sampling defaults.

    Args:
        metadata: key to value, as the file has them.
        store: the file's tensors: their names tell of biases and tied embeddings, `rope_freqs` of Llama 3's rule.

    Raises:
        CheckpointError: names the key, its value and what is supported.
    """
    fields = Fields(metadata, store.name)
    if fields.get("general.architecture") != "llama":
        raise fields.error("general.architecture", "llama")
    for key, allowed in _NEUTRAL.items():
        if fields.get(key) is not None and fields.get(key) not in allowed:
            raise fields.error(key, f"{' or '.join(map(str, allowed)) or 'absent'}: nothing else is supported")
    # Per-layer lists of one repeated number are how some converters write a plain number.
    values = dict(metadata)
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        value = values.get(f"llama.{key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            values[f"llama.{key}"] = value[0]
    model = _model(Fields(values, store.name), store)
    return model, _generation(fields, model.vocab_size)


def tokenizer_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a GGUF file's metadata that describes its tokenizer, under the file's own keys."""
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}


def _model(fields: Fields, store: TensorStore) -> ModelConfig:
    entries = store.entries
    hidden, num_heads = fields.hidden_size("llama.embedding_length"), fields.heads("llama.attention.head_count")
    num_kv_heads = fields.heads("llama.attention.head_count_kv", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("llama.attention.head_count_kv", f"a divisor of the {num_heads} query heads")
    head_dim = fields.integer("llama.attention.key_length", 2, 1024, default=hidden // num_heads)
    if fields.get("llama.attention.key_length") is None and hidden % num_heads:
        raise fields.error("llama.embedding_length", f"a multiple of the {num_heads} query heads")
    if not 2 <= head_dim <= 1024 or head_dim % 2:
        raise fields.error("llama.attention.key_length", f"an even number from 2 to 1024 (it comes to {head_dim})")
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.get(key) is not None and fields.get(key) != head_dim:
            raise fields.error(key, f"head_dim, {head_dim}")
    max_position = fields.positions("llama.context_length", default=None)
    embedding = entries.get("token_embd.weight")
    tokens = fields.get("tokenizer.ggml.tokens")
    if embedding is None:
        raise CheckpointError(store.name, "is missing", "token_embd.weight")
    vocab_size = fields.integer("llama.vocab_size", 1, 1 << 24, default=min(embedding.shape[0], 1 << 24))
    if isinstance(tokens, list) and len(tokens) > vocab_size:
        raise CheckpointError(store.name, f"its tokenizer has {len(tokens)} tokens, its logits {vocab_size}")
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=fields.intermediate_size("llama.feed_forward_length"),
        num_layers=fields.layers("llama.block_count"),
        num_q_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon", 0.0, 1.0, open_low=True),
        rope=_rope(fields, head_dim, max_position, store),
        qkv_bias="blk.0.attn_q.bias" in entries,
        o_bias="blk.0.attn_output.bias" in entries,
        mlp_bias="blk.0.ffn_down.bias" in entries,
        tie_embeddings="output.weight" not in entries,
        dtype=_dtype(entries),
    )


def _rope(fields: Fields, head_dim: int, max_position: int, store: TensorStore) -> RopeConfig:
    theta = fields.number("llama.rope.freq_base", 1.0, 1e12, default=10000.0, open_low=True)
    plain = RopeConfig(theta=theta, rotary_dim=head_dim)
    key = "llama.rope.scaling."
    kind = fields.choice(f"{key}type", ("none", "linear", "yarn"), default="none")
    factors = store.entries.get(ROPE_FACTORS)
    if factors is not None:
        if kind != "none" or factors.shape != (head_dim // 2,) or factors.dtype != "F32":
            raise CheckpointError(
                store.name, f"goes with no scaling of type {kind} and head_dim {head_dim}", factors.name
            )
        buffer = torch.empty(factors.num_bytes, dtype=torch.uint8)
        return _llama3_rope(plain, store.read_rows(factors, 0, head_dim // 2, buffer).double(), store.name)
    if kind == "none":
        return plain
    factor = fields.number(f"{key}factor", 1.0, 1e6)
    if kind == "linear":
        return replace(plain, scaling="linear", factor=factor)
    return replace(
        plain,
        scaling="yarn",
        factor=factor,
        original_max_position=fields.positions(f"{key}original_context_length", default=max_position),
        beta_fast=fields.number(f"{key}yarn_beta_fast", 0.0, 1e6, default=32.0, open_low=True),
        beta_slow=fields.number(f"{key}yarn_beta_slow", 0.0, 1e6, default=1.0, open_low=True),
        attention_factor=_gguf_attention_factor(fields, f"{key}attn_factor", factor),
    )


def _gguf_attention_factor(fields: Fields, key: str, factor: float) -> float | None:
    """GGUF's factor multiplies yarn's usual one, where config.json's replaces it."""
    if fields.get(key) is None:
        return None
    return fields.number(key, 0.0, 1e3, open_low=True) * (0.1 * math.log(factor) + 1.0)


def _llama3_rope(plain: RopeConfig, factors: torch.Tensor, file: str) -> RopeConfig:
    """Find the parameters of Llama 3.1's rule that gave these per-frequency divisors, or refuse.

    GGUF keeps the rule's result and not its parameters. Every published model has factors 1 and 4 and was trained on
    8,192 positions; the largest divisor is `factor`. The guess is accepted only if it gives the very same divisors.
    """
    factor = float(factors.max())
    if math.isfinite(factor) and 1.0 <= factor <= 1e6:
        rope = replace(
            plain,
            scaling="llama3",
            factor=factor,
            original_max_position=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        )
        exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float64) / rope.rotary_dim
        turns = rope.original_max_position / (2 * math.pi) * rope.theta**-exponents
        smooth = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
        expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if torch.allclose(factors, expected, rtol=1e-4, atol=0.0):
            return rope
    raise CheckpointError(file, "does not come from Llama 3.1's rule, the only one supported", ROPE_FACTORS)


def _dtype(entries: Mapping[str, Entry]) -> DTypeName:
    """The type that holds most bytes; quantised weights are computed in bfloat16, whose range never overflows."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_bytes
    names: Mapping[str, DTypeName] = {"F64": "float32", "F32": "float32", "F16": "float16"}
    return names.get(max(sizes, key=lambda kind: (sizes[kind], kind)), "bfloat16")


def _generation(fields: Fields, vocab_size: int) -> GenerationConfig:
    def token(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        return None if fields.get(key) is None else fields.integer(key, 0, vocab_size - 1)

    # Chat models end a turn with eot (or eom, before a tool call) and a document with eos.
    ends = [found for name in ("eos", "eot", "eom") if (found := token(name)) is not None]
    return GenerationConfig(eos_token_ids=tuple(dict.fromkeys(ends)), bos_token_id=token("bos"))
