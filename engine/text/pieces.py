"""This module holds what one token id stands for in the text. It does not know sequences of tokens or when they end.

A tokenizer's decoder is read once into a `DecoderSpec`. Two kinds of piece exist: bytes (byte-level BPE, where a
character may be spread over tokens) and text with single bytes between (SentencePiece with byte fallback).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

__all__ = ["BytePieces", "DecoderSpec", "TextPieces"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SUPPORTED = "ByteLevel, Metaspace, none, or a sequence of Replace, ByteFallback, Fuse, Strip in this order"


def _byte_alphabet() -> dict[str, int]:
    """Map each character of GPT-2's byte alphabet to its byte: printable Latin-1 is itself, the rest follows U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """How a list of tokens becomes text.

    `byte_level`: tokens are spelled in the byte alphabet, everything else is unused. Otherwise `replacements` are made
    in each token, `<0xNN>` is a byte where `byte_fallback`, `joiner` stands between tokens, `drop_first` is a character
    left out of the first token, and up to `strip_count` leading `strip` characters of the whole text are dropped.
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    joiner: str = ""
    drop_first: str = ""
    strip: str = ""
    strip_count: int = 0

    @classmethod
    def parse(cls, decoder: Mapping[str, Any] | None) -> DecoderSpec:
        """Read the `decoder` part of a tokenizer.json.

        Raises:
            ValueError: the decoder is none of the supported ones.
        """
        if decoder is None:
            return cls(joiner=" ")
        kind = decoder.get("type")
        if kind == "ByteLevel":
            return cls(byte_level=True)
        if kind == "Metaspace":
            mark = decoder["replacement"]
            first = "" if decoder.get("prepend_scheme", "always") == "never" else mark
            return cls(replacements=((mark, " "),), drop_first=first)
        steps = decoder["decoders"] if kind == "Sequence" else [decoder]
        if [step.get("type") for step in steps] == ["ByteLevel"]:
            return cls(byte_level=True)
        return cls._parse_steps(steps)

    @classmethod
    def _parse_steps(cls, steps: list[Mapping[str, Any]]) -> DecoderSpec:
        order = ("Replace", "ByteFallback", "Fuse", "Strip")
        kinds = [step.get("type") for step in steps]
        stages = [order.index(kind) if kind in order else -1 for kind in kinds]
        if -1 in stages or stages != sorted(stages) or any(kinds.count(kind) > 1 for kind in order[1:]):
            raise ValueError(f"decoder {kinds} is not supported; supported: {_SUPPORTED}")
        replacements: list[tuple[str, str]] = []
        strip, strip_count = "", 0
        for step in steps:
            if step["type"] == "Replace":
                if "String" not in step["pattern"] or not step["pattern"]["String"]:
                    raise ValueError("a decoder that replaces by regular expression is not supported")
                replacements.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "Strip":
                if step["stop"] or "Fuse" not in kinds:
                    raise ValueError("a decoder that strips anything but the start of the text is not supported")
                strip, strip_count = step["content"], step["start"]
        return cls(
            replacements=tuple(replacements),
            byte_fallback="ByteFallback" in kinds,
            strip=strip,
            strip_count=strip_count,
        )


class BytePieces(dict[int, bytes]):
    """Token id -> the bytes it stands for; filled on first use, so that loading costs nothing. Skipped ids are b""."""

    def __init__(self, backend: Backend, skipped: frozenset[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self.texts: dict[int, str] = {}
        """The same as text, of the ids asked for so far whose bytes are whole characters."""

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""  # not stored: ids beyond the vocabulary are unbounded in number
        if token_id in self._skipped:
            piece = b""
        else:
            # A token with one character outside the alphabet stands for its own UTF-8, as the backend has it.
            spelled = [_BYTE_OF.get(char, -1) for char in token]
            piece = token.encode() if -1 in spelled else bytes(spelled)
        self[token_id] = piece
        with suppress(UnicodeDecodeError):
            self.texts[token_id] = piece.decode()
        return piece


class TextPieces(dict[int, "str | int | None"]):
    """Token id -> its text, its byte where it is a fallback byte, or None where it is skipped; filled on first use."""

    def __init__(self, backend: Backend, skipped: frozenset[int], spec: DecoderSpec) -> None:
        self._backend = backend
        self._skipped = skipped
        self.spec = spec

    def __missing__(self, token_id: int) -> str | int | None:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return None
        piece: str | int | None = None
        if token_id not in self._skipped:
            piece = self._piece(token)
        self[token_id] = piece
        return piece

    def _piece(self, token: str) -> str | int:
        for old, new in self.spec.replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token) if self.spec.byte_fallback else None
        return int(match[1], 16) if match else token

    def first(self, token_id: int) -> str:
        """Return the text of a token that opens the text, which some decoders spell differently."""
        token = self._backend.id_to_token(token_id)
        assert token is not None, "only a token that has a piece can be first"
        return str(self._piece(token.replace(self.spec.drop_first, "") if self.spec.drop_first else token))
