"""This module holds the one decoder: every supported family is a configuration of it. It does not know file formats.

A step flows as: token ids -> embedding -> per layer (norm, attention, add, norm, MLP, add) -> final norm -> head. The
two adds are fused into the norms that follow them, so `residual` is the hidden state and `x` what is added next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from octavo.kernels import build_cos_sin

from ..config import ModelConfig, RopeConfig
from ..footprint import copies_tied_head
from ..layers.attention import Attention, AttentionMetadata, LayerCache
from ..layers.linear import Layout, Linear, usable_layout
from ..layers.mlp import MLP
from ..layers.norm import Norm

__all__ = ["Decoder", "LayerCache", "WeightLoader"]

_PROJECTION = re.compile(r"(qkv|o|gate_up|up|down|lm_head)\.weight$")

Allocate = Callable[[str, tuple[int, ...]], torch.Tensor]
OnLoaded = Callable[[str, torch.Tensor], None]
WeightLoader = Callable[[Allocate, OnLoaded], None]
"""Fills every tensor that `allocate(name, shape)` returns and says `on_loaded(name, tensor)` as each is complete."""


class _Layer(NamedTuple):
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP


class Decoder:
    """A causal language model over the paged KV cache.

    Args:
        config: its shape.
        load: fills the weights; each projection is repacked as soon as it is complete, so that the memory at its
            peak is that of the weights and one tensor.
        dtype, device: of weights and hidden states.
        max_model_len: longest sequence in tokens, for the table of rotations.
        layout, invariant: see `Linear`.
    """

    def __init__(
        self,
        config: ModelConfig,
        load: WeightLoader,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        layout: Layout = "packed",
        invariant: bool = False,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._layout = usable_layout(layout, device, dtype)
        self._invariant = invariant
        self._tensors: dict[str, torch.Tensor] = {}
        self._projections: dict[str, Linear] = {}
        self._scratch: torch.Tensor | None = None
        load(self._allocate, self._take)
        self._scratch = None
        cos_sin = _rotations(config.rope, max_model_len, device) if config.rope is not None else None
        self._layers = [self._layer(index, cos_sin) for index in range(config.num_layers)]
        self._embedding = self._tensors.pop("embedding.weight")
        self._position_embedding = self._tensors.pop("position_embedding.weight", None)
        self._final_norm = self._norm("final_norm")
        if config.tie_embeddings:
            copied = self._layout == "packed" and copies_tied_head(config)
            self._head = Linear(self._embedding, layout="packed" if copied else "plain", invariant=invariant)
        else:
            self._head = self._projections.pop("lm_head.weight")
        assert not self._tensors, f"weights nobody uses: {sorted(self._tensors)}"
        assert not self._projections, f"weights nobody uses: {sorted(self._projections)}"

    def forward(
        self,
        token_ids: torch.Tensor,
        metadata: AttentionMetadata,
        cache: Sequence[LayerCache],
        capture: Sequence[int] = (),
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the layers over the tokens of a step, writing their keys and values.

        Args:
            token_ids: [T] int64.
            metadata: where they stand and what they see.
            cache: one entry per layer.
            capture: hidden states wanted, in the numbering of transformers' `output_hidden_states`: 0 is the
                embedding, i what layer i leaves, num_layers the last one after the final norm; num_layers + 1, which
                transformers has not, the last one before it.

        Returns:
            The normalised hidden states [T, H], and the captured ones, each [T, H], in the order of `capture`.
        """
        residual = F.embedding(token_ids, self._embedding)
        if self._position_embedding is not None:
            residual += F.embedding(metadata.positions, self._position_embedding)
        states: dict[int, torch.Tensor] = {0: residual.clone()} if 0 in capture else {}
        write_plan = self._layers[0].attention.plan_write(metadata, cache[0].k.shape[2], self.dtype)
        x = self._layers[0].attention_norm(residual)
        for index, (layer, layer_cache) in enumerate(zip(self._layers, cache, strict=True), start=1):
            x = layer.attention(x, layer_cache, metadata, write_plan)
            x = layer.mlp_norm(x, residual)
            x = layer.mlp(x)
            last = index == len(self._layers)
            x = (self._final_norm if last else self._layers[index].attention_norm)(x, residual)
            if index in capture:
                states[index] = x if last else residual.clone()
        states[len(self._layers) + 1] = residual
        return x, [states[index] for index in capture]

    def normalised(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return hidden states [n, H] that any layer leaves as the final norm would, had it come next."""
        return self._final_norm(hidden_states)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, vocab_size] of normalised hidden states [n, H]."""
        return self._head(hidden_states)

    def modules(self) -> Iterator[tuple[str, Linear | Norm]]:
        """Yield every projection and norm under its parameter's name, in the order of the forward pass."""
        for index, layer in enumerate(self._layers):
            prefix = f"layers.{index}"
            yield f"{prefix}.attention_norm", layer.attention_norm
            yield f"{prefix}.qkv", layer.attention.qkv
            yield f"{prefix}.o", layer.attention.o
            yield f"{prefix}.mlp_norm", layer.mlp_norm
            yield f"{prefix}.{'gate_up' if self.config.gated_mlp else 'up'}", layer.mlp.up
            yield f"{prefix}.down", layer.mlp.down
        yield "final_norm", self._final_norm
        yield "lm_head", self._head

    def _allocate(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if self._layout == "plain" or not _PROJECTION.search(name):
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        # A projection that is copied needs its plain form for a moment only. Giving each a tensor of its own left
        # freed memory between the packed ones: 1.3 to 1.4 times the weights at the peak, against 1.03 with one scratch.
        size = math.prod(shape)
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = None
            self._scratch = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._scratch[:size].view(shape)

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        if _PROJECTION.search(name):
            self._projections[name] = Linear(tensor, layout=self._layout, invariant=self._invariant)
        else:
            self._tensors[name] = tensor

    def _norm(self, name: str) -> Norm:
        weight = self._tensors.pop(f"{name}.weight")
        return Norm(weight, self._tensors.pop(f"{name}.bias", None), self.config.norm_eps)

    def _projection(self, name: str) -> Linear:
        projection = self._projections.pop(f"{name}.weight")
        projection.bias = self._tensors.pop(f"{name}.bias", None)
        return projection

    def _layer(self, index: int, cos_sin: torch.Tensor | None) -> _Layer:
        config, prefix = self.config, f"layers.{index}"
        attention = Attention(
            self._projection(f"{prefix}.qkv"),
            self._projection(f"{prefix}.o"),
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.window(index),
            cos_sin=cos_sin,
            rope_style=config.rope.style if config.rope is not None else "neox",
            q_norm=self._tensors.pop(f"{prefix}.q_norm.weight", None),
            k_norm=self._tensors.pop(f"{prefix}.k_norm.weight", None),
            eps=config.norm_eps,
        )
        up = self._projection(f"{prefix}.gate_up" if config.gated_mlp else f"{prefix}.up")
        mlp = MLP(up, self._projection(f"{prefix}.down"), config.activation, gated=config.gated_mlp)
        return _Layer(self._norm(f"{prefix}.attention_norm"), attention, self._norm(f"{prefix}.mlp_norm"), mlp)


def _rotations(rope: RopeConfig, max_model_len: int, device: torch.device) -> torch.Tensor:
    return build_cos_sin(
        max_model_len,
        theta=rope.theta,
        rotary_dim=rope.rotary_dim,
        scaling=rope.scaling,
        factor=rope.factor,
        original_max_position=rope.original_max_position,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        attention_factor=rope.attention_factor,
        truncate=rope.truncate,
        device=device,
    )
