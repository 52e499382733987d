"""What the tests of the server share: a server over a fake model, and one over a tiny llama that takes chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.llm import LLM

from ..checkpoints import make_tiny_llama
from .serving import Running, serving

TEMPLATE = (
    "{% for message in messages %}<bos>{{ message.role }}:{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)
AS_ON_A_GPU = {"overlap": True, "graphs": True}
"""What is the default there and changes no token."""
TINY_SETTINGS = {"invariant": True, "device": "cpu", "block_size": 16, "kv_cache_tokens": 16384, "max_num_seqs": 16}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_llama(tmp_path_factory.mktemp("server") / "tiny", max_position=4096)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def fake() -> Iterator[Running]:
    """Serve a fake model with the default settings."""
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[Running]:
    """Serve a tiny llama as a GPU would; `tiny_llm` does without overlap and graphs."""
    with serving(engine={"model": str(tiny_folder), **TINY_SETTINGS, **AS_ON_A_GPU}, factory=None) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_llm(tiny_folder: Path) -> LLM:
    """The same llama without a server."""
    return LLM(str(tiny_folder), **TINY_SETTINGS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from .browsing import launched  # playwright takes its time to be imported

    with launched() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """See `browsing.visiting`."""
    from .browsing import visiting

    with visiting(browser) as visit:
        yield visit
