"""This module holds an engine whose device computes nothing and takes its time: all that the host does is real. It does
not know what is measured of it.

It is started as any engine is, over a tiny random model with the real tokenizer of SmolLM2. Only what would run on the
device is replaced: the model, attention's plan and the sampling op, which make a token of what they are given,

    hidden = (token * 31337 + (position + 1) * 7919) mod 4096        of the last token that the row runs
    token  = (hidden + seed) mod 4096                                no seed where all rows are greedy

so that a token fed from another row, a wrong position or a neighbour's seed shows in every token after it. They are the
4,096 commonest of the vocabulary, of which most text consists, bytes of rare characters among them. The device
is a stream: a step begins when the host has launched it and the one before has ended, takes `step_s`, and its tokens
can be had from then on. Whether the host is ready by then is what the log tells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import octavo.engine.llm as front
import torch
from octavo.engine import LLM
from octavo.engine.config import EngineConfig
from octavo.engine.loader import resolve_model
from octavo.engine.startup import Engine, start_engine
from octavo.engine.step import ModelOutput, SchedulerOutput
from octavo.engine.text import Tokenizer
from octavo.kernels import dispatch
from octavo.kernels.sampling import SampleOutput, SampleParams

VOCAB_SIZE = 49_152
NUM_IDS = 4096
MAX_MODEL_LEN = 4096
TOKEN_FACTOR, POSITION_FACTOR = 31_337, 7_919
MAX_STEPS = 1 << 14
SPIN_S = 3e-4
"""A sleep may last longer than it was told to by about a fifth of this; the rest is waited for awake."""

Floats = npt.NDArray[np.float64]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
COLUMNS = (
    "num_seqs",
    "num_tokens",
    "schedule_s",
    "execute_s",
    "begun_at_s",
    "asleep_s",
    "asleep_cpu_s",
    "collect_s",
    "update_s",
    "text_s",
    "ended_at_s",
    "cpu_at_s",
)


class StepLog:
    """What became of each step, as arrays by the step's number. All times are of the thread that runs the engine.

    Args:
        path: a file that several processes may have open.
    """

    def __init__(self, path: Path) -> None:
        mode = "r+" if path.exists() else "w+"
        memory = np.memmap(path, np.float64, mode, shape=(len(COLUMNS), MAX_STEPS))
        self._columns: dict[str, Floats] = dict(zip(COLUMNS, memory, strict=True))
        self.num_seqs: Floats = self._columns["num_seqs"]
        self.num_tokens: Floats = self._columns["num_tokens"]
        self.schedule_s: Floats = self._columns["schedule_s"]
        self.execute_s: Floats = self._columns["execute_s"]
        """Until everything was launched."""
        self.begun_at_s: Floats = self._columns["begun_at_s"]
        """When the device began with it."""
        self.asleep_s: Floats = self._columns["asleep_s"]
        """The host waited so long for the device to end it,"""
        self.asleep_cpu_s: Floats = self._columns["asleep_cpu_s"]
        """and used so much of the CPU for that, which is not work."""
        self.collect_s: Floats = self._columns["collect_s"]
        """To make an output of it once the device had ended."""
        self.update_s: Floats = self._columns["update_s"]
        self.text_s: Floats = self._columns["text_s"]
        """To turn its tokens into text, where that is the same thread."""
        self.ended_at_s: Floats = self._columns["ended_at_s"]
        """When the scheduler had taken it over."""
        self.cpu_at_s: Floats = self._columns["cpu_at_s"]
        """CPU that the thread had used by then."""
        self.last = 0
        """The step that was taken over last."""


class _Launched:
    """A step that the device has begun, or will when the one before it has ended."""

    def __init__(self, handle: Any, number: int, ends_at_s: float, log: StepLog) -> None:
        self._handle, self._number, self._ends_at_s, self._log = handle, number, ends_at_s, log

    def wait(self) -> ModelOutput:
        cpu_s, start_s = time.thread_time(), time.perf_counter()
        left_s = self._ends_at_s - start_s
        if left_s > SPIN_S:
            time.sleep(left_s - SPIN_S)
        now_s = time.perf_counter()
        while now_s < self._ends_at_s:
            now_s = time.perf_counter()
        log, i = self._log, self._number
        log.asleep_cpu_s[i] = time.thread_time() - cpu_s
        log.asleep_s[i] = now_s - start_s
        output: ModelOutput = self._handle.wait()
        log.collect_s[i] = time.perf_counter() - now_s
        return output


class _NullDevice:
    """Runs steps by a real runner, and takes a time of its own for each."""

    def __init__(self, runner: Any, step_s: float, log: StepLog) -> None:
        self.runner = runner
        self.step_s = step_s
        self.log = log
        self._free_at_s = 0.0

    def execute(self, step: SchedulerOutput) -> Any:
        start_s = time.perf_counter()
        handle = self.runner.execute(step)
        launched_s = time.perf_counter()
        begun_at_s = max(launched_s, self._free_at_s)
        self._free_at_s = begun_at_s + self.step_s
        log, i = self.log, step.step
        log.num_seqs[i], log.num_tokens[i] = len(step.rows), step.num_tokens
        log.execute_s[i], log.begun_at_s[i] = launched_s - start_s, begun_at_s
        return _Launched(handle, i, self._free_at_s, log)


def null_forward(token_ids: torch.Tensor, metadata: Any, cache: Any, capture: Sequence[int] = ()) -> Any:
    """Stand in for `Decoder.forward`."""
    hidden = (metadata.positions + 1) * POSITION_FACTOR
    hidden += token_ids * TOKEN_FACTOR
    return hidden.remainder_(NUM_IDS).unsqueeze(1), []


def null_logits(hidden: torch.Tensor) -> torch.Tensor:
    """Stand in for `Decoder.logits`."""
    return hidden


def null_sample(logits: torch.Tensor, params: SampleParams, *, out: SampleOutput | None = None) -> SampleOutput:
    """Stand in for the op."""
    assert out is None
    token_ids = logits[:, 0]
    if params.seed is not None:
        token_ids = (token_ids + params.seed).remainder_(NUM_IDS)
    return SampleOutput(token_ids, torch.zeros(len(token_ids), dtype=torch.bool))


def expected_tokens(prompts: Sequence[Sequence[int]], seeds: Sequence[int], num_tokens: int) -> npt.NDArray[np.int64]:
    """Return what each sequence must get, [num_seqs, num_tokens]; a seed of 0 stands for a greedy one."""
    last = np.array([prompt[-1] for prompt in prompts], dtype=np.int64)
    length = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    found = np.empty((len(prompts), num_tokens), dtype=np.int64)
    for i in range(num_tokens):
        last = ((last * TOKEN_FACTOR + length * POSITION_FACTOR) % NUM_IDS + np.array(seeds)) % NUM_IDS
        found[:, i], length = last, length + 1
    return found


def write_checkpoint(folder: Path) -> Path:
    """Write what `null_engine` starts: a model's shape and SmolLM2's tokenizer."""
    metadata = resolve_model("smollm2-135m", load_format="dummy").tokenizer_metadata
    assert metadata is not None
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(Tokenizer.from_gguf(metadata).parts().backend)
    return folder


def set_device(folder: Path, step_s: float, log: Path) -> None:
    """Say what the device of the next `null_engine` over this folder is like."""
    (folder / "null_device.json").write_text(json.dumps({"step_s": step_s, "log": str(log)}))


def null_engine(config: EngineConfig, **options: Any) -> Engine:
    """Start an engine over a folder of `write_checkpoint` and `set_device`; called as `start_engine` is."""
    torch.set_num_threads(1)
    engine = start_engine(config, **options)
    settings = json.loads((Path(config.model) / "null_device.json").read_text())
    log = StepLog(Path(settings["log"]))
    runner: Any = engine.core.runner
    runner.model.forward, runner.model.logits = null_forward, null_logits
    dispatch.active["sample"] = null_sample
    dispatch.active["plan_paged_attention"] = lambda *_, **__: None
    engine.core.runner = _NullDevice(runner, settings["step_s"], log)
    _log_scheduler(engine, log)
    return engine


def _log_scheduler(engine: Engine, log: StepLog) -> None:
    scheduler: Any = engine.core.scheduler
    schedule, update = scheduler.schedule, scheduler.update

    def timed_schedule() -> Any:
        start_s = time.perf_counter()
        work = schedule()
        if work is not None:
            log.schedule_s[work.step] = time.perf_counter() - start_s
        return work

    def timed_update(work: SchedulerOutput, output: ModelOutput) -> Any:
        start_s = time.perf_counter()
        said = update(work, output)
        log.ended_at_s[work.step] = now_s = time.perf_counter()
        log.update_s[work.step] = now_s - start_s
        log.cpu_at_s[work.step] = time.thread_time()
        log.last = work.step
        return said

    scheduler.schedule, scheduler.update = timed_schedule, timed_update


def null_llm(config: EngineConfig) -> LLM:
    """Return the front for programs over a null engine; the log also has the time that its texts take."""
    real, front.start_engine = front.start_engine, null_engine
    try:
        llm = front.LLM(config=config)
    finally:
        front.start_engine = real
    texts: Any = llm._texts
    process, log = texts.process, log_of(llm.engine)
    pieces = llm.tokenizer.pieces(skip_special_tokens=True)
    for token_id in range(NUM_IDS):
        pieces[token_id]  # a server that runs has met them all

    def timed_process(news: Any) -> Any:
        start_s = time.perf_counter()
        found = process(news)
        log.text_s[log.last] += time.perf_counter() - start_s
        return found

    texts.process = timed_process
    return llm


def log_of(engine: Engine) -> StepLog:
    """Return the log of a null engine."""
    runner: Any = engine.core.runner
    log: StepLog = runner.log
    return log
