"""This module holds tiny random models of every family, made by transformers. It does not know our engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 300
"""Width of the logits; `write_tokenizer` names 261 ids, so that some logits belong to no token."""
BOS, EOS, SECOND_EOS = 256, 257, 258
"""Special tokens of `write_tokenizer`."""

_SPECIAL = ("<bos>", "<eos>", "<end>")
_MERGES = (("t", "h"), ("i", "n"))


def make_model(architecture: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Build a random float32 model with eager attention.

    Weights are scaled so that logits spread over several units: with transformers' own initialisation they are nearly
    equal, and a comparison of tokens would mean nothing. Norms lie around 1 and biases around 0, with noise.

    Args:
        architecture: a transformers class without its suffix, such as "Llama".
        seed: of the weights.
        settings: fields of the class's config.
    """
    config: PretrainedConfig = getattr(transformers, f"{architecture}Config")(**settings)
    config._attn_implementation = "eager"
    suffix = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    model: PreTrainedModel = getattr(transformers, f"{architecture}{suffix}")(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                mean, deviation = (0.0, 0.2) if name.endswith("bias") else (1.0, 0.2)
            else:
                mean, deviation = 0.0, 1.5 / hidden_size(config) ** 0.5
            parameter.normal_(mean, deviation, generator=generator)
    return model


def hidden_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "hidden_size", None) or config.n_embd)


def save_model(folder: Path, model: PreTrainedModel, *, eos: int | list[int] | None = None) -> Path:
    """Write config.json, generation_config.json and model.safetensors; return the folder."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "bos_token_id": None}))
    return folder


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer.json: 256 bytes (0 is "!", 64 is "a"), then three special tokens and two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    vocab |= {token: len(alphabet) + index for index, token in enumerate(_SPECIAL)}
    vocab |= {left + right: len(vocab) + index for index, (left, right) in enumerate(_MERGES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_tiny_llama(folder: Path, max_position: int = 256) -> Path:
    """Write a llama of two layers and so many positions, with a tokenizer and two end-of-sequence ids."""
    model = make_model(
        "Llama",
        seed=5,
        vocab_size=VOCAB_SIZE,
        hidden_size=60,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=max_position,
        tie_word_embeddings=False,
    )
    return write_tokenizer(save_model(folder, model, eos=[EOS, SECOND_EOS]))


def make_prompts(lengths: list[int], seed: int, vocab_size: int = 256) -> list[list[int]]:
    """Return random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
