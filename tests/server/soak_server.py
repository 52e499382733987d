"""This script serves what its argument says, engine process and all, and says on demand what it holds.

The argument is JSON: `engine` (its settings), `factory` (who builds it; null: from a model), `limits` (of the server),
`send_buffer_bytes` (of the kernel for each connection; null: its own choice) and `small_ring`. It prints its address
and the engine's pid, and then, for every line it reads, what it holds, as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import sys
import time
from typing import Any

from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.events import BlockState
from octavo.engine.observe.ring import EventRing
from octavo.engine.process.fake import fake_engine
from octavo.engine.server.run import Server, bind
from octavo.engine.server.settings import Limits, ServerSettings
from octavo.engine.startup import Engine
from octavo.engine.step import ModelOutput, ModelRunner, SchedulerOutput

STEP_S = 0.003
GATHERING_STEP_S = 0.05
NUM_STEPS_TOGETHER = 20


class _PacedRunner:
    """Takes some time for a step, as a model does: requests that are answered at once never fill the pool."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Run one step."""
        time.sleep(STEP_S)
        return self._runner.execute(step)


def paced_engine(config: EngineConfig, **options: Any) -> Engine:
    """Build a fake engine that takes its time."""
    engine = fake_engine(config, **options)
    engine.core.runner = _PacedRunner(engine.core.runner)
    return engine


class _GatheringRunner:
    """Takes its time until every row has run together with all others for a while: nobody is done before all are there.

    Args:
        runner: what runs.
        num_rows: of the engine.
    """

    def __init__(self, runner: ModelRunner, num_rows: int) -> None:
        self._runner = runner
        self._num_rows = num_rows
        self._num_steps_left = NUM_STEPS_TOGETHER

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Run one step."""
        if self._num_steps_left:
            time.sleep(GATHERING_STEP_S)
            self._num_steps_left -= len(step.rows) == self._num_rows
        return self._runner.execute(step)


def gathering_engine(config: EngineConfig, **options: Any) -> Engine:
    """Build a fake engine that waits for its rows to be filled."""
    engine = fake_engine(config, **options)
    engine.core.runner = _GatheringRunner(engine.core.runner, config.scheduler.max_num_seqs)
    return engine


async def main() -> int:
    options = json.loads(sys.argv[1])
    settings = ServerSettings(port=0, served_model_names=("served",), limits=Limits(**options["limits"]))
    factory = {} if options["factory"] is None else {"engine_factory": options["factory"]}
    config = EngineConfig.from_settings(options["engine"])
    llm = await AsyncLLM.start(config, max_unread=settings.limits.unread_events, **factory)
    if options["small_ring"]:
        # Full after seconds: what grows after that grows for ever.
        EventRing.__init__(llm.ring, max_steps=128, max_requests=512, max_block_maps=4)
    listener = bind(settings)
    if options["send_buffer_bytes"] is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options["send_buffer_bytes"])
    server = Server(llm, settings, listener)
    async with asyncio.TaskGroup() as group:
        telling = group.create_task(_tell(server, llm))
        status = await server.run(lambda url: print(url, llm.info.pid, flush=True))
        telling.cancel()
    return status


async def _tell(server: Server, llm: AsyncLLM) -> None:
    """Answer every line with what is held."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while what := await lines.readline():
        if what == b"collect\n":
            gc.collect()
        print(json.dumps(await _holdings(server, llm)), flush=True)


async def _holdings(server: Server, llm: AsyncLLM) -> dict[str, Any]:
    snapshot, admission = await llm.snapshot(), server.app.context.admission
    return {
        "blocks": int((snapshot.blocks >= BlockState.PRIVATE).sum()),
        "running": len(snapshot.running),
        "waiting": snapshot.num_waiting,
        "active": admission.num_active,
        "queued": admission.num_waiting + admission.num_waiting_tokens,
        "streams": llm.health.num_unfinished,
        "tasks": len(asyncio.all_tasks()),
        "objects": len(gc.get_objects()),
    }


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
