"""This script serves a fake model, engine process and all, and prints its address and the engine's pid.

Arguments: seconds of the shutdown timeout.
"""

from __future__ import annotations

import asyncio
import sys

from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.process.fake import FAKE_ENGINE
from octavo.engine.server.run import run_server
from octavo.engine.server.settings import ServerSettings

ENGINE = {"model": "fake", "max_num_seqs": 64, "block_size": 16, "kv_cache_tokens": 1 << 18, "max_model_len": 1 << 17}


async def main() -> int:
    llm = await AsyncLLM.start(EngineConfig.from_settings(ENGINE), engine_factory=FAKE_ENGINE)
    settings = ServerSettings(port=0, shutdown_timeout_s=float(sys.argv[1]))
    return await run_server(llm, settings, on_ready=lambda url: print(url, llm.info.pid, flush=True))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
