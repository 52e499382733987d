"""This module holds what a reference is: a model that answers whole texts, and the parameters its layers should have.
It does not know how an engine runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

__all__ = ["Answers", "Parameters", "Reference"]


class Answers(NamedTuple):
    """What a reference says of one text of T tokens, float32 on the CPU."""

    logits: torch.Tensor
    """[T, vocab_size]"""
    states: list[torch.Tensor]
    """[T, H] each: the embedding, what each layer leaves, and the last of these after the final norm."""


class Parameters(Protocol):
    """What each part of the model is made of, under our names ("layers.7.down") and as the reference has it."""

    def weight(self, name: str) -> torch.Tensor:
        """Return a weight: [out, in] of a projection, fused as ours are, or [H] of a norm."""

    def bias(self, name: str) -> torch.Tensor | None:
        """Return a bias, or None where there is none."""

    def eps(self, name: str) -> float:
        """Return what a norm adds to the mean square or the variance."""

    def scale(self, layer: int) -> float:
        """Return the softmax scale."""

    def window(self, layer: int) -> int | None:
        """Return how many tokens a query sees, itself included; None: all."""

    def activation(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the MLP's activation."""

    def head_norms(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return the weights of the norms of queries and keys and their epsilon; None: there are none."""

    def rotations(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Return [T, rotary_dim] cosines, then sines, of each pair; None: it has no opinion of its own."""


class Reference(Protocol):
    """A model to compare with."""

    name: str
    """"hf" or "torch"."""
    title: str
    """In words, with version and dtype."""
    shared: Mapping[str, str]
    """What it has in common with the engine, and why that is not checked."""
    has_eager: bool
    """Whether it can also run in the engine's dtype, as a yardstick."""
    checks_weights: bool
    """Whether its parameters are read independently of the engine's."""

    @property
    def parameters(self) -> Parameters:
        """What its layers are made of."""

    def answers(self, token_ids: list[int]) -> Answers:
        """Run one text in one piece."""

    def become_eager(self) -> None:
        """Run in the engine's dtype from now on."""
