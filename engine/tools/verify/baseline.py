"""This module holds what a reference says of the texts, and measures others against it. It does not know the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from .comparison import LogitDifferences, compare_logits, row_errors, unit_of
from .reference import Answers, Reference
from .report import layer_limits
from .texts import Text

__all__ = ["Baseline", "Tell"]

LOGITS_ROWS = 64
"""Positions whose logits are held in float64 at once."""
Tell = Callable[[str, int], None]
"""Called with what is done now, and how many tokens have gone through since the last call."""
IntArray = npt.NDArray[np.int64]


class Baseline:
    """The answers of a reference to the texts that are watched, and what eager in the engine's dtype makes of them.

    Positions of all watched texts are numbered through; `index` finds them.

    Args:
        reference: in its wide dtype; afterwards it runs in the engine's, where it can.
        texts: all that run.
        watched: indices of those that are compared.
        dtype: the engine's.
        tell: how far it is.
        max_mean_kl: what keys and values stored in fewer bits may change; hidden states are then not held to anything.
            None: they are stored in the engine's dtype.
    """

    def __init__(
        self,
        reference: Reference,
        texts: Sequence[Text],
        watched: Sequence[int],
        dtype: torch.dtype,
        tell: Tell,
        max_mean_kl: float | None = None,
    ) -> None:
        self.max_mean_kl = max_mean_kl
        self._texts = texts
        self._dtype = dtype
        self.is_watched = np.isin(np.arange(len(texts)), watched)
        lengths = [len(text.token_ids) if self.is_watched[i] else 0 for i, text in enumerate(texts)]
        self._starts = np.cumsum([0, *lengths[:-1]])
        following = [[*texts[i].token_ids[1:], -1] for i in watched]
        self._next_ids = np.array([each for ids in following for each in ids], dtype=np.int64)
        answers = self._ask(reference, watched, "run the reference", tell)
        self._logits = torch.cat([each.logits for each in answers])
        self._states = [torch.cat(parts) for parts in zip(*(each.states for each in answers), strict=True)]
        self.eager: LogitDifferences | None = None
        self.eager_units: npt.NDArray[np.float64] | None = None
        if reference.has_eager:
            reference.become_eager()
            found, units = [], []
            name = f"run eager in {str(dtype).removeprefix('torch.')}"
            for text, answer in zip(watched, self._ask(reference, watched, name, tell), strict=True):
                index = self.index(np.array([text]), np.arange(lengths[text]))
                found.append(self.compare_logits(answer.logits, index))
                units.append(self.state_errors(answer.states, index).amax(1).numpy())
            self.eager, self.eager_units = LogitDifferences.join(found), np.max(units, axis=0)
        self.limits = layer_limits(self.eager_units, len(self._states), dtype)
        """[num_states] what each hidden state may differ by, in units of roundoff."""
        if max_mean_kl is not None:
            self.limits[1:] = np.inf

    def _ask(self, reference: Reference, watched: Sequence[int], what: str, tell: Tell) -> list[Answers]:
        answers = []
        for text in watched:
            tell(what, 0)
            answers.append(reference.answers(self._texts[text].token_ids))
            tell(what, len(self._texts[text].token_ids))
        return answers

    @property
    def num_states(self) -> int:
        """The embedding, each layer, the final norm."""
        return len(self._states)

    def index(self, texts: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]) -> IntArray:
        """Return the numbers of positions of texts that are watched."""
        numbers: IntArray = self._starts[texts] + positions
        return numbers

    def compare_logits(self, logits: torch.Tensor, index: IntArray) -> LogitDifferences:
        """Compare [n, vocab_size] logits with the reference's at n positions."""
        parts = [slice(i, i + LOGITS_ROWS) for i in range(0, len(index), LOGITS_ROWS)]
        return LogitDifferences.join(
            [compare_logits(logits[part], self._logits[index[part]], self._next_ids[index[part]]) for part in parts]
        )

    def state_errors(self, states: Sequence[torch.Tensor], index: IntArray) -> torch.Tensor:
        """Return [num_states, n] errors of hidden states [n, H], in units of roundoff, on the CPU."""
        unit = unit_of(self._dtype)
        pairs = zip(states, self._states, strict=True)
        return torch.stack([row_errors(found, exact[index].to(found.device), unit) for found, exact in pairs]).cpu()

    def margin(self, text: int, position: int) -> float | None:
        """Return the reference's gap between its two likeliest tokens; None where the text is not watched."""
        if not self.is_watched[text]:
            return None
        first, second = self._logits[self._starts[text] + position].topk(2).values.tolist()
        return float(first - second)
