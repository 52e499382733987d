"""This module holds a server on a thread of this process, over an engine on another. It does not know any test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import openai
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.events import BlockState
from octavo.engine.process.fake import ALPHABET, FAKE_ENGINE, fake_engine, fake_tokenizer
from octavo.engine.runner.fake_runner import reference_tokens
from octavo.engine.server.run import Server
from octavo.engine.server.settings import ServerSettings
from octavo.engine.startup import Engine

T = TypeVar("T")

FAKE_SETTINGS: dict[str, Any] = {"model": "fake", "max_num_seqs": 64, "block_size": 16, "kv_cache_tokens": 1 << 15}
KEPT_ENGINE = f"{__name__}:kept_engine"
"""A factory of fake engines that a test can reach into."""
kept_engines: list[Engine] = []
WAIT_S = 60.0
"""For what takes milliseconds on a machine that does nothing else."""


class Running:
    """A server that answers."""

    def __init__(self, loop: asyncio.AbstractEventLoop, llm: AsyncLLM, server: Server) -> None:
        self.loop = loop
        self.llm = llm
        self.server = server
        self.url = server.url
        self.address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=WAIT_S)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def call(self, function: Callable[[], T]) -> T:
        """Call something on the server's event loop."""

        async def run() -> T:
            return function()

        return self.run(run())

    def eventually(self, holds: Callable[[], bool]) -> None:
        """Return once something holds, on the server's event loop."""

        async def wait() -> None:
            async with asyncio.timeout(WAIT_S):
                while not holds():
                    await asyncio.sleep(0.005)

        self.run(wait())

    def num_held_blocks(self) -> int:
        """Return how many blocks a request holds."""
        blocks = self.run(self.llm.snapshot()).blocks
        return int((blocks >= BlockState.PRIVATE).sum())

    def check_canary(self) -> None:
        """Check that nothing is held, and that a fixed request of the fake model gets its tokens."""
        self.eventually(lambda: self.server.app.context.admission.num_active == 0)
        check_fake(self.client, "the canary", 12)
        assert self.server.app.context.admission.num_waiting == 0
        assert self.server.app.context.admission.num_waiting_tokens == 0
        assert self.num_held_blocks() == 0


_TOKENIZER = fake_tokenizer()


def fake_text(prompt: str | list[int], num_tokens: int, seed: int = 0, index: int = 0) -> str:
    """Return what the fake model says to a prompt."""
    prompt_ids = _TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = reference_tokens(prompt_ids, num_tokens, seed=seed, index=index, alphabet=ALPHABET)
    return _TOKENIZER.decode(tokens)


def check_fake(client: openai.OpenAI, prompt: str, num_tokens: int, *, seed: int = 1) -> None:
    """Check the answer to one completion of the fake model."""
    answer = client.completions.create(model="fake", prompt=prompt, max_tokens=num_tokens, seed=seed)
    assert answer.choices[0].text == fake_text(prompt, num_tokens, seed)


def kept_engine(config: EngineConfig, **options: Any) -> Engine:
    """Build a fake engine and keep it in `kept_engines`."""
    kept_engines.append(fake_engine(config, **options))
    return kept_engines[-1]


@contextmanager
def serving(
    settings: ServerSettings | None = None,
    engine: dict[str, Any] | None = None,
    *,
    factory: str | None = FAKE_ENGINE,
    max_unread: int = 256,
    chat_template: str | None = None,
) -> Iterator[Running]:
    """Serve for as long as the block lasts.

    Args:
        settings: of the server; the port is 0 whatever they say.
        engine: settings of the engine.
        factory: who builds the engine; None: from the model that `engine` names.
        max_unread, chat_template: see `AsyncLLM.start`.
    """
    started: list[Running] = []
    is_ready, failure = threading.Event(), []

    async def run() -> None:
        async with started_llm(engine, factory, max_unread=max_unread, chat_template=chat_template) as llm:
            server = Server(llm, settings or ServerSettings(port=0))
            started.append(Running(asyncio.get_running_loop(), llm, server))
            await server.run(lambda url: is_ready.set())

    def target() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failure.append(error)
        finally:
            is_ready.set()

    thread = threading.Thread(target=target, name="server")
    thread.start()
    is_ready.wait(WAIT_S)
    if failure:
        raise failure[0]
    try:
        yield started[0]
    finally:
        started[0].client.close()
        if thread.is_alive():
            started[0].loop.call_soon_threadsafe(started[0].server.stop)
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the server does not stop"
    if failure:
        raise failure[0]


@asynccontextmanager
async def started_llm(
    engine: dict[str, Any] | None = None, factory: str | None = FAKE_ENGINE, **options: Any
) -> AsyncGenerator[AsyncLLM, None]:
    """Run an engine on a thread for as long as the block lasts."""
    config = EngineConfig.from_settings(FAKE_SETTINGS | (engine or {}))
    if factory is not None:
        options["engine_factory"] = factory
    llm = await AsyncLLM.start(config, in_process=True, **options)
    try:
        yield llm
    finally:
        await llm.shutdown(0.0)
