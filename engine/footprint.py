"""This module holds the arithmetic of memory: what weights, keys and values, and a step's tensors take, from a model's
shape alone. It does not know torch, files or the machine.

The loader takes its tensors' names and shapes from here, `resolve.py` its defaults and its CapacityErrors, and
`octavo plan` its tables, so that they cannot disagree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .config import DTypeName, ModelConfig

__all__ = [
    "DTYPE_BYTES",
    "WEIGHT_GROUPS",
    "CacheDTypeName",
    "StepMemory",
    "WeightGroup",
    "copies_tied_head",
    "graph_bytes",
    "kv_bytes_per_token",
    "kv_pool_bytes",
    "num_weights",
    "split_bytes",
    "step_memory",
    "table_bytes",
    "weight_groups",
    "weight_shapes",
]

Shape = tuple[int, ...]
WeightGroup = Literal["embedding", "attention", "mlp", "norms", "head"]
WEIGHT_GROUPS: tuple[WeightGroup, ...] = ("embedding", "attention", "mlp", "norms", "head")
CacheDTypeName = Literal["float32", "float16", "bfloat16", "int8", "fp8"]
"""What keys and values can be stored as; fp8 is e4m3."""

DTYPE_BYTES: Mapping[CacheDTypeName, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "fp8": 1,
}
LOGITS_CHUNK_TOKENS = 256
"""Prompt positions whose logits are held at once, for prompt logprobs."""
SPLIT_TOKENS, MAX_DECODE_QUERY_LEN = 512, 16
"""As decode attention has them, which cannot be imported without torch; a test compares."""
GRAPHS_BYTES = 256 << 20
"""What captured graphs take of a GPU beside their tensors: an allowance, not measured."""
MAX_HEAD_COPY = 0.22
"""A tied head is copied for speed only while it is at most this part of the weights."""

_GROUP_OF: Mapping[str, WeightGroup] = {
    "embedding": "embedding",
    "position_embedding": "embedding",
    "qkv": "attention",
    "o": "attention",
    "gate_up": "mlp",
    "up": "mlp",
    "down": "mlp",
    "lm_head": "head",
}


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the name and shape of every parameter of the decoder, in the order of the forward pass."""
    hidden, inner, heads_size = config.hidden_size, config.intermediate_size, config.num_q_heads * config.head_dim
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, hidden)}
    if config.rope is None:
        shapes["position_embedding.weight"] = (config.max_position, hidden)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (hidden,)
        if config.norm == "layer":
            shapes[f"{name}.bias"] = (hidden,)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        norm(at + "attention_norm")
        linear(at + "qkv", config.qkv_size, hidden, config.qkv_bias)
        if config.qk_norm:
            shapes[at + "q_norm.weight"] = shapes[at + "k_norm.weight"] = (config.head_dim,)
        linear(at + "o", hidden, heads_size, config.o_bias)
        norm(at + "mlp_norm")
        if config.gated_mlp:
            linear(at + "gate_up", 2 * inner, hidden, config.mlp_bias)
        else:
            linear(at + "up", inner, hidden, config.mlp_bias)
        linear(at + "down", hidden, inner, config.mlp_bias)
    norm("final_norm")
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def weight_groups(config: ModelConfig) -> dict[WeightGroup, int]:
    """Return the elements of the weights by group; a tied head has none of its own."""
    groups = dict.fromkeys(WEIGHT_GROUPS, 0)
    for name, shape in weight_shapes(config).items():
        module = re.sub(r"^(layers\.\d+\.)?(\w+)\.(weight|bias)$", r"\2", name)
        groups[_GROUP_OF.get(module, "norms")] += math.prod(shape)
    return groups


def num_weights(config: ModelConfig) -> int:
    """Return the elements of all weights."""
    return sum(map(math.prod, weight_shapes(config).values()))


def copies_tied_head(config: ModelConfig) -> bool:
    """Whether a tied head is stored once more where projections are packed: the embedding needs the plain rows.

    Measured for SmolLM2-135M on two cores, plain against packed: 10.1 / 4.4 ms at 8 rows, 9.9 / 9.0 ms at 32.
    """
    per_layer = config.hidden_size * (config.qkv_size + config.num_q_heads * config.head_dim)
    per_layer += config.hidden_size * config.intermediate_size * (3 if config.gated_mlp else 2)
    head = config.vocab_size * config.hidden_size
    return config.tie_embeddings and head <= MAX_HEAD_COPY * (head + config.num_layers * per_layer)


def kv_bytes_per_token(config: ModelConfig, dtype: CacheDTypeName) -> int:
    """Return the bytes of keys and values that one token takes over all layers; int8 has a float32 scale per head."""
    per_head = config.head_dim * DTYPE_BYTES[dtype] + (4 if dtype == "int8" else 0)
    return 2 * config.num_layers * config.num_kv_heads * per_head


def kv_pool_bytes(config: ModelConfig, dtype: CacheDTypeName, *, num_blocks: int, block_size: int) -> int:
    """Return the bytes of a KV pool of so many blocks and the null block."""
    return (num_blocks + 1) * block_size * kv_bytes_per_token(config, dtype)


def table_bytes(config: ModelConfig, max_model_len: int) -> int:
    """Return the bytes of the table of rotations: [max_model_len, rotary_dim] float32."""
    return 0 if config.rope is None else 4 * max_model_len * config.rope.rotary_dim


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The most bytes that the tensors of one step hold at once, at each of the three places where that is most."""

    attention: int
    mlp: int
    head: int

    @property
    def peak(self) -> int:
        """The most of the three."""
        return max(self.attention, self.mlp, self.head)


def step_memory(config: ModelConfig, dtype: DTypeName, *, num_tokens: int, num_seqs: int) -> StepMemory:
    """Return what a step of at most so many tokens and sequences holds, as the Triton kernels run it.

    Through all layers go the residual and what is added to it, [T, H] each, and per token an id, a position and a slot
    (int64). Attention adds q, k, v, its output and the projection of that; the MLP its up projection, the activation
    and what becomes of it; the head the rows to sample, their logits and a float32 copy where sampling edits them, or
    the logits of a slice of a prompt.
    """
    element, hidden, inner = DTYPE_BYTES[dtype], config.hidden_size, config.intermediate_size
    heads = config.num_q_heads * config.head_dim
    up = inner * (2 if config.gated_mlp else 1)
    state = hidden * element
    logits = config.vocab_size * element
    sampled = num_seqs * (state + logits + 4 * config.vocab_size)
    return StepMemory(
        attention=num_tokens * (3 * 8 + 3 * state + (config.qkv_size + heads) * element),
        mlp=num_tokens * (3 * 8 + 2 * state + (inner + max(up, hidden)) * element),
        head=num_tokens * (3 * 8 + state) + max(sampled, min(num_tokens, LOGITS_CHUNK_TOKENS) * logits),
    )


def graph_bytes(config: ModelConfig, dtype: DTypeName, *, num_seqs: int) -> int:
    """Return the bytes to keep for captured decode steps of at most so many sequences, which share their memory.

    The head runs outside of them.
    """
    step = step_memory(config, dtype, num_tokens=num_seqs, num_seqs=num_seqs)
    return GRAPHS_BYTES + max(step.attention, step.mlp)


def split_bytes(config: ModelConfig, *, num_seqs: int, kv_tokens: int) -> int:
    """Return the most bytes of the partial results of decode attention in one step.

    A sequence's keys are split every `SPLIT_TOKENS`; each split keeps, for as many query tokens as decode takes, an
    unfinished row of every head in float32, its greatest score and its sum. Sequences that share blocks may have more.

    Args:
        num_seqs: sequences of a step.
        kv_tokens: tokens of all of them, at most the pool's.
    """
    per_split = MAX_DECODE_QUERY_LEN * config.num_q_heads * (config.head_dim + 2) * 4
    # One more for what is left over at a sequence's end, and one that the plan keeps for it.
    return 2 * num_seqs * per_split + -(-kv_tokens * per_split // SPLIT_TOKENS)
