"""This module holds how requests are sent to a server: when each begins, how many at once. It does not know what they
ask, nor what is made of the answers.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .stream_client import Answer, StreamClient
from .workload import gamma_arrivals

__all__ = ["Load", "Measured", "arrival_times", "run_load"]


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive. Without a rate all are there at once: with a concurrency that is a closed loop."""

    request_rate: float = math.inf
    """Requests per second."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the times between arrivals: 1 is a Poisson process, less comes in bursts, more
    is more even, inf is a metronome."""
    max_concurrency: int | None = None
    """Most requests under way; others wait here, not in the server."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a load."""

    answers: list[Answer]
    """In the order of the requests."""
    queue_times_s: list[float]
    """How long each waited here because of `max_concurrency`."""
    late_s: list[float]
    """How much later than planned each arrived: what the machine of the client could not keep up with."""
    duration_s: float
    client_cpu_s: float
    """CPU that sending and reading took here."""


def arrival_times(num: int, load: Load) -> npt.NDArray[np.float64]:
    """Return when each request arrives, [num] seconds from the start; their mean rate is exactly the one asked for."""
    return gamma_arrivals(num, load.request_rate, load.burstiness, load.seed)


async def run_load(
    client: StreamClient, path: str, bodies: Sequence[Mapping[str, Any]], load: Load, answers: list[Answer]
) -> Measured:
    """Send requests as the load says and wait for all answers.

    Args:
        client: of the server.
        path: of the endpoint.
        bodies: one for each request.
        load: when they are sent.
        answers: empty; gets the answers in order as their requests arrive, for who wants to look on while they grow.
    """
    places = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency is not None else nullcontext()

    async def send(body: Mapping[str, Any], answer: Answer) -> None:
        async with places:
            await client.stream(path, body, answer)

    cpu_s, start_s = time.process_time(), time.monotonic()
    planned = (start_s + arrival_times(len(bodies), load)).tolist()
    arrived: list[float] = []
    async with asyncio.TaskGroup() as group:
        for body, time_s in zip(bodies, planned, strict=True):
            if (wait_s := time_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            arrived.append(time.monotonic())
            answers.append(Answer())
            group.create_task(send(body, answers[-1]))
    return Measured(
        answers,
        queue_times_s=[answer.start_s - time_s for answer, time_s in zip(answers, arrived, strict=True)],
        late_s=[time_s - plan_s for time_s, plan_s in zip(arrived, planned, strict=True)],
        duration_s=time.monotonic() - start_s,
        client_cpu_s=time.process_time() - cpu_s,
    )
