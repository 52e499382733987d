"""What the tests of structured output share: a tiny llama with random weights, the hardest model to keep in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.llm import LLM
from octavo.engine.structured import GrammarCompiler
from octavo.engine.text import Tokenizer

from ..checkpoints import VOCAB_SIZE, make_tiny_llama

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def make_llm(tiny_folder: Path) -> MakeLLM:
    """Return `make_llm(**settings)`: a small engine in invariant mode, where every bit must be the same."""
    settings: dict[str, Any] = {
        **{"invariant": True, "device": "cpu", "block_size": 16, "kv_cache_tokens": 4096, "max_num_seqs": 16},
    }
    return lambda **changes: LLM(str(tiny_folder), **(settings | changes))


@pytest.fixture(scope="session")
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm()


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB_SIZE)
