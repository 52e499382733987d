"""This module holds each family against transformers: logits at every position, float32 against float32. It does not
know sampling or scheduling.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from octavo.engine.models.decoder import Decoder

from ..checkpoints import make_model, make_prompts, save_model
from .teacher import load_decoder, random_chunks, teacher_forced_logits

BOUND = 2e-5
"""Of the largest logit. Measured over all models: at most 3.3e-6."""
LENGTHS = [1, 2, 17, 64, 90]
LONG = [513, 1100]
"""Longer than one split of 512 keys, and than two."""

_ROTARY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
_GPT2 = {
    "vocab_size": 97,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _ROTARY),
    "llama, tied, groups of 3": (
        "Llama",
        _ROTARY | {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama, head_dim 80, one KV head": (
        "Llama",
        _ROTARY | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 80},
    ),
    "llama, biases, eps": ("Llama", _ROTARY | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama, llama3 rope": ("Llama", _ROTARY | {"head_dim": 32, "rope_parameters": _LLAMA3_SCALING}),
    "llama, linear rope": ("Llama", _ROTARY | {"rope_parameters": _LINEAR}),
    "llama, yarn": ("Llama", _ROTARY | {"head_dim": 32, "rope_parameters": _YARN}),
    "llama, yarn, own attention factor": (
        "Llama",
        _ROTARY | {"head_dim": 32, "rope_parameters": _YARN | {"attention_factor": 0.8, "truncate": False}},
    ),
    "mistral, window 7": ("Mistral", _ROTARY | {"sliding_window": 7}),
    "mistral, window 24": ("Mistral", _ROTARY | {"sliding_window": 24, "head_dim": 20}),
    "qwen2": ("Qwen2", _ROTARY),
    "qwen2, window from layer 1 on": (
        "Qwen2",
        _ROTARY | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _ROTARY | {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3, tied, groups of 3": (
        "Qwen3",
        _ROTARY | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2", _GPT2),
    "gpt2, erf gelu, wide": (
        "GPT2",
        _GPT2 | {"activation_function": "gelu", "n_inner": 56, "tie_word_embeddings": False},
    ),
}

LONG_MODELS = {
    "llama, long": ("Llama", _ROTARY | {"max_position_embeddings": 1200}),
    "mistral, window 100, long": ("Mistral", _ROTARY | {"max_position_embeddings": 1200, "sliding_window": 100}),
}

WRONG: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "theta": ("llama", lambda config: {"rope": replace(config.rope, theta=11000.0)}),
    "pairs": ("llama", lambda config: {"rope": replace(config.rope, style="interleaved")}),
    "eps": ("llama, biases, eps", lambda config: {"norm_eps": 1e-4}),
    "llama3 factor": ("llama, llama3 rope", lambda config: {"rope": replace(config.rope, factor=7.0)}),
    "no linear scaling": ("llama, linear rope", lambda config: {"rope": replace(config.rope, scaling="none")}),
    "yarn truncation": (
        "llama, yarn, own attention factor",
        lambda config: {"rope": replace(config.rope, truncate=True)},
    ),
    "yarn attention factor": ("llama, yarn", lambda config: {"rope": replace(config.rope, attention_factor=1.0)}),
    "window + 1": ("mistral, window 7", lambda config: {"windows": (8,) * 3}),
    "window - 1": ("mistral, window 24", lambda config: {"windows": (23,) * 3}),
    "window in every layer": ("qwen2, window from layer 1 on", lambda config: {"windows": (9,) * 3}),
    "kind of gelu": ("gpt2, erf gelu, wide", lambda config: {"activation": "gelu_tanh"}),
}


class Reference(NamedTuple):
    """What transformers says."""

    folder: Path
    texts: list[list[int]]
    logits: list[torch.Tensor]
    """[num_tokens, vocab_size] per text."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Return `reference(name)`: one of `MODELS` saved, and its logits; each is made once."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            architecture, settings = (MODELS | LONG_MODELS)[name]
            model = make_model(architecture, **settings)
            texts = make_prompts(LONG if name in LONG_MODELS else LENGTHS, seed=1, vocab_size=97)
            with torch.inference_mode():
                logits = [model(torch.tensor([text])).logits[0] for text in texts]
            folder = save_model(tmp_path_factory.mktemp("model"), model)
            made[name] = Reference(folder, texts, logits)
        return made[name]

    return get


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference, in parts of the largest logit."""
    scale = max(float(logits.abs().max()) for logits in expected)
    differences = [(one - other).abs().max() for one, other in zip(found, expected, strict=True)]
    return float(torch.stack(differences).max()) / scale  # NaN stays NaN, and fails every bound


@pytest.mark.parametrize("name", MODELS)
def test_logits_at_every_position(name: str, reference: Callable[[str], Reference]) -> None:
    model = reference(name)
    found = teacher_forced_logits(load_decoder(model.folder), model.texts)
    assert worst(found, model.logits) <= BOUND


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_random_chunks_over_permuted_blocks(
    name: str, reference: Callable[[str], Reference], count: Callable[[int, int], int], seed: int
) -> None:
    model = reference(name)
    decoder = load_decoder(model.folder)
    for trial in range(seed, seed + count(1, 20)):
        rng = random.Random(trial)
        chunks = random_chunks(model.texts, rng)
        block_size = rng.choice((1, 4, 16, 64))
        found = teacher_forced_logits(decoder, model.texts, chunks, block_size=block_size, rng=rng)
        assert worst(found, model.logits) <= BOUND, f"seed {trial}: blocks of {block_size}, chunks {chunks}"


@pytest.mark.parametrize("name", MODELS)
def test_invariant_mode_gives_the_same_bits_for_any_chunks(
    name: str, reference: Callable[[str], Reference], count: Callable[[int, int], int], seed: int
) -> None:
    model = reference(name)
    decoder = load_decoder(model.folder, invariant=True)
    run = partial(teacher_forced_logits, decoder, invariant=True)
    together = run(model.texts)
    assert worst(together, model.logits) <= BOUND
    for trial in range(seed, seed + count(1, 10)):
        rng = random.Random(trial)
        chunks = random_chunks(model.texts, rng)
        block_size = rng.choice((1, 4, 16, 64))
        found = run(model.texts, chunks, block_size=block_size, rng=rng)
        for text, one, other in zip(model.texts, found, together, strict=True):
            assert same_bits(one, other), f"seed {trial}: blocks of {block_size}, {len(text)} tokens, chunks {chunks}"
    alone = run([model.texts[-1]])[0]
    assert same_bits(alone, together[-1])


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", LONG_MODELS)
def test_long_texts(name: str, invariant: bool, reference: Callable[[str], Reference]) -> None:
    model = reference(name)
    decoder = load_decoder(model.folder, invariant=invariant)
    chunks = [[1, 500, 11, 1], [512, 1, 511, 16, 60]]
    together = teacher_forced_logits(decoder, model.texts, block_size=64, invariant=invariant)
    chunked = teacher_forced_logits(decoder, model.texts, chunks, rng=random.Random(0), invariant=invariant)
    for found in (together, chunked):
        assert worst(found, model.logits) <= BOUND
    assert not invariant or all(same_bits(one, other) for one, other in zip(together, chunked, strict=True))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_setting_exceeds_the_bound(wrong: str, reference: Callable[[str], Reference]) -> None:
    """The bound is no formality: the least wrong reading of a config is far outside it."""
    name, change = WRONG[wrong]
    model = reference(name)
    config = load_decoder(model.folder).config
    found = teacher_forced_logits(load_decoder(model.folder, **change(config)), model.texts)
    assert worst(found, model.logits) > 5 * BOUND


@pytest.fixture(scope="module")
def decoder(reference: Callable[[str], Reference]) -> Decoder:
    return load_decoder(reference("llama").folder, invariant=True)


def test_causality(decoder: Decoder) -> None:
    """A token changes nothing before itself, and everything from itself on."""
    text = make_prompts([50], seed=3, vocab_size=97)[0]
    before = teacher_forced_logits(decoder, [text], invariant=True)[0]
    for at in (0, 15, 16, 49):
        changed = [*text[:at], (text[at] + 1) % 97, *text[at + 1 :]]
        after = teacher_forced_logits(decoder, [changed], invariant=True)[0]
        assert same_bits(after[:at], before[:at])
        assert (after[at:] != before[at:]).any(dim=1).all()


def test_feedback(decoder: Decoder) -> None:
    """One cached step is the full recomputation, at every length."""
    text = make_prompts([40], seed=4, vocab_size=97)[0]
    stepwise = teacher_forced_logits(decoder, [text], [[1] * len(text)], block_size=4, invariant=True)[0]
    for length in range(1, len(text) + 1):
        full = teacher_forced_logits(decoder, [text[:length]], invariant=True)[0]
        assert same_bits(full[-1], stepwise[length - 1]), f"length {length}"
