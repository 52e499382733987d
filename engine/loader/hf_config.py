"""This module holds the reading of Hugging Face's config.json and generation_config.json. It does not know tensors.

Every field that changes the arithmetic is honoured or refused by name; `null` means that a field is not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..config import DTypeName, GenerationConfig, ModelConfig, RopeConfig
from .fields import MAX_POSITION, Fields
from .files import child, read_json

__all__ = ["ARCHITECTURES", "parse_generation_config", "parse_model_config", "read_configs", "read_model_config"]

ARCHITECTURES: Mapping[str, Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
}
MAX_CONFIG_BYTES = 1 << 20

# Fields that change the arithmetic where they are not neutral, and that none of our models has.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "compression_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "alibi": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "no_rope_layers": (),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
}
_ACTIVATIONS: Mapping[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ROPE_KEYS = frozenset(
    [
        "rope_theta",
        "rope_type",
        "type",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
        "mscale",
        "mscale_all_dim",
        "partial_rotary_factor",
        "finetuned",
    ]
)


_KV_SCHEME: Mapping[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "strategy": ("tensor", None),
    "dynamic": (False, None),
    "symmetric": (True, None),
}
"""Of the quantisation that is supported, which is of keys and values alone."""


def read_configs(folder: Path) -> tuple[ModelConfig, GenerationConfig]:
    """Read a folder's config.json and, where there is one, its generation_config.json.

    Raises:
        CheckpointError: a file is damaged or hostile, or asks for something not supported, which is named.
    """
    fields = Fields(read_json(child(folder, "config.json"), MAX_CONFIG_BYTES), "config.json")
    model = parse_model_config(fields)
    defaults = parse_generation_config(fields, model.vocab_size, sampling=False)
    path = child(folder, "generation_config.json")
    if not path.is_file():
        return model, defaults
    own = parse_generation_config(
        Fields(read_json(path, MAX_CONFIG_BYTES), "generation_config.json"), model.vocab_size, sampling=True
    )
    return model, replace(
        own,
        eos_token_ids=own.eos_token_ids or defaults.eos_token_ids,
        bos_token_id=defaults.bos_token_id if own.bos_token_id is None else own.bos_token_id,
    )


def read_model_config(path: Path) -> ModelConfig:
    """Read one config.json by itself, under whatever name.

    Raises:
        CheckpointError: it is damaged or hostile, or asks for something not supported, which is named.
    """
    return parse_model_config(Fields(read_json(path, MAX_CONFIG_BYTES), path.name))


def parse_model_config(fields: Fields) -> ModelConfig:
    """Turn the fields of a config.json into the shape of a decoder.

    Raises:
        CheckpointError: names the field, its value and what is supported.
    """
    names = fields.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) and names[0] in ARCHITECTURES):
        raise fields.error("architectures", f"one of {', '.join(ARCHITECTURES)}")
    family = ARCHITECTURES[names[0]]
    for key, allowed in _NEUTRAL.items():
        value = fields.get(key)
        if value is not None and not any(
            value == good and (type(value) is bool) == (type(good) is bool) for good in allowed
        ):
            raise fields.error(key, f"{' or '.join(map(str, allowed)) or 'absent'}: nothing else is supported")
    _check_quantisation(fields)
    return _gpt2(fields) if family == "gpt2" else _rotary_decoder(fields, family)


def _check_quantisation(fields: Fields) -> None:
    """Refuse quantised weights; scales of keys and values are for whoever wants to use them."""
    inner = fields.nested("quantization_config")
    scheme = inner.nested("kv_cache_scheme")
    is_of_keys_and_values = (
        inner.get("quant_method") == "compressed-tensors"
        and not any(inner.get(key) for key in ("config_groups", "sparsity_config", "transform_config"))
        and all(scheme.get(key) in allowed for key, allowed in _KV_SCHEME.items())
    )
    if fields.get("quantization_config") is not None and not is_of_keys_and_values:
        allowed = "absent, or compressed-tensors of keys and values alone: 8-bit floats, a static scale for each tensor"
        raise fields.error("quantization_config", allowed)


def _rotary_decoder(fields: Fields, family: Literal["llama", "mistral", "qwen2", "qwen3"]) -> ModelConfig:
    hidden, num_heads = fields.hidden_size("hidden_size"), fields.heads("num_attention_heads")
    num_kv_heads = fields.heads("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    # Qwen3's own class has 128 where the file has nothing; the others divide.
    default_dim = 128 if family == "qwen3" else hidden // num_heads
    head_dim = fields.integer("head_dim", 2, 1024, default=default_dim)
    if fields.get("head_dim") is None and family != "qwen3" and hidden % num_heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads ({num_heads})")
    if not 2 <= head_dim <= 1024 or head_dim % 2:
        raise fields.error("head_dim", f"an even number from 2 to 1024 (it comes to {head_dim})")
    num_layers = fields.layers("num_hidden_layers")
    max_position = fields.positions("max_position_embeddings", default=None)
    attention_bias = fields.flag("attention_bias", default=family == "qwen2")
    if family in ("mistral", "qwen2") and attention_bias != (family == "qwen2"):
        raise fields.error("attention_bias", f"{family == 'qwen2'} for {family}")
    mlp_bias = fields.flag("mlp_bias", default=False)
    if mlp_bias and family != "llama":
        raise fields.error("mlp_bias", f"False for {family}")
    rope = _rope(fields, head_dim, max_position)
    if rope.scaling == "yarn":
        # Model cards tell users to add yarn and leave max_position_embeddings at the trained length.
        max_position = max(max_position, int(rope.factor * rope.original_max_position))
        if max_position > MAX_POSITION:
            raise fields.error("rope_parameters", f"a yarn factor that stretches to at most {MAX_POSITION} tokens")
    return ModelConfig(
        family=family,
        vocab_size=fields.vocab_size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.intermediate_size("intermediate_size"),
        num_layers=num_layers,
        num_q_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm="rms",
        norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6, open_low=True),
        activation=_ACTIVATIONS[fields.choice("hidden_act", tuple(_ACTIVATIONS), default="silu")],
        gated_mlp=True,
        rope=rope,
        qkv_bias=attention_bias,
        o_bias=attention_bias and family != "qwen2",
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        windows=_windows(fields, family, num_layers, max_position),
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        dtype=_dtype(fields),
    )


def _gpt2(fields: Fields) -> ModelConfig:
    hidden, num_heads = fields.hidden_size("n_embd"), fields.heads("n_head")
    if hidden % num_heads:
        raise fields.error("n_embd", f"a multiple of n_head ({num_heads})")
    inner = fields.get("n_inner")
    return ModelConfig(
        family="gpt2",
        vocab_size=fields.vocab_size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=4 * hidden if inner is None else fields.intermediate_size("n_inner"),
        num_layers=fields.layers("n_layer"),
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden // num_heads,
        max_position=fields.positions("n_positions", default=1024),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 0.0, 1.0, default=1e-5, open_low=True),
        activation=_ACTIVATIONS[fields.choice("activation_function", tuple(_ACTIVATIONS), default="gelu_new")],
        gated_mlp=False,
        rope=None,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        dtype=_dtype(fields),
    )


def _rope(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """Read both spellings: `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling`."""
    key = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    inner = fields.nested(key)
    unknown = sorted(set(inner.values) - _ROPE_KEYS)
    if unknown:
        raise fields.error(key, f"an object of {', '.join(sorted(_ROPE_KEYS))} (not {unknown[0][:80]!r})")
    theta_from = inner if inner.get("rope_theta") is not None else fields
    theta = theta_from.number("rope_theta", 1.0, 1e12, default=10000.0, open_low=True)
    for place in (fields, inner):
        if place.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
            raise place.error("partial_rotary_factor", "1.0: rotating a part of each head is not supported here")
    kinds = ("default", "linear", "llama3", "yarn")
    kind = inner.choice("rope_type" if inner.get("rope_type") is not None else "type", kinds, default="default")
    plain = RopeConfig(theta=theta, rotary_dim=head_dim)
    if kind == "default":
        return plain
    if kind == "linear":
        return replace(plain, scaling="linear", factor=inner.number("factor", 1.0, 1e6))
    # Where both places have it, the outer one counts, as it does in transformers.
    original_from = fields if fields.get("original_max_position_embeddings") is not None else inner
    original = original_from.positions("original_max_position_embeddings", default=max_position)
    if kind == "llama3":
        low = inner.number("low_freq_factor", 0.0, 1e6, open_low=True)
        return replace(
            plain,
            scaling="llama3",
            factor=inner.number("factor", 1.0, 1e6),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=inner.number("high_freq_factor", low, 1e6, open_low=True),
        )
    factor = inner.number("factor", 1.0, 1e6, default=max(1.0, max_position / original))
    return replace(
        plain,
        scaling="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=inner.number("beta_fast", 0.0, 1e6, default=32.0, open_low=True),
        beta_slow=inner.number("beta_slow", 0.0, 1e6, default=1.0, open_low=True),
        attention_factor=_yarn_attention_factor(inner, factor),
        truncate=inner.flag("truncate", default=True),
    )


def _yarn_attention_factor(inner: Fields, factor: float) -> float | None:
    if inner.get("attention_factor") is not None:
        return inner.number("attention_factor", 0.0, 1e3, open_low=True)
    mscale, all_dims = (inner.number(key, 0.0, 1e3, default=0.0) for key in ("mscale", "mscale_all_dim"))
    if not (mscale and all_dims):
        return None
    return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * all_dims * math.log(factor) + 1.0)


def _windows(fields: Fields, family: str, num_layers: int, max_position: int) -> tuple[int | None, ...]:
    # Absent and null differ here: transformers takes 4,096 where the other families have no such field.
    size = fields.values.get("sliding_window", None if family == "llama" else 4096)
    if family == "llama" and size is not None:
        raise fields.error("sliding_window", "absent for llama")
    if size is not None:
        size = fields.positions("sliding_window", default=size)
    qwen = family in ("qwen2", "qwen3")
    if qwen and not fields.flag("use_sliding_window", default=False):
        size = None
    first = 0
    if qwen and size is not None:
        first = fields.integer("max_window_layers", 0, 1 << 20, default=28)
    windows: list[int | None] = [size if layer >= first else None for layer in range(num_layers)]
    kinds = fields.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not (isinstance(kinds, list) and len(kinds) == num_layers and all(kind in known for kind in kinds)):
            raise fields.error("layer_types", f"{num_layers} entries of {' or '.join(known)}")
        sliding = [kind == "sliding_attention" for kind in kinds]
        if any(sliding) and size is None:
            raise fields.error("layer_types", "full_attention only where there is no sliding_window")
        if not qwen and sliding != [window is not None for window in windows]:
            raise fields.error("layer_types", f"the same kind in all layers, as sliding_window says, for {family}")
        windows = [size if slides else None for slides in sliding]
    # A window at least as long as the context hides nothing.
    windows = [None if window is None or window >= max_position else window for window in windows]
    return tuple(windows) if any(window is not None for window in windows) else ()


def _dtype(fields: Fields) -> DTypeName:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    names: tuple[DTypeName, ...] = ("float32", "float16", "bfloat16")
    value = fields.choice(key, (*names, *(f"torch.{name}" for name in names)), default="float32")
    return names[names.index(value.removeprefix("torch."))]


def parse_generation_config(fields: Fields, vocab_size: int, *, sampling: bool) -> GenerationConfig:
    """Turn the fields of a generation_config.json, or of a config.json, into sampling defaults.

    Args:
        fields: the file's fields.
        vocab_size: the logits' width; token ids must lie below it.
        sampling: read temperature and its like too; old config.json files list them without meaning them.

    Raises:
        CheckpointError: names the field, its value and what is allowed.
    """
    eos = fields.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    allowed = f"a token id from 0 to {vocab_size - 1}, or a list of at most 64"
    if len(listed) > 64 or not all(type(token) is int and 0 <= token < vocab_size for token in listed):
        raise fields.error("eos_token_id", allowed)
    bos = fields.get("bos_token_id")
    if bos is not None and not (type(bos) is int and 0 <= bos < vocab_size):
        raise fields.error("bos_token_id", f"a token id from 0 to {vocab_size - 1}")
    plain = GenerationConfig(eos_token_ids=tuple(dict.fromkeys(listed)), bos_token_id=bos)
    if not sampling:
        return plain

    def optional(key: str, low: float, high: float, *, open_low: bool = False) -> float | None:
        return None if fields.get(key) is None else fields.number(key, low, high, open_low=open_low)

    greedy = fields.get("do_sample") is not None and not fields.flag("do_sample", default=True)
    top_k = fields.integer("top_k", -1, 1 << 31, default=0)
    return replace(
        plain,
        temperature=0.0 if greedy else optional("temperature", 0.0, 2.0),
        top_k=top_k if top_k > 0 else None,
        top_p=optional("top_p", 0.0, 1.0, open_low=True),
        min_p=optional("min_p", 0.0, 1.0),
        repetition_penalty=optional("repetition_penalty", 0.0, 10.0, open_low=True),
    )
