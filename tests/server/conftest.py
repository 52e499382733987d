"""What the tests of the server share: a server over a fake model, and one over a tiny llama that takes chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from octavo.engine.llm import LLM

from ..checkpoints import EOS, SECOND_EOS, VOCAB_SIZE, make_model, save_model, write_tokenizer
from .serving import Running, serving

TEMPLATE = (
    "{% for message in messages %}<bos>{{ message.role }}:{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)
TINY_SETTINGS = {"invariant": True, "device": "cpu", "block_size": 16, "kv_cache_tokens": 16384, "max_num_seqs": 16}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    folder = write_tokenizer(save_model(tmp_path_factory.mktemp("server") / "tiny", model, eos=[EOS, SECOND_EOS]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def fake() -> Iterator[Running]:
    """Serve a fake model with the default settings."""
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[Running]:
    """Serve a tiny llama with the default settings."""
    with serving(engine={"model": str(tiny_folder), **TINY_SETTINGS}, factory=None) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_llm(tiny_folder: Path) -> LLM:
    """The same llama without a server."""
    return LLM(str(tiny_folder), **TINY_SETTINGS)
