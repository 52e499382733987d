"""Many clients at once, some of whom leave."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable

import pytest
from octavo.engine.server.settings import Limits, ServerSettings
from octavo.engine.server.sse import EventStream

from .serving import Running, fake_text, serving


async def _stream(running: Running, prompt: str, num_tokens: int, *, leave_after: int | None) -> str | None:
    """Return the text of one stream; None where its client has left after so many bytes."""
    reader, writer = await asyncio.open_connection(*running.address)
    body = json.dumps({"prompt": prompt, "max_tokens": num_tokens, "seed": 1, "stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    data = b""
    try:
        while part := await reader.read(65536):
            data += part
            if leave_after is not None and len(data) > leave_after:
                return None
    finally:
        writer.transport.abort()
    lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", data[-500:]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


@pytest.mark.parametrize("ping_s", [60.0, 0.0005])
def test_tokens_wake_no_task(ping_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are sent from where they arrive, in order with what a stream sends besides."""
    num_written, num_pushed = [0], [0]

    async def write(stream: EventStream, events: bytes) -> None:
        num_written[0] += 1
        await write_before(stream, events)

    def write_now(stream: EventStream, events: bytes) -> None:
        num_pushed[0] += 1
        write_now_before(stream, events)

    write_before, write_now_before = EventStream.write, EventStream.write_now
    monkeypatch.setattr(EventStream, "write", write)
    monkeypatch.setattr(EventStream, "write_now", write_now)
    settings = ServerSettings(port=0, limits=Limits(ping_s=ping_s))
    with serving(settings, {"max_model_len": 4096, "preempt_every": 50}) as running:
        cases = [(f"client {number}", 2000, None) for number in range(3)]
        texts = running.run(_all(running, cases))
        assert texts == [fake_text(prompt, num_tokens, 1) for prompt, num_tokens, _ in cases]
        assert num_pushed[0] > num_written[0]
        running.check_canary()


async def _all(running: Running, cases: list[tuple[str, int, int | None]]) -> list[str | None]:
    return await asyncio.gather(*(_stream(running, *case[:2], leave_after=case[2]) for case in cases))


def test_simultaneous_streams(count: Callable[[int, int], int], seed: int) -> None:
    """All are answered exactly; those that leave take nothing with them."""
    rng = random.Random(seed)
    num_streams = count(100, 1000)
    cases = [
        (f"client {number % 50} of some", rng.randrange(1, 60), rng.choice((None, None, 0, 500, 3000)))
        for number in range(num_streams)
    ]
    # They open at once, and on a busy machine the last is heard late.
    limits = Limits(header_s=120, body_s=120, queue_s=120, queue_requests=2 * num_streams)
    with serving(ServerSettings(port=0, limits=limits), {"kv_cache_tokens": 4096}) as running:
        texts = asyncio.run(_all(running, cases))
        for text, (prompt, num_tokens, leave_after) in zip(texts, cases, strict=True):
            assert text == fake_text(prompt, num_tokens, 1) or (text is None and leave_after is not None)
        assert sum(text is None for text in texts) > num_streams // 10
        running.check_canary()
