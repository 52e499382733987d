"""Many clients at once, over real sockets, of a server and an engine in processes of their own."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
from octavo.engine.step import FinishReason

from .conftest import AS_ON_A_GPU, TINY_SETTINGS
from .soak import GATHERING_ENGINE, MOMENTS, PACED_ENGINE, WAIT_S, Client, Served, get, served
from .soak_cases import BAD, Case, fake_case, long_case, tiny_cases

FAKE = {"model": "fake", "block_size": 16, "max_model_len": 1024, "overlap": True}
MANY = FAKE | {"kv_cache_tokens": 1 << 19, "max_num_batched_tokens": 8192}
CHUNKED = FAKE | {"max_num_seqs": 64, "kv_cache_tokens": 1 << 13, "max_num_batched_tokens": 96, "max_model_len": 2048}
"""Prompts run in several steps."""
LONG = 1400
"""Tokens that are not done within the time in which nothing may be left of who has left."""
SMALL = FAKE | {"max_num_seqs": 128, "kv_cache_tokens": 1 << 11, "max_num_batched_tokens": 256, "preempt_every": 7}
CROWDED = {"max_num_seqs": 64, "kv_cache_tokens": 3 << 9, "max_model_len": 512, "preempt_every": 7}
TINY = TINY_SETTINGS | AS_ON_A_GPU | CROWDED
"""Pools that a tenth of the clients fills."""
IMPATIENT = {"body_bytes": 1 << 16, "header_s": 3.0, "body_s": 3.0, "unread_events": 32}
STALL_S = 5.0
FREE_AFTER_S = 1.0
"""What robustness demands of a storm of cancellations."""
MIN_USAGE = 0.95
"""Of the pool, at its fullest."""
MAX_MB_PER_MIN = 1.0
MIN_WINDOW_S = 60.0
"""In less, slopes of memory are noise."""
NUM_WINDOWS = 12
MAX_NEW_OBJECTS = 8000
"""What a run may leave behind: events that fill the ring, caches; a thing per request would be more in a long one."""
MAX_NEW_THREADS = 8
"""Pools grow to their sizes."""
Draw = Callable[[random.Random], Case]


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run with as many connections as it takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 4096, f"{hard} file descriptors are too few for a thousand connections"
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16_384), hard))
    try:
        asyncio.run(main)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def draw_fake(rng: random.Random) -> Case:
    return fake_case(rng, max_prompt=120, max_output=60)


def test_simultaneous_streams(count: Callable[[int, int], int], seed: int) -> None:
    rng, num_streams = random.Random(seed), min(count(100, 1000), 1000)
    cases = [long_case(rng.randrange(200, 300), seed=rng.getrandbits(40)) for _ in range(num_streams)]

    async def main() -> None:
        async with served(MANY | {"max_num_seqs": num_streams}, factory=GATHERING_ENGINE) as server:
            client, ready, most = Client(server), asyncio.Barrier(num_streams), 0
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(client.ask_together(case, ready)) for case in cases]
                while not all(task.done() for task in tasks):
                    most = max(most, (await server.holdings())["active"])
            assert most == num_streams
            assert client.statuses == {200: num_streams}
            await server.until_idle()
            await check_counts(server, client)
            await check_canary(server, rng, draw_fake)

    run(main())


def test_cancellations(count: Callable[[int, int], int], seed: int) -> None:
    num_clients, num_rounds = 50, count(4, 200)

    async def main() -> None:
        async with served(CHUNKED, factory=PACED_ENGINE, limits=IMPATIENT) as server:
            client = Client(server)

            async def leave(round_: int, number: int) -> None:
                rng = random.Random(f"{seed} {round_} {number}")
                case = fake_case(rng, max_prompt=400, max_output=60)
                await client.leave(rng, case, MOMENTS[number % len(MOMENTS)], max_tokens=LONG)

            for round_ in range(num_rounds):
                async with asyncio.TaskGroup() as group:
                    for number in range(num_clients):
                        group.create_task(leave(round_, number))
                assert await server.until_idle() < FREE_AFTER_S, f"seed {seed}, round {round_}"
            await check_counts(server, client)
            await check_canary(server, random.Random(seed), draw_fake)

    run(main())


@dataclass(frozen=True)
class Load:
    """What is asked, of what, for how long."""

    engine: dict[str, Any]
    factory: str | None
    draw: Draw
    long: Case
    num_clients: int
    duration_s: float


@pytest.mark.parametrize("kind", ["fake", "tiny"])
def test_soak(
    kind: str,
    tier: Literal["test", "all", "soak"],
    seed: int,
    tiny_folder: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The fake model's requests are all different; the real one's are a few, which follow grammars, too.

    Two minutes to warm up, and two that count: the processes find their size within the first of them.
    """
    duration_s = {"test": 5.0, "all": 240.0, "soak": 1200.0}[tier]
    if kind == "fake":
        load = Load(SMALL, PACED_ENGINE, draw_fake, long_case(150, seed=1, n=4), 200, duration_s)
    else:
        llm = request.getfixturevalue("tiny_llm")
        cases = tiny_cases(llm, seed, 40)
        long = long_case(150, seed=1, n=4, llm=llm)
        num_clients = 50 if tier == "test" else 200
        load = Load(
            TINY | {"model": str(tiny_folder)}, None, lambda rng: rng.choice(cases), long, num_clients, duration_s
        )

    async def main() -> None:
        said = await soak(load, seed)
        with capsys.disabled():
            print(f"\nsoak of the {kind} model, seed {seed}: {said}")

    run(main())


async def soak(load: Load, seed: int) -> str:
    """Put a load on a server, check everything, and return what is to be said of it."""
    async with served(
        load.engine, factory=load.factory, limits=IMPATIENT, send_buffer_bytes=4096, steady=True
    ) as server:
        client, watch, rng = Client(server), Watch(server), random.Random(seed)
        client.add(await check_canary(server, rng, load.draw))
        before, end_s = await held_by(server), time.monotonic() + load.duration_s

        async def behave(number: int) -> None:
            rng, turn = random.Random(f"{seed} {number}"), 0
            while time.monotonic() < end_s:
                case, turn = load.draw(rng), turn + 1
                try:
                    await act(client, rng, case, load.long)
                except Exception as error:
                    error.add_note(f"seed {seed}, client {number}, turn {turn}: {case.path} {case.body}")
                    raise

        async with asyncio.TaskGroup() as group:
            group.create_task(watch.look(end_s, load.duration_s / 240))
            group.create_task(watch.look_live(end_s))
            for number in range(load.num_clients):
                group.create_task(behave(number))
        await server.until_idle()
        await check_counts(server, client)
        await check_canary(server, rng, load.draw)
        await check_leaks(server, before)
    slopes, usage = watch.slopes(), float(np.median(watch.usage))
    if slopes is not None:
        assert max(slopes.values()) < MAX_MB_PER_MIN, (slopes, watch.megabytes)
    assert max(watch.usage) >= MIN_USAGE, watch.usage
    sizes = {name: f"{values[0]:.0f} to {values[-1]:.0f} MB" for name, values in watch.megabytes.items()}
    growth = "too short for slopes" if slopes is None else ", ".join(f"{slope:+.2f}" for slope in slopes.values())
    return (
        f"{dict(client.kinds)}; {client.num_output_tokens} tokens in answers that were read to the end; "
        f"pool {usage:.0%} full; {sizes}, MB/min: {growth}"
    )


async def act(client: Client, rng: random.Random, case: Case, long: Case) -> None:
    """Do something with a request: 30 % of clients leave, 5 % ask for what is refused, some are slow."""
    what = rng.random()
    if what < 0.3:
        await client.leave(rng, case, rng.choice(MOMENTS))
    elif what < 0.35:
        await client.misbehave(rng.choice(BAD))
    elif what < 0.37:
        await client.dawdle(rng, case)
    elif what < 0.375:
        await client.stall(long, STALL_S)
    elif what < 0.38:
        await client.stall_sending(case, in_headers=rng.random() < 0.5)
    else:
        await client.ask(rng, case)


class Watch:
    """Looks at a busy server as its operators do, and notes what it sees.

    Args:
        server: to look at.
    """

    def __init__(self, server: Served) -> None:
        self._server = server
        self._times_s: list[float] = []
        self.megabytes: dict[str, list[float]] = {"server": [], "engine": []}
        self.usage: list[float] = []
        """Of the KV pool."""

    async def look(self, end_s: float, period_s: float) -> None:
        """Look now and then."""
        server = self._server
        processes = (psutil.Process(server.pid), psutil.Process(server.engine_pid))
        while time.monotonic() < end_s:
            self._times_s.append(time.monotonic())
            for values, process in zip(self.megabytes.values(), processes, strict=True):
                values.append(process.memory_info().rss / 1e6)
            self.usage.append((await server.metrics())["octavo:kv_cache_usage_perc"])
            for path in ("/health", "/v1/requests"):
                assert (await get(server, path)).status == 200
            await asyncio.sleep(period_s)

    async def look_live(self, end_s: float) -> None:
        """Have the live view open."""
        reader, writer = await asyncio.open_connection(*self._server.address)
        try:
            writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while time.monotonic() < end_s:
                assert await reader.read(1 << 16), "the live view has ended"
        finally:
            writer.transport.abort()

    def slopes(self) -> dict[str, float] | None:
        """Return the growth of each process, MB per minute, by least squares after the first half, which warms up.

        What a step takes for a moment is not kept: the least of each of some windows counts.
        """
        times_s = self._times_s[len(self._times_s) // 2 :]
        if times_s[-1] - times_s[0] < MIN_WINDOW_S:
            return None
        middles_s = [float(np.mean(part)) for part in np.array_split(times_s, NUM_WINDOWS)]
        slopes = {}
        for name, values in self.megabytes.items():
            least = [float(np.min(part)) for part in np.array_split(values[-len(times_s) :], NUM_WINDOWS)]
            slopes[name] = 60 * float(np.polyfit(middles_s, least, 1)[0])
        return slopes


async def check_counts(server: Served, client: Client) -> None:
    """Compare what the clients saw with what the server counted; of those who left, it counts some."""
    metrics = await server.metrics()
    counted: Counter[int] = Counter()
    for name, value in metrics.items():
        if name.startswith("http_requests_total") and 'method="GET"' not in name:
            counted[int(name.partition('status="')[2].partition('"')[0])] += round(value)
    refused = {status: number for status, number in client.statuses.items() if status != 200}
    assert {status: number for status, number in counted.items() if status >= 400} == refused
    num_left = client.kinds["clients that leave"] + client.kinds["readers cut off"]
    assert 0 <= counted[200] - client.statuses[200] <= num_left
    ends = {reason: metrics[f'octavo:request_success_total{{finished_reason="{reason}"}}'] for reason in FinishReason}
    finished = ends[FinishReason.LENGTH] + ends[FinishReason.STOP]
    assert 0 <= finished - client.reasons.total() <= client.num_left_choices
    assert finished + ends[FinishReason.ABORT] <= client.reasons.total() + client.num_left_choices
    assert ends[FinishReason.ERROR] == 0
    assert metrics["octavo:request_generation_tokens_sum"] >= client.num_output_tokens
    assert metrics["octavo:num_requests_running"] == metrics["octavo:num_requests_waiting"] == 0
    assert metrics["octavo:kv_cache_usage_perc"] == 0


async def check_canary(server: Served, rng: random.Random, draw: Draw) -> Client:
    """Check that a server that does nothing else answers some requests, and counts these exactly; return who asked."""
    client, before = Client(server), await server.metrics()
    for _ in range(20):
        await client.ask(rng, draw(rng))
    await server.until_idle()
    after = await server.metrics()
    grown = {name: round(value - before.get(name, 0)) for name, value in after.items()}
    assert client.num_prompt_tokens == grown["octavo:prompt_tokens_total"] == grown["octavo:request_prompt_tokens_sum"]
    assert client.num_output_tokens == grown["octavo:request_generation_tokens_sum"]
    for reason in ("length", "stop"):
        assert client.reasons[reason] == grown[f'octavo:request_success_total{{finished_reason="{reason}"}}']
    return client


async def held_by(server: Served) -> dict[str, int]:
    """Return what a server holds, when it does nothing, of what could become more and more."""
    held = await server.holdings(collect=True)
    counts = {"tasks": held["tasks"], "objects": held["objects"]}
    for name, pid in (("server", server.pid), ("engine", server.engine_pid)):
        process = psutil.Process(pid)
        counts |= {f"{name}'s threads": process.num_threads(), f"{name}'s descriptors": process.num_fds()}
    return counts


async def check_leaks(server: Served, before: dict[str, int]) -> None:
    """Check that nothing has become more; the last connections may still be closing."""
    allowed = {"objects": MAX_NEW_OBJECTS, "server's threads": MAX_NEW_THREADS, "engine's threads": MAX_NEW_THREADS}
    deadline_s = time.monotonic() + WAIT_S
    while True:
        grown = {name: value - before[name] for name, value in (await held_by(server)).items()}
        if all(value <= allowed.get(name, 0) for name, value in grown.items()):
            return
        assert time.monotonic() < deadline_s, grown
