"""This module holds log-probabilities in the three shapes clients know. It does not know where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..step import LogprobEntry
from ..text import Tokenizer
from ..text.detokenizer import Detokenizer
from ..text.pieces import BytePieces

__all__ = ["CompletionLogprobs", "Offsets", "TokenTexts", "chat_logprobs", "prompt_logprobs"]

_LOWEST = -9999.0
"""For -inf, which JSON does not have; OpenAI's number."""


class TokenTexts:
    """What single tokens look like.

    Args:
        tokenizer: None shows ids.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._pieces = None if tokenizer is None else tokenizer.pieces(False)

    def raw(self, token_id: int) -> bytes | None:
        """Return the bytes a token stands for; None without a tokenizer."""
        if self._pieces is None:
            return None
        if isinstance(self._pieces, BytePieces):
            return self._pieces[token_id]
        piece = self._pieces[token_id]
        return bytes((piece,)) if isinstance(piece, int) else (piece or "").encode()

    def text(self, token_id: int) -> str:
        """Return the text of a token by itself; bytes that are no character become U+FFFD."""
        raw = self.raw(token_id)
        return f"token_id:{token_id}" if raw is None else raw.decode(errors="replace")

    def offsets(self, skip_special_tokens: bool, start: int = 0) -> Offsets:
        """Return what tells where in a text its tokens stand."""
        return Offsets(self._tokenizer, skip_special_tokens, start)


class Offsets:
    """Where in a text each token begins: as many characters are complete before it.

    Args:
        tokenizer: None has no texts.
        skip_special_tokens: whether the text leaves them out.
        start: where the first token stands.
    """

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool, start: int) -> None:
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, skip_special_tokens)
        self._position = start

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Take the next tokens and return where they begin."""
        offsets: list[int] = []
        for token_id in token_ids:
            offsets.append(self._position)
            if self._detokenizer is not None:
                self._position += len(self._detokenizer.append([token_id]))
        return offsets


def chat_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], entries: Sequence[LogprobEntry], num_top: int
) -> dict[str, Any]:
    """Return the log-probabilities of some tokens of a chat answer."""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        raw = texts.raw(token_id)
        return {
            "token": texts.text(token_id),
            "logprob": max(logprob, _LOWEST),
            "bytes": None if raw is None else list(raw),
        }

    content = [
        shown(token_id, entry.logprob)
        | {"top_logprobs": [shown(*top) for top in zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False)]}
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion: four lists by token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def add(
        self,
        texts: TokenTexts,
        token_ids: Sequence[int],
        entries: Sequence[LogprobEntry | None],
        num_top: int,
        offsets: Sequence[int],
    ) -> None:
        """Append tokens.

        Args:
            texts: what they look like.
            token_ids: the tokens.
            entries: one for each; None for a prompt's first, which nothing predicts.
            num_top: how many top tokens to show, besides the one that is there.
            offsets: where in the text each begins; may be longer.
        """
        for token_id, entry, offset in zip(token_ids, entries, offsets, strict=False):
            self.tokens.append(texts.text(token_id))
            self.text_offset.append(offset)
            if entry is None:
                self.token_logprobs.append(None)
                self.top_logprobs.append(None)
                continue
            self.token_logprobs.append(max(entry.logprob, _LOWEST))
            top: dict[str, float] = {}
            ranked = [*zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False), (token_id, entry.logprob)]
            for other_id, logprob in ranked:
                # Different tokens may look the same alone; the likelier one, which comes first, has the name.
                top.setdefault(texts.text(other_id), max(logprob, _LOWEST))
            self.top_logprobs.append(top)


def prompt_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], entries: Sequence[LogprobEntry | None], num_top: int
) -> list[dict[str, Any] | None]:
    """Return the log-probabilities of a prompt: for each position, by token id, those of its token and the top ones."""

    def shown(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, _LOWEST), "rank": rank, "decoded_token": texts.text(token_id)}

    positions: list[dict[str, Any] | None] = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is None:
            positions.append(None)
            continue
        ranked = zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False)
        position = {str(other): shown(other, logprob, rank) for rank, (other, logprob) in enumerate(ranked, 1)}
        position[str(token_id)] = shown(token_id, entry.logprob, entry.rank)
        positions.append(position)
    return positions
