"""This module holds the requests of a simulation as arrays: when each arrives, how long its prompt and output are, what
its prompt shares with others. It does not know files or the scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ..workload import gamma_arrivals

__all__ = ["DrawnPrompts", "HashedPrompts", "KnownPrompts", "Prompts", "Workload"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

POOL_TOKENS = 1 << 16
STRIDE = 7919
"""Between the beginnings of two prompts in the pool: a prime."""


class Prompts(Protocol):
    """Where token ids come from."""

    def __call__(self, number: int, num_tokens: int, vocab_size: int) -> Int32Array:
        """Return the prompt of a request: [num_tokens], ids below the width of the logits."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DrawnPrompts:
    """Ids drawn at random; no two prompts are alike behind what they share.

    Args:
        prefix_tokens: how many leading tokens a prompt shares with others of the same prefix.
        prefix: [num_requests] which prefix each has.
    """

    prefix_tokens: int
    prefix: IntArray

    def __call__(self, number: int, num_tokens: int, vocab_size: int) -> Int32Array:
        """See `Prompts`."""
        ids = np.empty(num_tokens, dtype=np.int32)
        shared = min(self.prefix_tokens, num_tokens)
        if shared:
            ids[:shared] = _draw(1 + int(self.prefix[number]), shared)
        rest = num_tokens - shared
        start = number * STRIDE % POOL_TOKENS
        ids[shared:] = _pool(rest)[start : start + rest]
        # The pool comes round again, and may itself have runs that are alike: the first two tokens tell prompts apart.
        ids[shared : shared + 2] = (number, number // vocab_size)[:rest]
        ids %= vocab_size
        return ids


@dataclass(frozen=True, slots=True, eq=False)
class KnownPrompts:
    """Ids that are known, or stand for pieces of a known text."""

    ids: Sequence[Int32Array]

    def __call__(self, number: int, num_tokens: int, vocab_size: int) -> Int32Array:
        """See `Prompts`."""
        return self.ids[number] % np.int32(vocab_size)


@dataclass(frozen=True, slots=True, eq=False)
class HashedPrompts:
    """Ids of which only names of blocks are known: equal names, equal tokens, as in Mooncake's traces."""

    BLOCK_TOKENS: ClassVar[int] = 512
    names: Sequence[Sequence[int]]

    def __call__(self, number: int, num_tokens: int, vocab_size: int) -> Int32Array:
        """See `Prompts`."""
        parts = [_draw(name, self.BLOCK_TOKENS) for name in self.names[number]]
        return np.concatenate(parts)[:num_tokens] % np.int32(vocab_size)


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests in the order of their arrival; all arrays are [num_requests]."""

    name: str
    arrival_s: FloatArray
    """From the start, ascending."""
    prompt_tokens: IntArray
    output_tokens: IntArray
    """At least 1."""
    prompts: Prompts
    notes: tuple[str, ...] = ()
    """What is to be kept in mind of it."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    def prompt(self, number: int, vocab_size: int) -> Int32Array:
        """Return the token ids of one request."""
        return self.prompts(number, int(self.prompt_tokens[number]), vocab_size)

    def at_rate(self, rate: float, burstiness: float = 1.0, seed: int = 0) -> Workload:
        """Return the same requests arriving at another rate, in requests per second; inf: all at once."""
        return replace(self, arrival_s=gamma_arrivals(len(self), rate, burstiness, seed))

    @property
    def rate(self) -> float:
        """Requests per second; inf where all arrive at once."""
        last = float(self.arrival_s[-1]) if len(self) else 0.0
        return len(self) / last if last else math.inf


_POOLS: dict[int, Int32Array] = {}


def _draw(seed: int, num_tokens: int) -> Int32Array:
    """Return ids that are always the same for a seed; those drawn lately are kept."""
    found = _POOLS.get(seed)
    if found is None or len(found) < num_tokens:
        if len(_POOLS) > 4096:
            _POOLS.clear()
        size = max(num_tokens, 512)
        found = _POOLS[seed] = np.random.default_rng(seed).integers(0, 2**31 - 1, size, dtype=np.int32)
    return found[:num_tokens]


def _pool(num_tokens: int) -> Int32Array:
    """Return ids to cut prompts of up to so many tokens from, whatever their start."""
    size = POOL_TOKENS + (1 << num_tokens.bit_length())
    return _draw(0, size)
