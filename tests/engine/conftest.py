"""What the tests of the whole engine share: a tiny llama that takes text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from octavo.engine.llm import LLM

from ..checkpoints import make_tiny_llama


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_llm(tiny_folder: Path) -> Callable[..., LLM]:
    """Return `make_llm(**settings)`: a small engine in invariant mode."""
    settings = {"invariant": True, "device": "cpu", "block_size": 16, "kv_cache_tokens": 1024, "max_num_seqs": 8}
    return lambda **changes: LLM(str(tiny_folder), **(settings | changes))
