"""This module holds processes that compile variants into Triton's cache on disk. It does not know who loads them.

Each is a fresh Python that reads a variant per line and answers with a line, true where it has compiled it and false
where the cache had it or it failed. Not `multiprocessing`, which would run a user's main script again in every process.
A process ends with its input, and so with whoever started it.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict

from .driver import Launch

__all__ = ["compile_in_workers", "main"]


def compile_in_workers(launches: Sequence[Launch], num_workers: int) -> Generator[bool, None, None]:
    """Compile variants and yield, as they get ready, whether each one had to be; one that failed counts as not."""
    num_workers = min(num_workers, len(launches))
    if num_workers == 0:
        return
    workers = [_start() for _ in range(num_workers)]
    free: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def compile_one(launch: Launch) -> bool:
        worker = free.get()
        try:
            return _ask(worker, launch)
        finally:
            free.put(worker)

    pool = ThreadPoolExecutor(num_workers)
    try:
        for future in as_completed([pool.submit(compile_one, launch) for launch in launches]):
            yield future.result()
    finally:
        for worker in workers:  # first, as threads may be waiting for an answer
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.communicate()


def _start() -> subprocess.Popen[str]:
    # The modules that are found here shall be found there. What goes wrong there goes wrong here again, and is told.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {__name__} import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
        text=True,
    )


def _ask(worker: subprocess.Popen[str], launch: Launch) -> bool:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(f"{json.dumps(asdict(launch))}\n")
        worker.stdin.flush()
    except OSError:  # it has ended
        return False
    return worker.stdout.readline() == "true\n"


def main() -> None:
    """Compile what comes in, line by line."""
    from triton import knobs

    from .compile import compile_variant

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    compiled = []
    knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(not cache_hit)
    for line in sys.stdin:
        compiled.clear()
        try:
            compile_variant(Launch(**json.loads(line)))
        except Exception:  # the next one may do; who asked will try this one, too
            compiled.clear()
        answers.write(f"{json.dumps(any(compiled))}\n")
        answers.flush()
