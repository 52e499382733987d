"""This module holds the tokenizers that a GGUF file's metadata describes. It does not know how the file is read.

Two kinds exist: "gpt2" is byte-level BPE with a list of merges, where `tokenizer.ggml.pre` names how text is split into
words first; "llama" is SentencePiece BPE, whose merges follow from the scores of its pieces.
The names of `pre` are those of llama.cpp (https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..errors import CheckpointError

__all__ = ["GgufVocab", "build_gguf_vocab"]

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Values of tokenizer.ggml.token_type; 1 is a normal piece, 5 an unused one."""

_MAX_PIECE_CHARS = 1024
"""Deriving merges tries every cut of every piece; the longest pieces of real vocabularies have some hundred."""

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How byte-level BPE cuts text into words: one regular expression after the other, each on what the last left."""

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    """A word that is itself a token is taken as it is, without merging."""
    adds_bos: bool = False
    """What holds where the file does not say."""


_GPT2 = _Split((_GPT2_SPLIT,))
_DIGITS = _Split((r"\p{N}", _GPT2_SPLIT))
_LLAMA3 = _Split((_WORD_SPLIT.replace("DIGITS", r"\p{N}{1,3}"),), whole_words=True, adds_bos=True)
_QWEN2 = _Split((_WORD_SPLIT.replace("DIGITS", r"\p{N}"),), nfc=True)
_TEKKEN = _Split((_TEKKEN_SPLIT,), whole_words=True, adds_bos=True)
_DEFAULT = _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"))

_SPLITS = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """A tokenizer as built, and what else the metadata says of it. Ids are indices into the file's list of tokens."""

    backend: Backend
    named_ids: Mapping[str, int]
    """bos_token, eos_token, unk_token, pad_token, where the file names them."""
    add_bos: bool
    add_eos: bool


class _Metadata:
    """Checked access to the tokenizer's keys: every complaint is a CheckpointError that names the key."""

    def __init__(self, metadata: Mapping[str, Any], file: str) -> None:
        self._metadata = metadata
        self.file = file

    def fail(self, key: str, reason: str) -> CheckpointError:
        return CheckpointError(self.file, f"tokenizer.ggml.{key} {reason}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(key, f"is of type {type(value).__name__}; expected {kind.__name__}")
        return value

    def get_list(self, key: str, kind: type | tuple[type, ...], length: int | None = None) -> list[Any]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not len(value):
            raise self.fail(key, "is missing, empty or not a list")
        items = list(value)
        if not all(isinstance(item, kind) for item in items):
            raise self.fail(key, "holds values of a wrong type")
        if length is not None and len(items) != length:
            raise self.fail(key, f"has {len(items)} values for {length} tokens")
        return items


def build_gguf_vocab(metadata: Mapping[str, Any], file: str) -> GgufVocab:
    """Build the tokenizer a GGUF file describes.

    Args:
        metadata: the file's keys and values; lists as Python lists.
        file: the file's name, for errors.

    Raises:
        CheckpointError: a key is missing, contradicts another or names something not supported.
    """
    keys = _Metadata(metadata, file)
    kind = keys.get("model", str)
    if kind not in ("gpt2", "llama"):
        raise keys.fail("model", f"is {kind!r}; supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)")
    tokens: list[str] = keys.get_list("tokens", str)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise keys.fail("tokens", f"names {len(tokens) - len(vocab)} tokens twice")
    types = [1] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = keys.get_list("token_type", int, len(tokens))
    named_ids = _named_ids(keys, len(tokens))
    if kind == "gpt2":
        backend, adds_bos = _byte_level(keys, vocab)
    else:
        backend, adds_bos = _sentence_piece(keys, vocab, tokens, types, named_ids.get("unk_token", 0)), True
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ in (_CONTROL, _UNKNOWN) and token]
    plain = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _USER_DEFINED and token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return GgufVocab(
        backend=backend,
        named_ids=named_ids,
        add_bos=keys.get("add_bos_token", bool, adds_bos) and "bos_token" in named_ids,
        add_eos=keys.get("add_eos_token", bool, False) and "eos_token" in named_ids,
    )


def _named_ids(keys: _Metadata, num_tokens: int) -> dict[str, int]:
    names = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    found: dict[str, int] = {}
    for name, key in names.items():
        token_id = keys.get(key, int)
        if token_id is None:
            continue
        if not 0 <= token_id < num_tokens:
            raise keys.fail(key, f"is {token_id}; allowed: 0 to {num_tokens - 1}")
        found[name] = token_id
    return found


def _byte_level(keys: _Metadata, vocab: dict[str, int]) -> tuple[Backend, bool]:
    pre = keys.get("pre", str, "default")
    split = _SPLITS.get(pre)
    if split is None:
        raise keys.fail("pre", f"is {pre!r}; supported: {', '.join(sorted(_SPLITS))}")
    merges: list[tuple[str, str]] = []
    for merge in keys.get_list("merges", str):
        left, _, right = merge.partition(" ")
        if not left or not right or left + right not in vocab or left not in vocab or right not in vocab:
            raise keys.fail("merges", f"holds {merge[:80]!r}, which joins no two tokens to a third")
        merges.append((left, right))
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, split.adds_bos


def _sentence_piece(
    keys: _Metadata, vocab: dict[str, int], tokens: list[str], types: list[int], unk_id: int
) -> Backend:
    scores = keys.get_list("scores", (int, float), len(tokens))
    if not all(math.isfinite(score) for score in scores):
        raise keys.fail("scores", "holds a value that is not finite")
    longest = max(map(len, tokens))
    if longest > _MAX_PIECE_CHARS:
        raise keys.fail("tokens", f"holds a piece of {longest} characters; allowed: {_MAX_PIECE_CHARS}")
    mergeable = {
        token: index for token, index in vocab.items() if token and types[index] not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    merges = _merges_of_scores(mergeable, scores)
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, unk_token=tokens[unk_id], fuse_unk=True, byte_fallback=True)
    )
    add_space = keys.get("add_space_prefix", bool, True)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_of_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """List the merges SentencePiece would make, best first: a pair ranks by the score of the piece it forms.

    Source: Sennrich et al. 2016 as in https://github.com/google/sentencepiece (bpe_model.cc): the adjacent pair whose
    joined piece has the highest score is joined first.
    """
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], index, -cut, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
