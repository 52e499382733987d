"""This module holds what serving over HTTP costs: octavo's front over an engine that answers at once, beside a bare
FastAPI endpoint that sends chunks of the same size.

    python benchmarks/serve.py [--rounds 3] [--json]

Each server is a process of its own; octavo's engine is another one, a fake runner without a model, whose CPU does not
count. All are measured with the client of `octavo bench serve`, taking turns in one run, in two ways. At once: tokens
come as fast as they are taken, which gives tokens per second and the time to the first; octavo then sends several
tokens in a chunk. Paced: every stream gets one token per tick, which gives the CPU of one chunk, user and system, once
all streams run, and before that of one request. The bare endpoint comes in two forms: `bytes` sends one constant,
`json` encodes each chunk with the standard library, as such an endpoint must once it has something to say. No figure is
printed of a run with a failed or a wrong answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.process.fake import fake_engine
from octavo.engine.server.run import run_server
from octavo.engine.server.settings import ServerSettings
from octavo.engine.startup import Engine
from octavo.engine.step import ModelOutput, SchedulerOutput
from octavo.engine.tools.load import Load, run_load
from octavo.engine.tools.serving_result import serving_result, wrong_answers
from octavo.engine.tools.stream_client import Answer, StreamClient
from octavo.engine.tools.workload import random_requests

AT_ONCE = {1: 1024, 64: 256, 512: 64}
"""Streams -> tokens of each."""
PACED = {1: (1000, 0.001), 64: (150, 0.01), 512: (60, 0.08)}
"""Streams -> tokens of each, and seconds between them."""
SERVERS = ("octavo", "bytes", "json")
RESULTS = Path(__file__).parent / "results" / "cpu" / "serve.json"
CHUNK = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1_700_000_000,
    "model": "fake",
    "system_fingerprint": "octavo-0123456789ab",
    "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None, "stop_reason": None}],
}
"""Of the size of octavo's, which is checked."""


@dataclass(frozen=True, slots=True)
class Case:
    """One server at one number of streams, once."""

    cpu_us_per_chunk: float
    """Paced."""
    cpu_us_per_request: float
    """Paced, until every stream has begun; one chunk each is in it."""
    cpu_us_per_token: float
    """At once, requests included."""
    tokens_per_s: float
    """At once."""
    median_ttft_ms: float
    """At once."""
    p99_ttft_ms: float


def paced_engine(config: EngineConfig, **settings: Any) -> Engine:
    """Start the fake engine with a pause in every step, as long as the settings' seed says in microseconds."""
    engine = fake_engine(config, **settings)
    runner, period_s = engine.core.runner, config.seed / 1e6
    execute, last_s = runner.execute, 0.0

    def slowly(step: SchedulerOutput) -> ModelOutput:
        nonlocal last_s
        time.sleep(max(0.0, last_s + period_s - time.monotonic()))
        last_s = time.monotonic()
        return execute(step)

    runner.execute = slowly  # type: ignore[method-assign]
    return engine


async def serve_octavo(period_s: float) -> None:
    """Serve until killed; print the address."""
    most = max(AT_ONCE)
    config = EngineConfig.from_settings(
        {
            "model": "fake",
            "max_num_seqs": most,
            "max_num_batched_tokens": 16 * most,
            "kv_cache_tokens": 1 << 19,
            "seed": round(period_s * 1e6),
        }
    )
    llm = await AsyncLLM.start(config, engine_factory="serve:paced_engine")
    await run_server(llm, ServerSettings(port=0), on_ready=lambda url: print(url, flush=True))


async def serve_bare(form: str, period_s: float) -> None:
    """Serve until killed; print the address."""
    waiting: list[asyncio.Future[None]] = []
    wanted = asyncio.Event()

    async def tick() -> None:
        # Idle while nobody waits: a server that spins would slow down the ones that are measured.
        while await wanted.wait():
            await asyncio.sleep(period_s)
            wanted.clear()
            due = waiting.copy()
            waiting.clear()
            for each in due:
                if not each.done():
                    each.set_result(None)

    async def turn() -> None:
        """Wait for the next token, for all streams at the same time, as an engine's step brings them."""
        waiting.append(asyncio.get_running_loop().create_future())
        wanted.set()
        await waiting[-1]

    ticking = asyncio.create_task(tick())
    app = FastAPI()
    constant = f"data: {json.dumps(CHUNK, separators=(',', ':'))}\n\n".encode()
    last = constant.replace(b'"finish_reason":null', b'"finish_reason":"length"').replace(b'"text":"a"', b'"text":""')

    async def chunks(num: int) -> AsyncIterator[bytes]:
        for _ in range(num):
            await turn()
            yield constant if form == "bytes" else f"data: {json.dumps(CHUNK, separators=(',', ':'))}\n\n".encode()
        yield last
        yield b"data: [DONE]\n\n"

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "fake"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        return StreamingResponse(chunks((await request.json())["max_tokens"]), media_type="text/event-stream")

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    # As octavo's own, so that the two do the same.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, http="h11", ws="none", loop="asyncio", access_log=False, log_level="warning")
    await uvicorn.Server(config).serve([listener])
    ticking.cancel()


class Served:
    """A server in a process of its own, which tells its CPU time when asked on stdin."""

    def __init__(self, name: str, period_s: float) -> None:
        command = [sys.executable, __file__, "--server", name, "--period-s", str(period_s)]
        folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.url = self._answer()
        if not self.url:
            raise RuntimeError(f"the server {name} has not started")

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)

    def cpu_s(self) -> float:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def tell_cpu() -> None:
    """Answer each line of stdin with the CPU time of this process, in seconds."""
    for _ in sys.stdin:
        print(time.process_time(), flush=True)


class Run(NamedTuple):
    """What came of one load."""

    result: dict[str, Any]
    num_tokens: int
    cpu_s: float
    cpu_begun_s: float
    """Of that, until every stream had begun."""
    num_chunks_after: int
    """Chunks after that."""


async def run(server: Served, num_streams: int, num_tokens: int, seed: int) -> Run:
    """Put one load on one server.

    Raises:
        RuntimeError: an answer is missing or wrong.
    """
    requests = random_requests(num_streams, seed=seed, input_len=4, output_len=num_tokens)
    fields = {"model": "fake", "temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [{**fields, "prompt": each.prompt, "max_tokens": each.max_tokens} for each in requests]
    answers: list[Answer] = []
    async with StreamClient(server.url) as client:
        await client.stream("/v1/completions", {**bodies[0], "max_tokens": 2}, Answer())
        start_s = server.cpu_s()
        loading = asyncio.create_task(run_load(client, "/v1/completions", bodies, Load(), answers))
        while not loading.done() and (len(answers) < num_streams or not all(each.piece_times_s for each in answers)):
            await asyncio.sleep(0.005)
        begun_s = server.cpu_s()
        num_before = sum(len(each.piece_times_s) for each in answers)
        measured = await loading
        end_s = server.cpu_s()
    problems = [each.error for each in answers if each.error] + wrong_answers(requests, answers, ignore_eos=True)
    # Tokens that arrive together share a chunk: fewer there may be, more not.
    problems += [f"{num} chunks" for each in answers if not 1 <= (num := len(each.piece_times_s)) <= num_tokens]
    if problems:
        raise RuntimeError(f"{len(problems)} answers are missing or wrong: {problems[0]}")
    num_chunks = sum(len(each.piece_times_s) for each in answers)
    result = serving_result(requests, measured, Load())
    return Run(result, num_streams * num_tokens, end_s - start_s, begun_s - start_s, num_chunks - num_before)


def measure(at_once: Served, paced: Served, num_streams: int, seed: int) -> Case:
    """Measure one server once, in both ways."""
    fast = asyncio.run(run(at_once, num_streams, AT_ONCE[num_streams], seed))
    slow = asyncio.run(run(paced, num_streams, PACED[num_streams][0], seed))
    return Case(
        cpu_us_per_chunk=(slow.cpu_s - slow.cpu_begun_s) / slow.num_chunks_after * 1e6,
        cpu_us_per_request=slow.cpu_begun_s / num_streams * 1e6,
        cpu_us_per_token=fast.cpu_s / fast.num_tokens * 1e6,
        tokens_per_s=fast.num_tokens / fast.result["duration"],
        median_ttft_ms=fast.result["median_ttft_ms"],
        p99_ttft_ms=fast.result["p99_ttft_ms"],
    )


def chunk_bytes(url: str) -> int:
    """Return the size of one chunk of a server, as it is sent."""
    sizes: list[int] = []

    async def ask() -> None:
        async with StreamClient(url) as client:
            body = {"model": "fake", "prompt": "a", "max_tokens": 1, "ignore_eos": True, "stream": True}
            await client._exchange("/v1/completions", body, lambda data: sizes.append(data.index(b"\n\n") + 2))

    asyncio.run(ask())
    return sizes[0]


def measure_all(rounds: int) -> dict[str, Any]:
    """Return the medians over all rounds, and ratios to the bare endpoints, by number of streams."""
    cases: dict[tuple[int, str], list[Case]] = {}
    with ExitStack() as stack:
        at_once = {name: stack.enter_context(Served(name, 0.0)) for name in SERVERS}
        paced = {
            (name, num_streams): stack.enter_context(Served(name, period_s))
            for name in SERVERS
            for num_streams, (_, period_s) in PACED.items()
        }
        sizes = {name: chunk_bytes(server.url) for name, server in at_once.items()}
        if abs(sizes["octavo"] - sizes["bytes"]) > 0.1 * sizes["octavo"]:
            raise RuntimeError(f"the chunks are not of one size: {sizes}")
        for number in range(rounds):
            for num_streams in AT_ONCE:
                for name in SERVERS:
                    case = measure(at_once[name], paced[name, num_streams], num_streams, seed=number)
                    cases.setdefault((num_streams, name), []).append(case)
    found: dict[str, Any] = {"chunk_bytes": sizes, "streams": {}}
    for num_streams in AT_ONCE:
        medians = {
            name: {
                key: statistics.median(asdict(case)[key] for case in cases[num_streams, name])
                for key in asdict(cases[num_streams, name][0])
            }
            for name in SERVERS
        }
        ours = cases[num_streams, "octavo"]
        ratios = {
            name: statistics.median(
                mine.cpu_us_per_chunk / theirs.cpu_us_per_chunk
                for mine, theirs in zip(ours, cases[num_streams, name], strict=True)
            )
            for name in SERVERS[1:]
        }
        found["streams"][str(num_streams)] = {"servers": medians, "cpu_per_chunk_ratio": ratios}
    return found


def show(found: dict[str, Any]) -> None:
    print(f"chunks of {found['chunk_bytes']['octavo']} bytes (bare: {found['chunk_bytes']['bytes']})")
    units = ("µs/chunk", "µs/request", "µs/token", "tokens/s", "TTFT ms", "p99 ms")
    print(f"{'streams':>8}{'server':>8}" + "".join(f"{unit:>12}" for unit in units))
    for num_streams, each in found["streams"].items():
        for name, case in each["servers"].items():
            print(f"{num_streams:>8}{name:>8}" + "".join(f"{value:>12,.1f}" for value in case.values()))
        ratios = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in each["cpu_per_chunk_ratio"].items())
        print(f"{'':>8}octavo's CPU per chunk: {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What serving over HTTP costs, beside a bare FastAPI endpoint.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help=f"keep the result in results/cpu/{RESULTS.name}")
    parser.add_argument("--server", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--period-s", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server is not None:
        threading.Thread(target=tell_cpu, daemon=True).start()
        is_ours = options.server == "octavo"
        asyncio.run(serve_octavo(options.period_s) if is_ours else serve_bare(options.server, options.period_s))
        return
    found = measure_all(options.rounds)
    show(found)
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        RESULTS.write_text(json.dumps(machine | {"rounds": options.rounds} | found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
