"""This module holds compiled grammars and how far a sequence is in one. It does not know how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["CompiledGrammar", "MatcherState"]

Int32Array = npt.NDArray[np.int32]


class MatcherState:
    """How far one sequence is in its grammar; see `GrammarState` in `step.py`.

    Args:
        matcher: of this sequence alone.
        vocab_size: width of the logits; the matcher knows one id more, which stands for the end of the output.
    """

    __slots__ = ("_bits", "_matcher", "_vocab_size")

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits: Int32Array = np.zeros(vocab_size // 32 + 1, dtype=np.int32)

    @property
    def may_end(self) -> bool:
        """Whether the output so far is complete; more may still follow."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def must_end(self) -> bool:
        """Whether the output so far is complete and no token can follow."""
        return not self._matcher.is_error() and self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further; "" while it can."""
        return self._matcher.get_error().split("\n", 1)[0]

    def fill(self, bitmask: Int32Array) -> None:
        """Write which tokens may come next into [ceil(vocab_size / 32)]; releases the interpreter while it works."""
        if self._matcher.is_error():
            bitmask[:] = 0
            return
        bits = self._bits
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            bits[:] = 0
        word, bit = divmod(self._vocab_size, 32)
        bits[word] &= (1 << bit) - 1
        bitmask[:] = bits[: len(bitmask)]

    def accept(self, token_id: int) -> None:
        """Go on by a token that `fill` allowed."""
        self._matcher.consume_token(token_id)


class CompiledGrammar:
    """What outputs must look like; see `Grammar` in `step.py`.

    Args:
        matcher: at its beginning; never advanced.
        vocab_size: width of the logits.
    """

    __slots__ = ("_matcher", "_vocab_size")

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def start(self, output_token_ids: Sequence[int]) -> MatcherState:
        """Return the state after some output: none at first, all so far where a sequence resumes."""
        matcher = self._matcher.deep_copy()
        if output_token_ids:
            matcher.consume_tokens(list(output_token_ids))
        return MatcherState(matcher, self._vocab_size)
