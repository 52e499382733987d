"""This module holds a row's rare features: which tokens it may not sample, and which it rather would. It does not know
how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from octavo.kernels.sampling import AllowedTokens, BannedTokens, LogitBias

from ..sampling_params import SamplingParams
from ..step import Grammar, RowError
from .row_grammar import MaskWorkers, RowGrammar
from .row_settings import upload
from .staging import Staging

__all__ = ["PlacedExtras", "RowExtras", "make_extras", "upload_extras"]

IntArray = npt.NDArray[np.integer[Any]]

NOTHING_LEFT: Final = "no token is left to sample: what allowed_token_ids and structured_outputs allow here is banned"


@dataclass(slots=True, eq=False)
class RowExtras:
    """A row's rare features. Token ids are int64 arrays."""

    bitmask: npt.NDArray[np.int32] | None
    """[ceil(vocab_size / 32)] of the allowed tokens; None: all are."""
    bias: tuple[IntArray, npt.NDArray[np.float32]] | None
    stops: IntArray
    """Banned at positions below `stops_from`."""
    stops_from: int
    banned: IntArray
    """Bad words of one token."""
    bad_endings: list[tuple[list[int], int]]
    """Bad words of several: all but the last token, and the last."""
    tail: list[int]
    """The latest tokens of the sequence, as many as a bad ending looks back."""
    max_tail: int
    grammar: RowGrammar | None
    num_awaited: int = 0
    """Draws of a row that looks back which have been launched and not been waited for: 0 or 1."""

    @property
    def looks_back(self) -> bool:
        """Whether what may be sampled depends on tokens that the host must know."""
        return self.grammar is not None or self.max_tail > 0

    @property
    def has_limits(self) -> bool:
        """Whether anything may not be sampled, so that nothing may be left."""
        return (
            not (self.bitmask is None and self.grammar is None)
            or bool(self.bad_endings)
            or (len(self.stops) + len(self.banned) > 0)
        )

    @property
    def error(self) -> RowError:
        """Why no token was left to sample."""
        detail = self.grammar.error if self.grammar is not None else ""
        if detail:
            return RowError(f"structured_outputs cannot go on: {detail}", "structured_outputs")
        limits = {"allowed_token_ids": self.bitmask, "structured_outputs": self.grammar}
        given = [name for name, limit in limits.items() if limit is not None]
        return RowError(NOTHING_LEFT, (*given, "bad_words")[0])

    def banned_at(self, position: int) -> list[IntArray]:
        """Return the tokens not to be sampled at a position."""
        found = [self.stops, self.banned] if position < self.stops_from else [self.banned]
        endings = [last for before, last in self.bad_endings if self.tail[-len(before) :] == before]
        if endings:
            found.append(np.array(endings, dtype=np.int64))
        return found

    def append(self, token_id: int, position: int, workers: MaskWorkers) -> bool:
        """Remember the token sampled at a position, where a later one depends on it; return whether it is the last."""
        if self.max_tail:
            self.tail.append(token_id)
            del self.tail[: -self.max_tail]
        return self.grammar is not None and self.grammar.accept(token_id, position, workers)


class PlacedExtras(NamedTuple):
    """Extras of a row of a batch."""

    at: int
    """Position in the batch."""
    row: int
    extras: RowExtras


def make_extras(
    params: SamplingParams,
    grammar: Grammar | None,
    prompt_token_ids: Sequence[int] | IntArray,
    output_token_ids: Sequence[int] | IntArray,
    stop_token_ids: Collection[int],
    vocab_size: int,
) -> RowExtras | None:
    """Return the rare features of a sequence; None: it has none."""
    stops_early = params.min_tokens > len(output_token_ids) and len(stop_token_ids) > 0
    has_lists = params.logit_bias or params.allowed_token_ids or params.bad_words_token_ids
    if not (has_lists or stops_early or grammar is not None):
        return None
    bitmask = bias = None
    if params.allowed_token_ids is not None:
        ids = np.unique(np.asarray(params.allowed_token_ids, dtype=np.int64))
        bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.bool_)
        bits[ids] = True
        bitmask = np.packbits(bits, bitorder="little").view(np.int32)
    if params.logit_bias:
        values = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        bias = (np.fromiter(params.logit_bias.keys(), dtype=np.int64), values)
    endings = [(list(ids[:-1]), ids[-1]) for ids in params.bad_words_token_ids if len(ids) > 1]
    max_tail = max((len(before) for before, _ in endings), default=0)
    tail = [int(token_id) for token_id in output_token_ids[-max_tail:]] if max_tail else []
    if missing := max_tail - len(tail):
        tail = [int(token_id) for token_id in prompt_token_ids[-missing:]] + tail
    extras = RowExtras(
        bitmask=bitmask,
        bias=bias,
        stops=np.array(sorted(stop_token_ids), dtype=np.int64),
        stops_from=len(prompt_token_ids) + params.min_tokens,
        banned=np.array([ids[0] for ids in params.bad_words_token_ids if len(ids) == 1], dtype=np.int64),
        bad_endings=endings,
        tail=tail,
        max_tail=max_tail,
        grammar=None,
    )
    if grammar is not None:
        extras.grammar = RowGrammar(
            grammar.start([int(token_id) for token_id in output_token_ids]),
            vocab_size=vocab_size,
            stops=extras.stops,
            stops_from=extras.stops_from,
            allowed=bitmask,
        )
    return extras


def upload_extras(
    placed: Sequence[PlacedExtras], positions: IntArray, staging: Staging
) -> tuple[AllowedTokens | None, BannedTokens | None, LogitBias | None]:
    """Return what rows of a batch may not sample and rather would.

    Args:
        placed: the rows.
        positions: [n] of the tokens to sample, for the whole batch.
        staging: brings it to the device.
    """
    allowed: list[tuple[int, npt.NDArray[np.int32]]] = []
    banned: list[tuple[int, IntArray]] = []
    bias: list[tuple[int, IntArray, npt.NDArray[np.float32]]] = []
    for at, _, extras in placed:
        if extras.grammar is not None:
            allowed.append((at, extras.grammar.mask(int(positions[at]))))
        elif extras.bitmask is not None:
            allowed.append((at, extras.bitmask))
        if extras.bias is not None:
            bias.append((at, *extras.bias))
        banned += [(at, ids) for ids in extras.banned_at(int(positions[at])) if len(ids)]
    allow = AllowedTokens(*upload(staging, *_columns(allowed, np.stack))) if allowed else None
    ban = BannedTokens(*upload(staging, *_columns(banned))) if banned else None
    return allow, ban, LogitBias(*upload(staging, *_columns(bias))) if bias else None


def _columns(entries: Sequence[tuple[Any, ...]], join: Any = np.concatenate) -> list[npt.NDArray[Any]]:
    """Return the positions in the batch, one for each token or bitmask, and each column of what stands there."""
    places, *columns = zip(*entries, strict=True)
    joined = [join(column) for column in columns]
    lengths = [1] * len(places) if join is np.stack else [len(ids) for ids in columns[0]]
    return [np.repeat(np.array(places, dtype=np.int64), lengths), *joined]
