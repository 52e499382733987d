"""This module holds a running row's grammar: the mask of its next token, and when its output must end. It does not know
how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from os import cpu_count
from typing import Any

import numpy as np
import numpy.typing as npt

from ..step import GrammarState

__all__ = ["MaskWorkers", "RowGrammar"]

Int32Array = npt.NDArray[np.int32]


class MaskWorkers:
    """Threads that compute masks while the model runs; none exists before the first row with a grammar."""

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(4, cpu_count() or 1), "masks")

    def submit(self, compute: Callable[[int], Int32Array], position: int) -> Future[Int32Array]:
        """Begin to compute a mask."""
        return self._pool.submit(compute, position)


class RowGrammar:
    """The grammar of one row.

    Where the output may end, the row's stop tokens join the mask. Where only they could follow and none of them is
    allowed (there is no end-of-sequence id, it is ignored, or `min_tokens` bans it), the output ends without one.

    Args:
        state: of this row alone.
        vocab_size: width of the logits.
        stops: token ids that end the row.
        stops_from: position from which they may be sampled.
        allowed: [ceil(vocab_size / 32)] bits of what the request allows besides; None: everything.
    """

    def __init__(
        self,
        state: GrammarState,
        *,
        vocab_size: int,
        stops: npt.NDArray[np.integer[Any]],
        stops_from: int,
        allowed: Int32Array | None,
    ) -> None:
        self._state = state
        self._num_words = -(-vocab_size // 32)
        self._stop_ids = frozenset(stops.tolist())
        self._stops_from = stops_from
        self._allowed = allowed
        self._stops = np.zeros(self._num_words, dtype=np.int32)
        np.bitwise_or.at(self._stops.view(np.uint32), stops // 32, (1 << (stops % 32)).astype(np.uint32))
        self._next: Future[Int32Array] | Int32Array | None = None

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further; "" while it can."""
        return self._state.error

    def prepare(self, position: int, workers: MaskWorkers) -> None:
        """Begin to compute the mask for a position, if it is not there yet."""
        if self._next is None:
            self._next = workers.submit(self._compute, position)

    def mask(self, position: int) -> Int32Array:
        """Return [ceil(vocab_size / 32)] bits of the tokens that may stand at the next position."""
        if self._next is None:
            self._next = self._compute(position)
        elif isinstance(self._next, Future):
            self._next = self._next.result()
        return self._next

    def accept(self, token_id: int, position: int, workers: MaskWorkers) -> bool:
        """Take over the token that was sampled at a position; return whether the output ends with it.

        A stop token ends it, too, which is for whoever counts them to say. Otherwise the next mask is begun at once.
        """
        self._next = None
        if token_id in self._stop_ids:
            return False
        self._state.accept(token_id)
        if self._state.must_end:
            return True
        if not self._state.may_end:
            self.prepare(position + 1, workers)
            return False
        self._next = self._compute(position + 1)
        return not self._next.any()

    def _compute(self, position: int) -> Int32Array:
        mask = np.empty(self._num_words, dtype=np.int32)
        self._state.fill(mask)
        if position >= self._stops_from and self._state.may_end:
            mask |= self._stops
        if self._allowed is not None:
            mask &= self._allowed
        return mask
