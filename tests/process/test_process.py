"""The engine's process dies, hangs, is killed, is orphaned: what its front sees, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.errors import CapacityError, CheckpointError, ConfigError, EngineDeadError
from octavo.engine.process.client import ProcessLink

from .conftest import DEADLINE_S, check_canary, collect, expected, run, start
from .faulty_engines import CRASH, EXIT, FAULT_BEGINS, FAULT_ENDS, FAULTY, FREED, HANG, HOG, SLOW, TELL

NOTICED_S = 2.0
LONG = {"max_model_len": 4000}
PARAMS = {"seed": 1, "max_tokens": 3500}


def process_of(llm: AsyncLLM) -> psutil.Process:
    assert llm.info.pid != os.getpid()
    return psutil.Process(llm.info.pid)


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended; where nobody reaps orphans it stays a zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert left == set()


@pytest.mark.parametrize("num_streams", [0, 3])
def test_killed_engine_is_noticed(num_streams: int, count: Callable[[int, int], int]) -> None:
    async def main() -> None:
        llm = await start(False, settings=LONG)
        process = process_of(llm)
        streams = [asyncio.create_task(collect(llm, [index], params=PARAMS)) for index in range(num_streams)]
        if num_streams:
            await until(lambda: len(llm.ring.steps) > 5)
        killed_s = time.monotonic()
        process.kill()
        await until(lambda: llm.is_dead)
        outcomes = await asyncio.gather(*streams, return_exceptions=True)
        assert time.monotonic() - killed_s < NOTICED_S
        for outcome in outcomes:
            assert isinstance(outcome, EngineDeadError)
            assert "killed by SIGKILL" in str(outcome)
        assert not llm.health.ok
        assert llm.health.num_unfinished == 0
        with pytest.raises(EngineDeadError):
            await collect(llm, [1])
        assert is_gone(process)
        await llm.shutdown()

    for _ in range(count(1, 25)):
        run(main())


def test_what_is_imported_is_not_searched_for_garbage() -> None:
    """A full collection would stop all requests for as long as it walks over everything that lives."""

    async def main() -> None:
        llm = await start(False, FAULTY)
        (choice,) = (await collect(llm, [1], params={"seed": TELL, "max_tokens": 1})).outputs
        found = re.search(r"(\d+) objects are frozen", choice.error or "")
        assert found, choice
        assert int(found[1]) > 10_000
        await llm.shutdown()

    run(main())


@pytest.mark.parametrize(("seed", "reason"), [(EXIT, "ended with status 7"), (CRASH, "killed by SIGSEGV")])
def test_crash_in_a_step(seed: int, reason: str, tmp_path: Path) -> None:
    async def main() -> None:
        llm = await start(False, FAULTY, crash_folder=tmp_path)
        other = asyncio.create_task(collect(llm, [1], params={"seed": 1, "max_tokens": 200}, request_id="other"))
        await until(lambda: bool(llm.ring.steps))
        began_s = time.monotonic()
        with pytest.raises(EngineDeadError, match=reason):
            await collect(llm, [5, 6], params={"seed": seed, "max_tokens": 9})
        assert time.monotonic() - began_s < NOTICED_S
        await asyncio.gather(other, return_exceptions=True)
        await llm.shutdown()
        llm._threads.shutdown(wait=True)
        (bundle,) = tmp_path.iterdir()
        assert reason in bundle.read_text()

    run(main())


def test_dead_engine_exits_with_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        llm = await start(False, FAULTY)
        for _ in range(3):
            await asyncio.gather(collect(llm, [1], params={"seed": 1001}), return_exceptions=True)
        link = llm._link
        assert isinstance(link, ProcessLink)
        assert link._process is not None
        await llm.shutdown()
        assert link._process.returncode == 1

    run(main())
    assert "octavo engine: 3 steps failed in a row" in capfd.readouterr().err


@pytest.mark.parametrize("seed", [HANG, HOG])
def test_hung_step_is_seen_and_ended(seed: int) -> None:
    async def main() -> None:
        llm = await start(False, FAULTY)
        process = process_of(llm)
        stuck = asyncio.create_task(collect(llm, [1], params={"seed": seed}))
        if seed == HANG:
            await until(lambda: (llm.health.last_step_age_s or 0.0) > 1.2)
            assert llm.health.heartbeat_age_s < 1.1, "the heartbeat has stopped with the step"
        else:
            await until(lambda: llm.health.num_unfinished == 1 and llm.health.heartbeat_age_s > 1.2)
        await llm.shutdown()
        assert is_gone(process)
        with pytest.raises(EngineDeadError, match="shut down"):
            await stuck

    run(main())


def test_stopped_process_gives_no_sign_of_life() -> None:
    async def main() -> None:
        llm = await start(False)
        process = process_of(llm)
        process.suspend()
        await until(lambda: llm.health.heartbeat_age_s > 1.5)
        process.resume()
        await until(lambda: llm.health.heartbeat_age_s < 1.0)
        await check_canary(llm)
        await llm.shutdown()

    run(main())


def test_terminal_and_service_manager_do_not_end_the_engine() -> None:
    async def main() -> None:
        llm = await start(False, settings=LONG)
        process = process_of(llm)
        assert os.getpgid(process.pid) != os.getpgid(0), "Ctrl-C goes to the whole process group"
        running = asyncio.create_task(collect(llm, [3], params={"seed": 4, "max_tokens": 300}))
        await until(lambda: bool(llm.ring.steps))
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert (await running).outputs[0].token_ids == expected([3], 300, 4)
        await check_canary(llm)
        await llm.shutdown()

    run(main())


FRONT = """
import asyncio, sys
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.process.client import ProcessLink

sys.path.append({folder!r})

async def main():
    starting = AsyncLLM.start(EngineConfig(), engine_factory={factory!r}, on_phase=lambda name: tell())
    llm = await starting
    answers = llm.generate([1], llm.params({{"seed": {seed}, "max_tokens": 100}}))
    print(llm.info.pid, flush=True)
    await anext(answers)
    await asyncio.Event().wait()

def tell():
    import psutil
    print(psutil.Process().children()[0].pid, flush=True)

if __name__ == "__main__":
    asyncio.run(main())
else:
    raise AssertionError("the engine's process has imported the front's script")
"""


@pytest.mark.parametrize(
    ("factory", "seed"),
    [(FAULTY, 1), (FAULTY, HANG), (FAULTY, HOG), ("faulty_engines:hangs_at_start", 1)],
    ids=["idle", "hung", "hog", "start"],
)
def test_engine_ends_with_its_parent(factory: str, seed: int, tmp_path: Path, count: Callable[[int, int], int]) -> None:
    script = tmp_path / "front.py"
    script.write_text(FRONT.format(folder=str(Path(__file__).parent), factory=factory, seed=seed))
    for _ in range(count(1, 10)):
        command = [sys.executable, str(script)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as front:
            assert front.stdout is not None
            assert front.stderr is not None
            engine = psutil.Process(int(front.stdout.readline()))
            if seed != 1:
                assert front.stderr.readline() == FAULT_BEGINS
            front.kill()
        deadline_s = time.monotonic() + 30.0
        while not (gone := is_gone(engine)) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        if not gone:
            engine.kill()
        assert gone, "the engine has outlived its parent"


LEAVES = """
import asyncio, sys
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig

sys.path.append({folder!r})

async def main():
    llm = await AsyncLLM.start(EngineConfig(), in_process=True, engine_factory={factory!r})
    step = asyncio.create_task(anext(llm.generate([1], llm.params({{"seed": {seed}}}))))
    await asyncio.sleep(0.2)
    await llm.shutdown() if {shuts_down} else None
    step.cancel()

asyncio.run(main())
"""


@pytest.mark.parametrize("shuts_down", [True, False])
def test_a_step_ends_before_the_interpreter(shuts_down: bool) -> None:
    """And its engine is freed: on a thread that is killed in torch's code the process aborts."""
    script = LEAVES.format(folder=str(Path(__file__).parent), factory=FAULTY, seed=SLOW, shuts_down=shuts_down)
    left = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=DEADLINE_S, check=True)
    assert left.stderr == FAULT_BEGINS + FAULT_ENDS + FREED


@pytest.mark.parametrize("in_process", [True, False], ids=["thread", "process"])
@pytest.mark.parametrize(
    ("factory", "kind", "text"),
    [
        ("wrong_setting", ConfigError, "dtype is 'int3'; allowed: others"),
        ("damaged_file", CheckpointError, "model.safetensors: tensor 'model.norm.weight': is truncated"),
        ("too_large", CapacityError, "needs 3 bytes and there are 2"),
        ("broken", EngineDeadError, "the engine failed to start: ZeroDivisionError('a bug')"),
    ],
)
def test_start_fails_with_the_same_error(in_process: bool, factory: str, kind: type[Exception], text: str) -> None:
    async def main() -> None:
        with pytest.raises(kind) as failed:
            await start(in_process, f"faulty_engines:{factory}")
        assert type(failed.value) is kind
        assert str(failed.value) == text

    run(main())


def test_start_of_a_model_that_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match=r"tokenizer is '.*nowhere'; allowed: a folder"):
            await AsyncLLM.start(EngineConfig(tokenizer=str(tmp_path / "nowhere")))

    run(main())


def test_death_at_the_start() -> None:
    async def main() -> None:
        with pytest.raises(EngineDeadError, match="died while it started: its process ended with status 9"):
            await start(False, "faulty_engines:dies_at_start")

    run(main())


def test_death_while_the_front_gets_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    async def outlive(link: ProcessLink, _: Any) -> None:
        assert link._process is not None
        link._process.kill()
        while not link._closed:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(ProcessLink, "_tokenizer", outlive)

    async def main() -> None:
        with pytest.raises(EngineDeadError, match=r"died while it started: its process was killed by SIGKILL"):
            await start(in_process=False)

    run(main())


def test_start_that_is_cancelled_leaves_nothing() -> None:
    async def main() -> None:
        hangs = asyncio.Event()
        starting = asyncio.create_task(start(False, "faulty_engines:hangs_at_start", on_phase=lambda name: hangs.set()))
        await hangs.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    run(main())


def test_engine_inherits_one_descriptor_and_no_torch() -> None:
    async def main() -> None:
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        llm = await start(False)
        process = process_of(llm)
        try:
            held = {os.readlink(f"/proc/{process.pid}/fd/{name}") for name in os.listdir(f"/proc/{process.pid}/fd")}
            assert os.readlink(f"/proc/self/fd/{writer}") not in held
            assert sum(name.startswith("socket:") for name in held) == 1
            assert not any("libtorch" in mapped.path for mapped in process.memory_maps())
        finally:
            os.close(reader)
            os.close(writer)
        await llm.shutdown()

    run(main())


def test_engine_stands_still_while_its_front_does_not_read() -> None:
    async def main() -> None:
        llm = await start(False, settings=LONG | {"kv_cache_tokens": 1 << 16})
        link = llm._link
        assert isinstance(link, ProcessLink)
        transport: Any = link._transport
        params = {"seed": 1, "max_tokens": 3500}  # a megabyte or more of news, which no buffer between the two holds
        streams = [asyncio.create_task(collect(llm, [index], params=params)) for index in range(16)]
        await until(lambda: bool(llm.ring.steps))
        transport.pause_reading()
        process, used = process_of(llm), -1.0
        while used != (used := sum(process.cpu_times()[:2])):  # nothing it does takes no time at all
            await asyncio.sleep(0.5)
        still_s = time.monotonic()
        transport.resume_reading()
        for index, answer in enumerate(await asyncio.gather(*streams)):
            assert answer.outputs[0].token_ids == expected([index], 3500, 1)
        ends = [step.end_s for step in llm.ring.steps]
        assert any(before < still_s - 0.4 and after > still_s for before, after in pairwise(ends))
        await check_canary(llm)
        await llm.shutdown()

    run(main())
