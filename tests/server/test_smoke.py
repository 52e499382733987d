"""The bundled model behind HTTP, in a process of its own: what a first user does."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import openai
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.server.run import Server
from octavo.engine.server.settings import ServerSettings

PROMPT = "The capital of France is"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


def _use(url: str) -> dict[str, Any]:
    """Ask as the README shows it."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    model = client.models.list().data[0].id
    greedy: dict[str, Any] = {"model": model, "temperature": 0}
    chunks = client.chat.completions.create(**greedy, messages=MESSAGES, max_tokens=12, stream=True)
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    called = client.chat.completions.create(
        **greedy, messages=MESSAGES, max_tokens=40, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    found = {
        "model": model,
        "completion": client.completions.create(**greedy, prompt=PROMPT, max_tokens=12).choices[0].text,
        "chat": client.chat.completions.create(**greedy, messages=MESSAGES, max_tokens=12).choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "json": client.chat.completions.create(**greedy, messages=MESSAGES, max_tokens=40, response_format=wanted),
        "call": (called.choices[0].message.tool_calls or [None])[0],
    }
    client.close()
    return found


def test_smollm2() -> None:
    found: dict[str, Any] = {}

    async def run() -> int:
        llm = await AsyncLLM.start(EngineConfig(model="smollm2-135m"))
        server = Server(llm, ServerSettings(port=0))
        loop = asyncio.get_running_loop()

        def use() -> None:
            try:
                found.update(_use(server.url))
            finally:
                loop.call_soon_threadsafe(server.stop)

        return await server.run(lambda url: threading.Thread(target=use).start())

    assert asyncio.run(run()) == 0
    llm = LLM("smollm2-135m")
    greedy = SamplingParams(temperature=0, max_tokens=12)
    assert found["model"] == "smollm2-135m"
    assert found["completion"] == llm.generate(PROMPT, greedy)[0].outputs[0].text
    assert found["chat"] == found["streamed"] == llm.chat(MESSAGES, greedy)[0].outputs[0].text
    assert "Paris" in found["completion"] + found["chat"]
    assert json.loads(found["json"].choices[0].message.content).keys() == {"city"}
    assert found["call"].function.name == "look_up"
    assert json.loads(found["call"].function.arguments).keys() == {"city"}
