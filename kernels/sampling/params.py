"""This module holds what the sampling ops take and return. It does not know how a token is chosen.

Whatever no row of a step asks for is None, so that a batch of greedy rows costs one argmax. Features that few rows use
are lists of (row, token) entries, or of rows, instead of dense [num_seqs, vocab_size] tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["AllowedTokens", "BannedTokens", "LogitBias", "LogprobOutput", "Penalties", "SampleOutput", "SampleParams"]


class AllowedTokens(NamedTuple):
    """Rows that may sample some tokens only."""

    rows: Tensor
    """[m] int64, positions in the batch, each once."""
    bitmask: Tensor
    """[m, ceil(vocab_size / 32)] int32: bit (id mod 32) of word (id div 32) is set where id is allowed."""


class BannedTokens(NamedTuple):
    """Tokens that one row must not sample; entries may repeat. As in all lists, an id that is none changes nothing."""

    rows: Tensor
    """[m] int64, positions in the batch."""
    token_ids: Tensor
    """[m] int64."""


class LogitBias(NamedTuple):
    """Numbers to add to single logits; each (row, token) at most once."""

    rows: Tensor
    """[m] int64, positions in the batch."""
    token_ids: Tensor
    """[m] int64."""
    values: Tensor
    """[m] float32."""


class Penalties(NamedTuple):
    """Rows whose logits depend on the tokens they have seen, and the state by persistent row that says which.

    The state lists the distinct tokens of prompt and output of each row, so it is as long as a sequence, not as a
    vocabulary; what lies past `num_seen` is never read.
    """

    rows: Tensor
    """[m] int64, positions in the batch, each once."""
    repetition: Tensor
    """[m] float32: divides positive and multiplies other logits of seen tokens; 1 is off."""
    presence: Tensor
    """[m] float32: taken from logits of tokens generated at least once; 0 is off."""
    frequency: Tensor
    """[m] float32: taken once for each time the token was generated; 0 is off."""
    state_rows: Tensor
    """[m] int64, rows of the three tensors below."""
    seen_ids: Tensor
    """[num_state_rows, capacity] int32, distinct within a row."""
    seen_counts: Tensor
    """[num_state_rows, capacity] int32: how often the token was generated; 0: it is in the prompt only."""
    num_seen: Tensor
    """[num_state_rows] int32."""


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How each row of a batch is sampled; [n] is the number of rows."""

    num_valid_ids: int | None = None
    """Ids from here on are never sampled and their logits never read; None: all are valid."""
    temperature: Tensor | None = None
    """[n] float32; 0 is greedy. None: every row is greedy, and the fields up to `position` are not read."""
    top_k: Tensor | None = None
    """[n] int32; 0 is off."""
    top_p: Tensor | None = None
    """[n] float64; 1 is off. The most probable token is kept in any case."""
    min_p: Tensor | None = None
    """[n] float64; 0 is off."""
    seed: Tensor | None = None
    """[n] int64, all 64 bits count. Given wherever temperature is."""
    choice: Tensor | None = None
    """[n] int32, which of the n choices of a request. Given wherever temperature is."""
    position: Tensor | None = None
    """[n] int64, index in its sequence of the token to sample. Given wherever temperature is."""
    allowed: AllowedTokens | None = None
    banned: BannedTokens | None = None
    bias: LogitBias | None = None
    penalties: Penalties | None = None

    def __post_init__(self) -> None:
        """Refuse a vocabulary without ids; raises ValueError."""
        if self.num_valid_ids is not None and self.num_valid_ids < 1:
            raise ValueError(f"num_valid_ids is {self.num_valid_ids}; it must be above 0, or None")

    @property
    def changes_logits(self) -> bool:
        """Whether any row's logits are changed before temperature."""
        return not (self.allowed is None and self.banned is None and self.bias is None and self.penalties is None)

    def rows(self, start: int, stop: int) -> SampleParams:
        """Return the parameters of the rows from start to stop, without copying those of each row."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        def inside(rows: Tensor) -> Tensor:
            return ((rows >= start) & (rows < stop)).nonzero().squeeze(-1)

        allowed, banned, bias, penalties = self.allowed, self.banned, self.bias, self.penalties
        if allowed is not None:
            at = inside(allowed.rows)
            allowed = AllowedTokens(allowed.rows[at] - start, allowed.bitmask[at]) if len(at) else None
        if banned is not None:
            at = inside(banned.rows)
            banned = BannedTokens(banned.rows[at] - start, banned.token_ids[at]) if len(at) else None
        if bias is not None:
            at = inside(bias.rows)
            bias = LogitBias(bias.rows[at] - start, bias.token_ids[at], bias.values[at]) if len(at) else None
        if penalties is not None:
            at = inside(penalties.rows)
            moved = {"rows": penalties.rows[at] - start, "state_rows": penalties.state_rows[at]}
            strengths = {name: getattr(penalties, name)[at] for name in ("repetition", "presence", "frequency")}
            penalties = penalties._replace(**moved, **strengths) if len(at) else None
        return SampleParams(
            num_valid_ids=self.num_valid_ids,
            temperature=cut(self.temperature),
            top_k=cut(self.top_k),
            top_p=cut(self.top_p),
            min_p=cut(self.min_p),
            seed=cut(self.seed),
            choice=cut(self.choice),
            position=cut(self.position),
            allowed=allowed,
            banned=banned,
            bias=bias,
            penalties=penalties,
        )


class SampleOutput(NamedTuple):
    """One token per row."""

    token_ids: Tensor
    """[n] int64; means nothing where the row failed."""
    failed: Tensor
    """[n] bool: the row has a NaN or +Inf among its logits, or no token that could be sampled."""


class LogprobOutput(NamedTuple):
    """Log-probabilities of each row."""

    top_values: Tensor
    """[n, num_top] float32 (float64 for float64 logits), descending."""
    top_ids: Tensor
    """[n, num_top] int64; of equal values the lowest id comes first."""
    values: Tensor | None
    """[n] as top_values, of the token ids asked for."""
    ranks: Tensor | None
    """[n] int64, how many tokens are at least as likely as it."""
