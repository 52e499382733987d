"""This module holds the watch over a runner's decoder: it keeps what passes. It does not know what is made of it.

The engine runs in its own chunks and steps, op by op; the watch stands where the decoder stands and asks it for every
layer's hidden state, so nothing is run a second time and prompts are seen like outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch

from ...layers.attention import AttentionMetadata
from ...models.decoder import Decoder, LayerCache
from ...runner.model_runner import ModelRunner

__all__ = ["Watch", "watching"]


class Watch:
    """Stands in for a decoder while one sequence runs.

    Args:
        decoder: does the work.
        first: the first position to keep.
        text: token ids; where they are given, each step samples the one that stands there. None: what the model says.
    """

    def __init__(self, decoder: Decoder, first: int, text: Sequence[int] | None) -> None:
        self.config, self.dtype, self.device = decoder.config, decoder.dtype, decoder.device
        self._decoder = decoder
        self._first = first
        self._text = text
        self._states: dict[int, torch.Tensor] = {}
        self._position = -1
        self.drawn_from: dict[int, torch.Tensor] = {}
        """The logits [vocab_size] that a token was drawn from, by position, counted from `first`."""

    def forward(
        self,
        token_ids: torch.Tensor,
        metadata: AttentionMetadata,
        cache: Sequence[LayerCache],
        capture: Sequence[int] = (),
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See `Decoder.forward`."""
        everything = range(self.config.num_layers + 2)
        hidden, states = self._decoder.forward(token_ids, metadata, cache, everything)
        positions = metadata.positions.tolist()
        kept = [i for i, position in enumerate(positions) if position >= self._first]
        if kept:
            columns = torch.stack([state[kept].float().cpu() for state in states], dim=1)
            self._states |= zip((positions[i] for i in kept), columns, strict=True)
        self._position = positions[-1]
        return hidden, [states[layer] for layer in capture]

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See `Decoder.logits`."""
        logits = self._decoder.logits(hidden_states)
        assert len(logits) == 1, "one sequence draws one token"
        if self._position >= self._first:
            self.drawn_from[self._position - self._first] = logits[0].cpu()
        if self._text is None:
            return logits
        forced = torch.zeros_like(logits)
        forced[0, self._text[self._position + 1]] = 1.0
        return forced

    def states(self, num_positions: int) -> torch.Tensor:
        """Return [num_layers + 2, num_positions - first, H] float32: `capture`'s numbering, the last before the norm.

        Args:
            num_positions: where to stop.
        """
        wanted = range(self._first, num_positions)
        missing = [position for position in wanted if position not in self._states]
        assert not missing, f"positions {missing[:5]} have not been run"
        return torch.stack([self._states[position] for position in wanted], dim=1)

    @property
    def num_positions(self) -> int:
        """How far the sequence has been run."""
        return max(self._states, default=-1) + 1


@contextmanager
def watching(runner: ModelRunner, *, first: int = 0, text: Sequence[int] | None = None) -> Iterator[Watch]:
    """Put a watch over a runner's decoder until the end of the `with` statement; see `Watch`."""
    decoder = runner.model
    watch = Watch(decoder, first, text)
    graphs, runner.graphs = runner.graphs, None  # what was captured does not ask who stands there now
    runner.model = cast(Decoder, watch)
    try:
        yield watch
    finally:
        runner.model, runner.graphs = decoder, graphs
