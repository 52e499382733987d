"""This module holds hand-made paged batches for exact tests. It does not know which op or backend reads them.

A `Batch` keeps every sequence's keys and values dense, so that a test plants what it wants at a position; `lay_out`
scatters them over permuted blocks of a cache in which every other slot is poison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from octavo.kernels.attention.spec import lay_out_blocks, poisoned_cache, store
from octavo.kernels.spec import generator
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """What a batch looks like; `seqs` lists (query_len, seq_len)."""

    seqs: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def name(self) -> str:
        seqs = "+".join(f"{query_len}/{seq_len}" for query_len, seq_len in self.seqs[:4])
        window = "" if self.window is None else f"-w{self.window}"
        heads = f"{self.num_kv_heads}x{self.group_size}x{self.head_dim}"
        return f"{seqs}-{heads}-b{self.block_size}-{str(self.dtype)[6:]}{window}"


@dataclass
class Batch:
    """Queries [num_tokens, num_q_heads, head_dim]; per sequence keys and values [seq_len, num_kv_heads, head_dim]."""

    shape: Shape
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def rows(self) -> list[tuple[int, int, int]]:
        """(row of q, sequence, position) of every query token."""
        found = []
        for s, (query_len, seq_len) in enumerate(self.shape.seqs):
            found += [(len(found) + i, s, seq_len - query_len + i) for i in range(query_len)]
        return found

    def visible(self, position: int) -> range:
        """Return the positions that a query at `position` sees."""
        window = self.shape.window
        return range(0 if window is None else max(0, position - window + 1), position + 1)

    def clone(self) -> Batch:
        return replace(
            self, q=self.q.clone(), keys=[k.clone() for k in self.keys], values=[v.clone() for v in self.values]
        )

    def lay_out(self, seed: int = 0, *, poison: bool = True, num_spare_blocks: int = 3) -> dict[str, Any]:
        """Return the op's arguments; `seed` decides only where blocks lie, `poison=False` fills the rest with zeros."""
        shape = self.shape
        lengths = [seq_len for _, seq_len in shape.seqs]
        table, num_blocks = lay_out_blocks(
            lengths, shape.block_size, generator("layout", seed), num_spare_blocks=num_spare_blocks
        )
        inputs: dict[str, Any] = {}
        for name, dense in (("k_cache", self.keys), ("v_cache", self.values)):
            cache_shape = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
            cache = poisoned_cache(cache_shape, shape.dtype) if poison else torch.zeros(cache_shape, dtype=shape.dtype)
            for s, rows in enumerate(dense):
                store(cache, rows.to(shape.dtype), table[s])
            inputs[name] = cache
        # Queries are a slice of one projection's output, as in a model: what lies between their rows is not theirs.
        fused = torch.full((len(self.q), shape.num_q_heads + 2 * shape.num_kv_heads, shape.head_dim), float("nan"))
        fused = fused.to(shape.dtype)
        fused[:, : shape.num_q_heads] = self.q
        return {
            "q": fused[:, : shape.num_q_heads],
            **inputs,
            "cu_seqlens_q": torch.tensor([0] + [n for n, _ in shape.seqs]).cumsum(0).to(torch.int32),
            "seq_lens": torch.tensor(lengths, dtype=torch.int32),
            "block_table": table,
            "scale": shape.head_dim**-0.5,
            "window": shape.window,
        }


def slots(inputs: dict[str, Any], s: int, positions: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (block, offset) at which a laid-out batch keeps these positions of sequence `s`."""
    block_size = inputs["k_cache"].shape[2]
    return [(int(inputs["block_table"][s, p // block_size]), p % block_size) for p in positions]


def gaussian(shape: Shape, seed: int = 0) -> Batch:
    """Return a batch of standard normal queries, keys and values, rounded to the shape's dtype."""
    draw = generator("gaussian", seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(shape.dtype)

    num_tokens = sum(query_len for query_len, _ in shape.seqs)
    return Batch(
        shape,
        randn(num_tokens, shape.num_q_heads, shape.head_dim),
        [randn(seq_len, shape.num_kv_heads, shape.head_dim) for _, seq_len in shape.seqs],
        [randn(seq_len, shape.num_kv_heads, shape.head_dim) for _, seq_len in shape.seqs],
    )


def labelled(shape: Shape) -> Batch:
    """Return keys of ±1 and values that say where they come from, in odd integers that every dtype holds exactly.

    A value's first four elements are 2b+1, 2o+1, 2h+1, 2s+1 for logical block b, offset o, KV head h, sequence s.
    """
    draw = generator("labelled", shape.name)
    keys, values = [], []
    for s, (_, seq_len) in enumerate(shape.seqs):
        size = (seq_len, shape.num_kv_heads, shape.head_dim)
        keys.append(torch.randint(0, 2, size, generator=draw).mul(2).sub(1).to(shape.dtype))
        value = torch.randint(-60, 60, size, generator=draw).mul(2).add(1)
        position = torch.arange(seq_len)
        value[..., 0] = (position // shape.block_size * 2 + 1)[:, None]
        value[..., 1] = (position % shape.block_size * 2 + 1)[:, None]
        value[..., 2] = torch.arange(shape.num_kv_heads) * 2 + 1
        value[..., 3] = 2 * s + 1
        values.append(value.to(shape.dtype))
    q = torch.zeros(sum(n for n, _ in shape.seqs), shape.num_q_heads, shape.head_dim, dtype=shape.dtype)
    return Batch(shape, q, keys, values)


def describe(label: Tensor) -> str:
    """Say which slot a labelled value was read from."""
    block, offset, head, s = (round((x - 1) / 2, 3) for x in label[:4].tolist())
    return f"block {block} offset {offset} head {head} of sequence {s}"
