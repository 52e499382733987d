"""This module holds the step from text to token ids and back. It does not know messages, templates or streams.

Special tokens in a prompt are parsed as such, except where the caller says that a span of the text is plain: there the
text of a special token is only text. For that a second backend exists in which control tokens have secret names.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ..errors import CheckpointError, RequestError
from .gguf_vocab import build_gguf_vocab
from .pieces import BytePieces, DecoderSpec, TextPieces
from .tokenizer_files import TOKENIZER, read_tokenizer_files

__all__ = ["Tokenizer", "TokenizerParts"]

_LOOKS_LIKE_CONTROL = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
"""Some checkpoints (DeepSeek's among them) do not flag the tokens that open a turn as special."""


class TokenizerParts(NamedTuple):
    """Everything a `Tokenizer` is built from, in plain values that another process can take."""

    backend: str
    """The tokenizers library's own JSON."""
    named_tokens: dict[str, str]
    prefix: list[int]
    suffix: list[int]
    chat_template: str | None


class Tokenizer:
    """Turns text into token ids and back.

    Attributes:
        vocab_size: the largest id + 1; the logits may be wider.
        longest_token: characters of the longest entry of the vocabulary; no token stands for more text.
        bos_token_id, eos_token_id: or None.
        special_token_ids: what `decode` leaves out with `skip_special_tokens`.
        control_tokens: text -> id of the tokens that structure a prompt: the special ones and those that look so.
        named_tokens: the texts of bos_token, eos_token, unk_token, pad_token, where there are such; for templates.
        chat_template: the Jinja source that came with the tokenizer, or None.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        named_tokens: Mapping[str, str] | None = None,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        chat_template: str | None = None,
        source: str = "tokenizer",
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {})
        self._spec = _decoder_spec(backend, source)
        vocab = backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise CheckpointError(source, "the tokenizer has no tokens")
        self.vocab_size = max(vocab.values()) + 1
        self.longest_token = max(map(len, vocab))
        for name in ("bos_token", "eos_token"):
            text = self.named_tokens.get(name)
            if text is not None and text not in vocab:
                raise CheckpointError(source, f"{name} {text[:80]!r} is not in the vocabulary")
        # A named token that is an ordinary entry of the vocabulary must be found in text as a whole, too.
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        missing = [text for text in self.named_tokens.values() if text and text in vocab and text not in added]
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])
        self.bos_token_id: int | None = vocab.get(self.named_tokens.get("bos_token", ""))
        self.eos_token_id: int | None = vocab.get(self.named_tokens.get("eos_token", ""))
        tokens = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in tokens.items() if token.special)
        self.control_tokens: dict[str, int] = {
            token.content: token_id
            for token_id, token in tokens.items()
            if token.content and (token.special or _LOOKS_LIKE_CONTROL.fullmatch(token.content))
        }
        self._pieces: dict[bool, BytePieces | TextPieces] = {}

    @classmethod
    def from_parts(cls, parts: TokenizerParts) -> Tokenizer:
        """Build the tokenizer that `parts` was called on, once more."""
        return cls(
            Backend.from_str(parts.backend),
            named_tokens=parts.named_tokens,
            prefix=parts.prefix,
            suffix=parts.suffix,
            chat_template=parts.chat_template,
        )

    def parts(self) -> TokenizerParts:
        """Return what this tokenizer is built from."""
        return TokenizerParts(self._backend.to_str(), self.named_tokens, self._prefix, self._suffix, self.chat_template)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, and beside it tokenizer_config.json and chat_template.jinja where there are such.

        Raises:
            CheckpointError: a file is missing, too large, damaged or asks for something not supported.
        """
        files = read_tokenizer_files(Path(path))
        with _damage_of(TOKENIZER):
            backend = Backend.from_buffer(files.tokenizer)
            if getattr(backend.model, "dropout", None):
                raise CheckpointError(TOKENIZER, "the model has a dropout, which would make encoding random")
            prefix, suffix = _additions(backend)
        return cls(
            backend,
            named_tokens=files.named_tokens,
            prefix=prefix,
            suffix=suffix,
            chat_template=files.chat_template,
            source=TOKENIZER,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, file: str = "gguf") -> Tokenizer:
        """Build the tokenizer that a GGUF file's metadata describes.

        Args:
            metadata: GGUF key -> Python value; arrays as lists.
            file: the file's name, for errors.

        Raises:
            CheckpointError: the description is damaged or names something not supported.
        """
        with _damage_of(file):
            vocab = build_gguf_vocab(metadata, file)
            ids = vocab.named_ids
            template = metadata.get("tokenizer.chat_template")
            if template is not None and not isinstance(template, str):
                raise CheckpointError(file, "tokenizer.chat_template is not a string")
            return cls(
                vocab.backend,
                named_tokens={name: metadata["tokenizer.ggml.tokens"][token_id] for name, token_id in ids.items()},
                prefix=[ids["bos_token"]] if vocab.add_bos else [],
                suffix=[ids["eos_token"]] if vocab.add_eos else [],
                chat_template=template,
                source=file,
            )

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = True,
        parse_special: bool = True,
        plain_spans: Sequence[tuple[int, int]] = (),
    ) -> list[int]:
        """Encode one text.

        Args:
            text: any text without lone surrogates.
            add_bos: add what the tokenizer puts around a text (BOS, if it adds one; never a second one).
            parse_special: the text of a special token is that token.
            plain_spans: [start, end) in characters, ascending and disjoint: no special token that touches one of them
                is parsed; everything else is as if the text were encoded as a whole.

        Raises:
            RequestError: the text is no valid Unicode.
        """
        return self.encode_batch([text], add_bos=add_bos, parse_special=parse_special, plain_spans=[plain_spans])[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_bos: bool = True,
        parse_special: bool = True,
        plain_spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> list[list[int]]:
        """Encode several texts at once, each as `encode` would; `plain_spans` has one entry per text."""
        for text in texts:
            _check_text(text)
        if parse_special and not any(plain_spans or ()):
            backend, inputs = self._backend, list(texts)
        else:
            backend, secret_names = self._renamed
            spans = plain_spans or [()] * len(texts)
            inputs = list(texts)
            if parse_special:
                inputs = [
                    self._name_controls(text, spans_of_text, secret_names)
                    for text, spans_of_text in zip(texts, spans, strict=True)
                ]
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(inputs, add_special_tokens=False)]
        return [self._surround(ids) for ids in encoded] if add_bos else encoded

    def special_in(self, text: str) -> str | None:
        """Return a control token whose text `encode` takes as that token, or None where there is none in this text.

        Raises:
            RequestError: the text is no valid Unicode.
        """
        parsed, plain = (self.encode(text, add_bos=False, parse_special=each) for each in (True, False))
        if parsed == plain:
            return None
        texts = {token_id: control for control, token_id in self.control_tokens.items()}
        # An unknown token that both have stands for a character that has none.
        return next((texts[token_id] for token_id in Counter(parsed) - Counter(plain) if token_id in texts), None)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of some ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            RequestError: an id is negative or beyond the vocabulary.
        """
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            raise RequestError(
                f"a token id is outside the vocabulary; allowed: 0 to {self.vocab_size - 1}", "token_ids"
            )
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token by its exact spelling in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    def pieces(self, skip_special_tokens: bool) -> BytePieces | TextPieces:
        """Return the table from token id to what it stands for in the text; shared by all streams."""
        table = self._pieces.get(skip_special_tokens)
        if table is None:
            skipped = self.special_token_ids if skip_special_tokens else frozenset()
            table = (
                BytePieces(self._backend, skipped)
                if self._spec.byte_level
                else TextPieces(self._backend, skipped, self._spec)
            )
            self._pieces[skip_special_tokens] = table
        return table

    def token_bytes(self) -> list[bytes]:
        """Return what each id stands for inside a text, special tokens included; b"" for ids that are no token."""
        pieces = self.pieces(skip_special_tokens=False)
        found: list[bytes] = []
        for token_id in range(self.vocab_size):
            piece = pieces[token_id]
            if isinstance(piece, str):
                piece = piece.encode()
            found.append(bytes((piece,)) if isinstance(piece, int) else piece or b"")
        return found

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """What finds a control token in text; the longest one wins. Matches nothing where there are none."""
        texts = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")

    @cached_property
    def _renamed(self) -> tuple[Backend, dict[str, str]]:
        """A copy of the backend in which every control token has a name no prompt can contain, and those names.

        The names hold 64 random bits and never leave this object, so that nobody can write one into a prompt.
        """
        nonce = secrets.token_hex(8)
        names = {text: f"\ufdd0{nonce}{token_id:x}\ufdd1" for text, token_id in self.control_tokens.items()}
        state = json.loads(self._backend.to_str())
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename_in_model(state["model"], names)
        backend = Backend.from_str(json.dumps(state))
        for text, token_id in self.control_tokens.items():
            assert backend.token_to_id(names[text]) == token_id, "a renamed token changed its id"
        return backend, names

    def _name_controls(self, text: str, plain_spans: Sequence[tuple[int, int]], names: Mapping[str, str]) -> str:
        parts: list[str] = []
        position = 0
        for start, end in (*plain_spans, (len(text), len(text))):
            assert position <= start <= end <= len(text), "plain spans are not ascending and disjoint"
            parts.append(self.control_pattern.sub(lambda match: names[match[0]], text[position:start]))
            parts.append(text[start:end])
            position = end
        return "".join(parts)

    def _surround(self, ids: list[int]) -> list[int]:
        has_bos = bool(self._prefix) and ids[:1] == self._prefix[:1]
        return (ids if has_bos else self._prefix + ids) + self._suffix


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        # A control token that merges could build would be reachable from plain text.
        model["merges"] = [
            pair for pair in model["merges"] if not (names.keys() & {pair[0], pair[1], pair[0] + pair[1]})
        ]


def _decoder_spec(backend: Backend, source: str) -> DecoderSpec:
    decoder = backend.decoder
    try:
        return DecoderSpec.parse(None if decoder is None else json.loads(decoder.__getstate__()))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(source, str(error)) from error


@contextmanager
def _damage_of(file: str) -> Iterator[None]:
    """Turn whatever the backend raises on bad input into a CheckpointError; it raises plain Exception, and panics."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(file, f"is damaged: {str(error)[:200]}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(file, "is damaged: the tokenizer library gave up on it") from error


def _additions(backend: Backend) -> tuple[list[int], list[int]]:
    """Return the ids the post-processor puts before and after a text.

    `add_bos_token` in tokenizer_config.json is not read: beside a tokenizer.json transformers ignores it as well.
    """
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    starts = [start for start in range(len(full)) if full[start : start + len(bare)] == bare]
    if not bare or not starts:
        return full, []
    return full[: starts[0]], full[starts[0] + len(bare) :]


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}", "prompt"
        ) from None
