"""This module holds the sampler's contract in plain Python and numpy, in float64. It shares no code with the ops."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

MASK = 0xFFFFFFFF


def fmix(h: int) -> int:
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK
    return h ^ (h >> 16)


def keys(seed: int, choice: int, position: int) -> list[int]:
    found = []
    for h in (0x243F6A88, 0x85A308D3):
        for word in (seed & MASK, seed >> 32 & MASK, choice & MASK, position & MASK):
            h = fmix(h ^ word)
        found.append(h)
    return found


def uniform_numerator(key: Sequence[int], token_id: int) -> int:
    """Return u·2²⁴."""
    h = (token_id * 0x9E3779B1 + key[0]) & MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B + key[1]) & MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK
    return (h ^ (h >> 16)) >> 8 | 1


def gumbel(key: Sequence[int], token_id: int) -> float:
    return -math.log(-math.log(uniform_numerator(key, token_id) / 2**24))


@dataclass
class Row:
    """Everything that decides one row's token."""

    logits: np.ndarray
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    position: int = 0
    num_valid_ids: int | None = None
    allowed: Collection[int] | None = None
    banned: Collection[int] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()

    def changed(self) -> np.ndarray:
        x = self.logits.astype(np.float64)[: self.num_valid_ids].copy()
        for token_id in range(len(x)):
            if (self.allowed is not None and token_id not in self.allowed) or token_id in self.banned:
                x[token_id] = -np.inf
            x[token_id] += self.bias.get(token_id, 0.0)
            times = list(self.output).count(token_id)
            if times or token_id in self.prompt:
                x[token_id] *= self.repetition if x[token_id] <= 0 else 1 / self.repetition
            x[token_id] -= self.frequency * times + self.presence * (times > 0)
        return x

    def probabilities(self) -> np.ndarray:
        """Return the distribution the token is drawn from: [number of valid ids]."""
        x = self.changed()
        ranking = sorted(range(len(x)), key=lambda token_id: (-x[token_id], token_id))
        p = np.zeros(len(x))
        if self.temperature == 0:
            p[ranking[0]] = 1.0
            return p
        weight = np.exp((x - x.max()) / self.temperature)
        kept = [token_id for token_id in ranking if weight[token_id] >= self.min_p]
        if self.top_k > 0:
            kept = kept[: self.top_k]
        if self.top_p < 1.0:
            needed, mass, nucleus = self.top_p * sum(weight[kept]), 0.0, []
            for token_id in kept:
                if mass >= needed:
                    break
                nucleus.append(token_id)
                mass += weight[token_id]
            kept = nucleus
        p[kept] = weight[kept] / sum(weight[kept])
        return p

    def token(self) -> tuple[int, float]:
        """Return the token and how far its score is ahead of the next."""
        p = self.probabilities()
        if self.temperature == 0:
            ahead = np.sort(self.changed())[::-1]
            return int(p.argmax()), math.inf if len(ahead) == 1 else ahead[0] - ahead[1]
        key = keys(self.seed, self.choice, self.position)
        score = sorted((math.log(p[i]) + gumbel(key, i), -i) for i in np.nonzero(p)[0].tolist())
        return -score[-1][1], math.inf if len(score) == 1 else score[-1][0] - score[-2][0]
