"""What the tests of verify share: a tiny llama, its engine, and a run of both. They do not know the detectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.llm import LLM
from octavo.engine.tools.verify import Focus, Report, Text, verify

from ...checkpoints import make_prompts, make_tiny_llama

Check = Callable[..., Report]
LENGTHS = [40, 7, 33]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("verified"))


@pytest.fixture(scope="session")
def texts() -> list[Text]:
    """Three texts, and one that begins as the first does."""
    first, *others = make_prompts(LENGTHS, seed=2)
    named = [first, *others, first[:32] + others[0]]
    return [Text(f"text {i}", token_ids) for i, token_ids in enumerate(named)]


@pytest.fixture
def llm(folder: Path) -> LLM:
    """A fresh engine, to be broken."""
    return LLM(str(folder), device="cpu", block_size=16, kv_cache_tokens=512)


@pytest.fixture
def check(llm: LLM, texts: list[Text]) -> Check:
    """Return `check(condition)`: the engine against transformers under one condition, or all."""

    def run(condition: str | None = None, **settings: Any) -> Report:
        focus = Focus(condition, settings.pop("text", None), settings.pop("position", None))
        return verify(llm.engine, texts, focus=focus, **settings)

    return run
