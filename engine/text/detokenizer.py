"""This module holds the streaming side of decoding: token ids in, stable text out. It does not know stop strings.

The pieces given out, joined, are exactly `Tokenizer.decode` of all the ids, for every sequence of ids. Text is held
back only while a later token could still change it: an unfinished UTF-8 character (byte-level), or a run of fallback
bytes (SentencePiece, where one bad byte turns the whole run into replacement characters). Work per token is constant.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from .pieces import BytePieces, TextPieces
from .tokenizer import Tokenizer

__all__ = ["Detokenizer"]

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
_BAD = "\ufffd"


class _Stream(Protocol):
    def append(self, token_ids: Sequence[int]) -> str: ...
    def resume(self, prompt_token_ids: Sequence[int]) -> None: ...
    def finish(self) -> str: ...


class _ByteStream:
    """Byte-level tokens: one incremental UTF-8 decoder over all bytes; most single tokens can do without."""

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._texts = pieces.texts
        self._utf8 = _Utf8Decoder("replace")
        self._is_inside = False
        """The bytes so far end within a character."""

    def append(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not self._is_inside:
            text = self._texts.get(token_ids[0])
            if text is not None:
                return text
        return self._decode(b"".join([self._pieces[token_id] for token_id in token_ids]))

    def _decode(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        self._is_inside = self._utf8.getstate()[0] != b""
        return text

    def resume(self, prompt_token_ids: Sequence[int]) -> None:
        # An unfinished character is at most three bytes long and opens with a byte that starts a character anywhere.
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._pieces[token_id] + tail
            if len(tail) >= 3:
                break
        self._decode(tail)

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class _TextStream:
    """Text tokens with runs of fallback bytes between them.

    While a run is valid UTF-8 so far, its bytes wait; once it cannot be valid any more, each of its bytes is one
    replacement character, at once.
    """

    def __init__(self, pieces: TextPieces) -> None:
        self._pieces = pieces
        self._strip_left = pieces.spec.strip_count
        self._is_first = bool(pieces.spec.joiner or pieces.spec.drop_first)
        self._run_length = 0
        self._run_is_bad = False
        self._run_text: list[str] = []
        self._utf8 = _Utf8Decoder("strict")

    def append(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not (self._run_length or self._is_first or self._strip_left):
            piece = self._pieces[token_ids[0]]
            if isinstance(piece, str):
                return self._pieces.spec.joiner + piece
        parts: list[str] = []
        for token_id in token_ids:
            piece = self._pieces[token_id]
            if piece is None:
                continue
            if isinstance(piece, int):
                self._append_byte(piece, parts)
                continue
            if self._run_length:
                parts.append(self._end_run())
            if self._is_first:
                parts.append(self._pieces.first(token_id))
                self._is_first = False
            else:
                parts.append(self._pieces.spec.joiner + piece)
        return self._strip("".join(parts))

    def _append_byte(self, byte: int, parts: list[str]) -> None:
        self._run_length += 1
        if self._run_is_bad:
            parts.append(_BAD)
            return
        try:
            self._run_text.append(self._utf8.decode(bytes((byte,))))
        except UnicodeDecodeError:
            self._run_is_bad = True
            parts.append(_BAD * self._run_length)

    def _end_run(self) -> str:
        was_bad, length = self._run_is_bad, self._run_length
        pending = self._utf8.getstate()[0]
        text = _BAD * length if pending else "".join(self._run_text)
        self._utf8.reset()
        self._run_length, self._run_is_bad, self._run_text = 0, False, []
        return "" if was_bad else text

    def _strip(self, text: str) -> str:
        if not self._strip_left or not text:
            return text
        rest = text
        while self._strip_left and rest.startswith(self._pieces.spec.strip):
            rest = rest[1:]
            self._strip_left -= 1
        if rest:
            self._strip_left = 0
        return rest

    def resume(self, prompt_token_ids: Sequence[int]) -> None:
        # The opening of the text has rules of its own; past it, only the last run of bytes matters.
        opened = 0
        while opened < len(prompt_token_ids) and (self._is_first or self._strip_left):
            self.append(prompt_token_ids[opened : opened + 1])
            opened += 1
        start = len(prompt_token_ids)
        while start > opened:
            start -= 1
            if isinstance(self._pieces[prompt_token_ids[start]], str):
                break
        self.append(prompt_token_ids[start:])

    def finish(self) -> str:
        return self._strip(self._end_run()) if self._run_length else ""


class Detokenizer:
    """Turns the token ids of one sequence into text as they come.

    Args:
        tokenizer: whose ids they are.
        skip_special_tokens: leave special tokens out of the text.
        prompt_token_ids: what stands before the first id given to `append`: the text then continues the prompt's, so
            that a leading space is kept and a character begun in the prompt is finished.
    """

    __slots__ = ("_stream",)

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        pieces = tokenizer.pieces(skip_special_tokens)
        self._stream: _Stream = _ByteStream(pieces) if isinstance(pieces, BytePieces) else _TextStream(pieces)
        if prompt_token_ids:
            self._stream.resume(prompt_token_ids)

    def append(self, token_ids: Sequence[int]) -> str:
        """Take the next ids and return the text that no later id can change; often empty within a character."""
        return self._stream.append(token_ids)

    def finish(self) -> str:
        """Return the text held back; what is unfinished becomes U+FFFD. Nothing may be appended afterwards."""
        return self._stream.finish()
