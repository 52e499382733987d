"""This module holds a prediction of how long a step takes: its bytes over a bandwidth, its arithmetic over a rate. It
does not know a scheduler or a clock.

What it says is a bound, not a measurement: every part of a step runs as fast as memory or arithmetic allows, one part
after the other. Real kernels reach a part of both; see Williams et al. 2009, https://doi.org/10.1145/1498765.1498785.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from ..config import DTypeName, ModelConfig
from ..footprint import DTYPE_BYTES, CacheDTypeName, kv_bytes_per_token, weight_groups
from .gpus import Gpu

__all__ = ["LAUNCH_S", "CostModel", "PartTime", "Roofline", "StepWork"]

LAUNCH_S = 0.0
"""Seconds between two kernels, by default: a bound has none."""
LAUNCHES_PER_LAYER = 9
"""Norm, qkv, KV write, attention, o, norm, up, activation, down."""
LAUNCHES_PER_STEP = 6
"""Embedding, plan of attention, final norm, rows to sample, head, sampling."""


class StepWork(NamedTuple):
    """What one step has to do. A NamedTuple: a simulation makes one for every step."""

    num_tokens: int
    """Tokens that run."""
    num_sampled: int
    """Rows whose next token is drawn."""
    num_seqs: int
    kv_tokens_read: int
    """Sum over sequences of the tokens that attention reads: their whole length, this step's tokens included."""
    attention_pairs: int
    """Sum over the tokens that run of the tokens each of them sees, itself included."""

    @classmethod
    def of(cls, sequences: Iterable[tuple[int, int]], num_sampled: int | None = None) -> StepWork:
        """Return the work of a step of (query length, sequence length) pairs; all are sampled unless told."""
        num_tokens = num_seqs = kv_tokens = pairs = 0
        for query_len, seq_len in sequences:
            num_tokens += query_len
            num_seqs += 1
            kv_tokens += seq_len
            pairs += query_len * (seq_len - query_len) + query_len * (query_len + 1) // 2
        return cls(num_tokens, num_seqs if num_sampled is None else num_sampled, num_seqs, kv_tokens, pairs)


class CostModel(Protocol):
    """What says how long a step takes."""

    def step_s(self, work: StepWork) -> float:
        """Return seconds."""
        ...


class PartTime(NamedTuple):
    """One part of a step."""

    name: str
    flops: float
    num_bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.num_bytes if self.num_bytes else 0.0


class Roofline:
    """Predicts the seconds of a step of one model on one card.

    Args:
        model: its shape.
        gpu: bandwidth and rates.
        dtype: of weights and activations, whose rate counts.
        kv_cache_dtype: of keys and values; None: the same.
        bandwidth_efficiency, flops_efficiency: the part of each that is reached; 1 makes a bound of it.
        launch_s: seconds that each kernel costs on top.
    """

    def __init__(
        self,
        model: ModelConfig,
        gpu: Gpu,
        *,
        dtype: DTypeName,
        kv_cache_dtype: CacheDTypeName | None = None,
        bandwidth_efficiency: float = 1.0,
        flops_efficiency: float = 1.0,
        launch_s: float = LAUNCH_S,
    ) -> None:
        self.model, self.gpu, self.dtype = model, gpu, dtype
        element, hidden, inner = DTYPE_BYTES[dtype], model.hidden_size, model.intermediate_size
        heads, groups = model.num_q_heads * model.head_dim, weight_groups(model)
        self._bytes_per_s = gpu.bandwidth_bytes_per_s * bandwidth_efficiency
        self._flops_per_s = gpu.flops[dtype] * flops_efficiency
        num_linear = groups["attention"] + groups["mlp"]
        up = inner * (2 if model.gated_mlp else 1)
        self._linear_flops = 2 * num_linear
        self._linear_bytes = num_linear * element
        # In and out of the four projections of a layer.
        self._linear_io = model.num_layers * element * (4 * hidden + model.qkv_size + heads + up + inner)
        self._pair_flops = 4 * heads  # q k, and what it weighs of v
        # Per token and layer: k and v read; q, out, and k and v written.
        self._kv_bytes = kv_bytes_per_token(model, kv_cache_dtype or dtype) / model.num_layers
        self._attention_io = 2 * heads * element + self._kv_bytes
        self._windows = list(Counter(map(model.window, range(model.num_layers))).items())
        # Two norms with their residual, the rotation, the activation; the embedding and the final norm.
        self._pointwise_io = element * (
            model.num_layers * (8 * hidden + 2 * (model.qkv_size - model.num_kv_heads * model.head_dim) + up + inner)
            + 5 * hidden
        )
        head = model.vocab_size * hidden
        self._head_flops = 2 * head
        self._head_bytes = head * element
        self._head_io = element * (hidden + 2 * model.vocab_size)  # logits are written and read
        self._launches_s = launch_s * (LAUNCHES_PER_LAYER * model.num_layers + LAUNCHES_PER_STEP)

    def step_s(self, work: StepWork) -> float:
        """Return the seconds of one step: the sum over its parts of the longer of bytes and arithmetic."""
        num_tokens, num_sampled = work.num_tokens, work.num_sampled
        bandwidth, rate = self._bytes_per_s, self._flops_per_s
        seconds = self._launches_s + num_tokens * self._pointwise_io / bandwidth
        seconds += max(
            num_tokens * self._linear_flops / rate, (self._linear_bytes + num_tokens * self._linear_io) / bandwidth
        )
        if num_sampled:
            head_bytes = self._head_bytes + num_sampled * self._head_io
            seconds += max(num_sampled * self._head_flops / rate, head_bytes / bandwidth)
        for flops, num_bytes in self._attention(work):
            seconds += max(flops / rate, num_bytes / bandwidth)
        return seconds

    def parts(self, work: StepWork) -> list[PartTime]:
        """Return the parts of a step; their seconds add up to `step_s`."""
        linear_bytes = self._linear_bytes + work.num_tokens * self._linear_io
        found = [self._part("projections", work.num_tokens * self._linear_flops, linear_bytes)]
        kinds = [self._part("", flops, num_bytes) for flops, num_bytes in self._attention(work)]
        found.append(
            PartTime(
                "attention",
                sum(kind.flops for kind in kinds),
                sum(kind.num_bytes for kind in kinds),
                sum(kind.seconds for kind in kinds),
            )
        )
        if work.num_sampled:
            head_bytes = self._head_bytes + work.num_sampled * self._head_io
            found.append(self._part("head and sampling", work.num_sampled * self._head_flops, head_bytes))
        found.append(self._part("norms, rotation, activation", 0.0, work.num_tokens * self._pointwise_io))
        if self._launches_s:
            found.append(PartTime("launches", 0.0, 0.0, self._launches_s))
        return found

    def bound(self, works: Iterable[StepWork]) -> str:
        """Return what takes most of the time of some steps: "memory" or "arithmetic"."""
        by_memory = by_flops = 0.0
        for part in (part for work in works for part in self.parts(work)):
            if part.flops / self._flops_per_s > part.num_bytes / self._bytes_per_s:
                by_flops += part.seconds
            else:
                by_memory += part.seconds
        return "arithmetic" if by_flops > by_memory else "memory"

    def _attention(self, work: StepWork) -> list[tuple[float, float]]:
        """Return (FLOPs, bytes) of the layers of each window.

        Behind a window a sequence reads at most its width and the tokens that run; that is exact for sequences that
        are all longer or all shorter, and too much for a mixture.
        """
        found: list[tuple[float, float]] = []
        for window, num_layers in self._windows:
            kv_tokens, pairs = work.kv_tokens_read, work.attention_pairs
            if window is not None:
                kv_tokens = min(kv_tokens, work.num_seqs * (window - 1) + work.num_tokens)
                pairs = min(pairs, work.num_tokens * window)
            num_bytes = kv_tokens * self._kv_bytes + work.num_tokens * self._attention_io
            found.append((num_layers * pairs * self._pair_flops, num_layers * num_bytes))
        return found

    def _part(self, name: str, flops: float, num_bytes: float) -> PartTime:
        return PartTime(name, flops, num_bytes, max(flops / self._flops_per_s, num_bytes / self._bytes_per_s))
