"""This module holds SmolLM2-135M against transformers, teacher-forced at every position of real texts. It does not know
sampling or scheduling.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from octavo.engine.loader import resolve_model
from octavo.engine.models.decoder import Decoder
from octavo.engine.text import Tokenizer

from ..smollm2 import load_prompts, load_reference, spread
from .teacher import load_decoder, random_chunks, teacher_forced_logits

NAME = "smollm2-135m"
BOUND = 1e-4
"""Of the standard deviation of the logits."""
CLEAR_GAP = 1e-3
"""Between the two likeliest tokens: above it the likeliest must be the same."""


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_decoder(NAME)


@pytest.fixture(scope="module")
def texts(count: Callable[[int, int], int]) -> list[list[int]]:
    metadata = resolve_model(NAME).tokenizer_metadata
    assert metadata is not None
    tokenizer = Tokenizer.from_gguf(metadata, file=NAME)
    prompts = load_prompts()
    return [tokenizer.encode(prompt) for prompt in spread(prompts, min(len(prompts), count(4, 40)))]


@pytest.fixture(scope="module")
def expected(texts: list[list[int]]) -> list[torch.Tensor]:
    reference = load_reference()
    with torch.inference_mode():
        return [reference(torch.tensor([text])).logits[0] for text in texts]


@pytest.mark.parametrize("chunked", [False, True])
def test_logits_at_every_position(
    chunked: bool, decoder: Decoder, texts: list[list[int]], expected: list[torch.Tensor]
) -> None:
    rng = random.Random(0)
    chunks = random_chunks(texts, rng, longest=100) if chunked else None
    found = teacher_forced_logits(decoder, texts, chunks, rng=rng)
    for text, ours, theirs in zip(texts, found, expected, strict=True):
        difference = (ours - theirs).abs().max() / theirs.std()
        assert difference <= BOUND, f"{len(text)} tokens from {text[:5]}: {difference:.1e} of a standard deviation"
        top = theirs.topk(2).values
        clear = top[:, 0] - top[:, 1] > CLEAR_GAP
        assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
