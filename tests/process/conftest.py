"""What the tests of the engine's process share: engines without a model, and a check that one is as good as new."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.process.fake import ALPHABET, FAKE_ENGINE
from octavo.engine.runner.fake_runner import reference_tokens

from ..checkpoints import make_tiny_llama

SETTINGS: dict[str, Any] = {
    "block_size": 4,
    "kv_cache_tokens": 4096,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
}
BOTH = pytest.mark.parametrize("in_process", [True, False], ids=["thread", "process"])
LONG = {"seed": 1, "max_tokens": 200}
"""Parameters of a request that runs for a while."""
DEADLINE_S = 170.0
"""Of one test: only a hang takes that long."""


@pytest.fixture(scope="session", autouse=True)
def faulty_engines_are_found() -> None:
    """The engine's process looks for modules where this one does."""
    sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, DEADLINE_S))


async def start(in_process: bool = True, factory: str = FAKE_ENGINE, **options: Any) -> AsyncLLM:
    """Start an engine without a model; `settings` among the options changes those above."""
    config = EngineConfig.from_settings(SETTINGS | options.pop("settings", {}))
    return await AsyncLLM.start(config, in_process=in_process, engine_factory=factory, **options)


async def collect(llm: AsyncLLM, token_ids: Sequence[int], **options: Any) -> Any:
    """Return the whole answer to one request; `params` among the options are its parameters."""
    answers = [answer async for answer in llm.generate(token_ids, llm.params(options.pop("params", {})), **options)]
    answer = answers[-1]
    assert answer.finished
    return answer


def expected(prompt: Sequence[int], num_tokens: int, seed: int, index: int = 0) -> list[int]:
    """Return the tokens that a `FakeRunner` must give."""
    return reference_tokens(prompt, num_tokens, seed=seed, index=index, alphabet=ALPHABET)


async def check_canary(llm: AsyncLLM) -> None:
    """Check that a fixed request gets its tokens and that nobody holds a block."""
    answer = await collect(llm, [1, 2, 3, 4, 5], params={"seed": 42, "max_tokens": 12})
    assert answer.outputs[0].token_ids == expected([1, 2, 3, 4, 5], 12, 42)
    snapshot = await llm.snapshot()
    assert (snapshot.running, snapshot.waiting) == ([], [])
    assert np.all(snapshot.blocks <= 1), "a block is in use"
    assert llm.health.ok
    assert llm.health.num_unfinished == 0
