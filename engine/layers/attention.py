"""This module holds self-attention over the paged cache and what it is told of a step. It does not know requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from octavo.kernels import paged_attention_decode, paged_attention_prefill, plan_write_kv, write_kv

from .linear import Linear

__all__ = ["Attention", "AttentionMetadata", "AttentionSlice", "LayerCache"]


class LayerCache(NamedTuple):
    """The KV cache of one layer: B blocks of `block_size` slots."""

    k: torch.Tensor
    v: torch.Tensor
    """[B, K, block_size, D] each: floating point, int8 or float8_e4m3fn."""
    k_scale: torch.Tensor | float | None = None
    v_scale: torch.Tensor | float | None = None
    """What stored numbers are to be multiplied with. int8: [B, K, block_size] float32 each, written along; e4m3: one
    number each; None: nothing."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that takes memory."""
        return [each for each in self if isinstance(each, torch.Tensor)]


@dataclass(frozen=True, slots=True)
class AttentionSlice:
    """The sequences of a step that go through one attention call."""

    cu_seqlens_q: torch.Tensor
    """[num_seqs + 1] int32, from 0."""
    seq_lens: torch.Tensor
    """[num_seqs] int32, this step's tokens included."""
    block_table: torch.Tensor
    """[num_seqs, max_blocks_per_seq] int32."""
    plan: Any
    """What the backend prepared once for all layers."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of a step stand and what they see; shared by all layers."""

    positions: torch.Tensor
    """[T] int64."""
    slot_mapping: torch.Tensor
    """[T] int64, -1: not written."""
    num_decode_tokens: int
    """The first so many tokens belong to `decode`, the others to `prefill`."""
    decode: AttentionSlice | None
    prefill: AttentionSlice | None


class Attention:
    """Fused q, k, v projection, rotation, cache write, attention, output projection.

    Args:
        qkv: [(Q + 2 K) * D, H].
        o: [H, Q * D].
        num_q_heads, num_kv_heads, head_dim: the heads.
        window: tokens a query sees, itself included; None: all.
        cos_sin: [max_position, rotary_dim] float32, or None for no rotation.
        rope_style: "neox" or "interleaved".
        q_norm, k_norm: [D] each, or None.
        eps: of those norms.
    """

    def __init__(
        self,
        qkv: Linear,
        o: Linear,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        cos_sin: torch.Tensor | None = None,
        rope_style: Literal["neox", "interleaved"] = "neox",
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        self.qkv = qkv
        self.o = o
        self._num_q_heads = num_q_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._scale = head_dim**-0.5
        self._window = window
        self._cos_sin = cos_sin
        self._rope_style = rope_style
        self._q_norm = q_norm
        self._k_norm = k_norm
        self._eps = eps

    def plan_write(self, metadata: AttentionMetadata, block_size: int, dtype: torch.dtype) -> Any:
        """Prepare the cache writes of a step; the plan serves every layer with the same rotation."""
        return plan_write_kv(
            metadata.slot_mapping,
            positions=metadata.positions,
            cos_sin=self._cos_sin,
            rope_style=self._rope_style,
            block_size=block_size,
            num_kv_heads=self._num_kv_heads,
            dtype=dtype,
        )

    def __call__(
        self,
        x: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        write_plan: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: [T, H].
            cache: this layer's; written here.
            metadata: the step.
            write_plan: from `plan_write`.

        Returns:
            [T, H].
        """
        heads = self.qkv(x).view(x.shape[0], -1, self._head_dim)
        q, k, v = heads.split((self._num_q_heads, self._num_kv_heads, self._num_kv_heads), dim=1)
        write_kv(
            q,
            k,
            v,
            cache.k,
            cache.v,
            metadata.slot_mapping,
            positions=metadata.positions,
            cos_sin=self._cos_sin,
            rope_style=self._rope_style,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            eps=self._eps,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            plan=write_plan,
        )
        out = torch.empty((x.shape[0], self._num_q_heads, self._head_dim), dtype=x.dtype, device=x.device)
        split = metadata.num_decode_tokens
        if (part := metadata.decode) is not None:
            paged_attention_decode(
                q[:split],
                cache.k,
                cache.v,
                cu_seqlens_q=part.cu_seqlens_q,
                seq_lens=part.seq_lens,
                block_table=part.block_table,
                scale=self._scale,
                window=self._window,
                k_scale=cache.k_scale,
                v_scale=cache.v_scale,
                plan=part.plan,
                out=out[:split],
            )
        if (part := metadata.prefill) is not None:
            paged_attention_prefill(
                q[split:],
                cache.k,
                cache.v,
                cu_seqlens_q=part.cu_seqlens_q,
                seq_lens=part.seq_lens,
                block_table=part.block_table,
                scale=self._scale,
                window=self._window,
                k_scale=cache.k_scale,
                v_scale=cache.v_scale,
                worklist=part.plan,
                out=out[split:],
            )
        return self.o(out.view(x.shape[0], -1))
