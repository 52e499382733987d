"""This module holds engines that fail in the ways a test asks for. It does not know the front.

It is imported in the engine's process, too, by its bare name: `conftest.py` puts this folder on the path.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import threading
import time
from typing import Any

from octavo.engine.async_llm import CLOSE_TIMEOUT_S
from octavo.engine.config import EngineConfig
from octavo.engine.errors import CapacityError, CheckpointError, ConfigError
from octavo.engine.process.fake import fake_engine
from octavo.engine.runner.fake_runner import FakeRunner
from octavo.engine.startup import Engine
from octavo.engine.step import ModelOutput, SchedulerOutput

FAULTY = "faulty_engines:faulty_engine"
RAISE, EXIT, CRASH, HANG, HOG, NOT_FINITE, SLOW, TELL = 1001, 1002, 1003, 1004, 1005, 1006, 1007, 1008
"""Seeds of requests that make the step they begin in fail."""
FAULT_BEGINS, FAULT_ENDS, FREED = b"the fault begins\n", b"the fault ends\n", b"the runner is freed\n"
ENDLESS = re.compile("(a+)+b")
NEVER = threading.Event()


class FaultyRunner:
    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner
        self._was_slow = False

    def __del__(self) -> None:
        if self._was_slow:
            time.sleep(0.2)  # as memory takes its time to be freed
            os.write(2, FREED)

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        for sequence in step.new_sequences:
            if sequence.seed == RAISE:
                self._runner.fail_next = "after"
            elif sequence.seed == EXIT:
                os._exit(7)
            elif sequence.seed == CRASH:
                os.kill(os.getpid(), signal.SIGSEGV)
            elif sequence.seed == HANG:
                os.write(2, FAULT_BEGINS)
                NEVER.wait()
            elif sequence.seed == HOG:
                os.write(2, FAULT_BEGINS)
                ENDLESS.fullmatch("a" * 64)  # no other thread runs meanwhile
            elif sequence.seed == SLOW:
                self._was_slow = True
                os.write(2, FAULT_BEGINS)
                time.sleep(2 * CLOSE_TIMEOUT_S)
                os.write(2, FAULT_ENDS)
            elif sequence.seed == TELL:
                raise RuntimeError(f"{gc.get_freeze_count()} objects are frozen")
            elif sequence.seed == NOT_FINITE:
                self._runner.nan_rows.add(sequence.row)
        return self._runner.execute(step)


def faulty_engine(config: EngineConfig, **options: Any) -> Engine:
    engine = fake_engine(config, **options)
    engine.core.runner = FaultyRunner(engine.core.runner)  # type: ignore[arg-type]
    return engine


def talking_engine(config: EngineConfig, **options: Any) -> Engine:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logging.getLogger("octavo.engine").log(level, "a line of %s", logging.getLevelName(level))
    return fake_engine(config, **options)


def wrong_setting(config: EngineConfig, **options: Any) -> Engine:
    raise ConfigError("dtype is 'int3'; allowed: others")


def damaged_file(config: EngineConfig, **options: Any) -> Engine:
    raise CheckpointError("model.safetensors", "is truncated", "model.norm.weight")


def too_large(config: EngineConfig, **options: Any) -> Engine:
    raise CapacityError("needs 3 bytes and there are 2")


def broken(config: EngineConfig, **options: Any) -> Engine:
    raise ZeroDivisionError("a bug")


def hangs_at_start(config: EngineConfig, **options: Any) -> Engine:
    options["on_phase"]("hang")
    NEVER.wait()
    raise AssertionError


def dies_at_start(config: EngineConfig, **options: Any) -> Engine:
    os._exit(9)
