"""This module holds which tensor of a checkpoint goes where in the decoder. It does not know files or bytes.

Both formats are described by the same rows: a source's name and exact shape, the parameter it belongs to, the first
row there, and how it is laid out. Names of sources are canonical: without the `model.` or `transformer.` prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..config import ModelConfig
from ..errors import CheckpointError
from ..footprint import weight_shapes

__all__ = ["Source", "gguf_sources", "hf_sources", "match"]

Shape = tuple[int, ...]

_PREFIXES = ("model.", "transformer.")
_HARMLESS = re.compile(
    r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # buffers that old exports kept
    r"|h\.\d+\.attn\.(bias|masked_bias)"
)


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of a checkpoint and its place in a parameter.

    `row` is the first row of the parameter that it fills. `layout`: "plain" as it is; "transposed" is [in, out]
    (GPT-2's Conv1D); "paired" has each head's rotary pairs side by side, as GGUF keeps q and k of llama models, where
    ours are half a head apart.
    """

    name: str
    shape: Shape
    target: str
    row: int = 0
    layout: Literal["plain", "transposed", "paired"] = "plain"


# What the formats call the parts of a layer; a parameter made of several lists them from its first row on.
_LLAMA_NAMES: Mapping[str, tuple[str, ...]] = {
    "embedding": ("embed_tokens",),
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "o": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "final_norm": ("norm",),
    "lm_head": ("lm_head",),
}
_GPT2_NAMES: Mapping[str, tuple[str, ...]] = {
    "embedding": ("wte",),
    "position_embedding": ("wpe",),
    "attention_norm": ("ln_1",),
    "qkv": ("attn.c_attn",),
    "o": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "up": ("mlp.c_fc",),
    "down": ("mlp.c_proj",),
    "final_norm": ("ln_f",),
    "lm_head": ("lm_head",),
}
_GGUF_NAMES: Mapping[str, tuple[str, ...]] = {
    "embedding": ("token_embd",),
    "attention_norm": ("attn_norm",),
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "o": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
    "final_norm": ("output_norm",),
    "lm_head": ("output",),
}


def hf_sources(config: ModelConfig) -> list[Source]:
    """Return every tensor that a Hugging Face checkpoint of this shape has, in the order of the forward pass."""
    if config.family != "gpt2":
        return _sources(config, _LLAMA_NAMES, "layers")
    conv = re.compile(r"layers\.\d+\.(qkv|o|up|down)\.weight")
    return [
        Source(one.name, one.shape[::-1], one.target, layout="transposed") if conv.fullmatch(one.target) else one
        for one in _sources(config, _GPT2_NAMES, "h")
    ]


def gguf_sources(config: ModelConfig) -> list[Source]:
    """Return every tensor that a GGUF file of a llama model of this shape has, in the order of the forward pass."""
    paired = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
    return [
        Source(one.name, one.shape, one.target, one.row, "paired") if paired.fullmatch(one.name) else one
        for one in _sources(config, _GGUF_NAMES, "blk")
    ]


def _sources(config: ModelConfig, names: Mapping[str, tuple[str, ...]], layers: str) -> list[Source]:
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {"qkv": (q_rows, kv_rows, kv_rows), "gate_up": (config.intermediate_size,) * 2}
    found: list[Source] = []
    for target, shape in weight_shapes(config).items():
        module, _, kind = target.rpartition(".")
        place, _, part = module.rpartition(".")
        prefix = f"{layers}.{place.removeprefix('layers.')}." if place else ""
        sizes = parts[part] if part in parts and len(names[part]) > 1 else shape[:1]
        row = 0
        for name, rows in zip(names[part], sizes, strict=True):
            found.append(Source(f"{prefix}{name}.{kind}", (rows, *shape[1:]), target, row))
            row += rows
    return found


def match(
    sources: Iterable[Source], shapes: Mapping[str, Shape], *, file: str, ignored: Iterable[str] = ()
) -> dict[str, str]:
    """Pair a checkpoint's tensors with the sources expected of it: the exact set, each of the exact shape.

    Args:
        sources: what the config says there must be.
        shapes: the checkpoint's own tensor names and shapes.
        file: names the checkpoint in errors.
        ignored: canonical names that may be there and are not used.

    Returns:
        Canonical name to the checkpoint's own name.

    Raises:
        CheckpointError: a tensor is missing, unexpected, there twice, or of another shape.
    """
    expected = {source.name: source for source in sources}
    unused, found = set(ignored), dict[str, str]()
    for own in shapes:
        prefix = next((prefix for prefix in _PREFIXES if own.startswith(prefix)), "")
        name = own[len(prefix) :]
        if name in expected:
            if name in found:
                raise CheckpointError(file, f"is there twice, also as {found[name]!r}", own)
            found[name] = own
        elif name not in unused and not _HARMLESS.fullmatch(name):
            raise CheckpointError(file, "is not a tensor of this model's config", own[:200])
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(file, f"is missing ({len(missing)} of {len(expected)} tensors are)", missing[0])
    for name, own in found.items():
        if shapes[own] != expected[name].shape:
            wanted = list(expected[name].shape)
            raise CheckpointError(file, f"has shape {list(shapes[own])}; the config says {wanted}", own)
    return found
