"""This module checks decode steps that run as captured graphs, by the stand-in that a CPU has. It does not know a
GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from octavo.engine.config import EngineConfig, ModelConfig
from octavo.engine.errors import ConfigError
from octavo.engine.llm import LLM
from octavo.engine.models.decoder import Decoder
from octavo.engine.resolve import Hardware, resolve
from octavo.engine.runner import cuda_graphs, input_batch
from octavo.engine.runner.cuda_graphs import CAPTURED, DecodeGraphs, bucket_sizes
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.runner.staging import Staging
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import ModelOutput, SchedulerOutput
from octavo.kernels import use_backend

from ..checkpoints import make_prompts, make_tiny_llama
from ..equivalence.runs import Task, assert_same
from ..equivalence.runs import run as run_tasks
from ..models.teacher import load_decoder
from .by_hand import GREEDY, Steps, make_runner, make_sequence, make_step

MORE = "rows with more than one token"


@pytest.fixture(scope="module", autouse=True)
def _torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder, invariant=True)


def test_buckets_are_few() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(3) == [1, 2, 3]
    assert bucket_sizes(9) == [1, 2, 4, 8, 9]
    assert bucket_sizes(256) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert bucket_sizes(65536)[-2:] == [49152, 65536]


def graphs_of(llm: LLM) -> DecodeGraphs:
    runner = llm.engine.core.runner
    assert isinstance(runner, ModelRunner)
    assert runner.graphs is not None
    return runner.graphs


@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
@pytest.mark.parametrize("num_seqs", [1, 2, 3, 4, 5, 8, 9])
def test_same_answers(folder: Path, num_seqs: int, invariant: bool) -> None:
    """Batches at the borders of buckets; each sequence ends at another time, and others join."""
    prompts = make_prompts([3 + 5 * i % 29 for i in range(num_seqs + 2)], seed=num_seqs)
    tasks = [
        Task(prompt, SamplingParams(temperature=i % 2, seed=i, max_tokens=4 + 3 * i % 11, logprobs=2, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]
    settings: dict[str, Any] = {
        "block_size": 16, "kv_cache_tokens": 2048, "max_num_seqs": num_seqs, "max_num_batched_tokens": 64,
        "invariant": invariant, "device": "cpu",
    }  # fmt: skip
    expected = run_tasks(LLM(str(folder), graphs=False, **settings), tasks)
    llm = LLM(str(folder), graphs=True, **settings)
    assert_same(run_tasks(llm, tasks), expected, bitwise=invariant)
    counts = graphs_of(llm).counts
    assert counts[CAPTURED] > 3
    assert set(counts) <= {CAPTURED, MORE}


def decode_run(decoder: Decoder, *, graphs: bool, num_rows: int = 3) -> list[Any]:
    """Return tokens and log-probabilities of rows, of which one leaves and one joins."""
    runner, plan = make_runner(decoder, invariant=True, graphs=graphs), Steps()
    prompts = make_prompts([20, 7, 33, 4, 5], seed=3)
    sequences = [make_sequence(row, prompt, GREEDY) for row, prompt in enumerate(prompts[:num_rows])]
    late = make_sequence(9, [*prompts[4], 1], GREEDY)
    rows = list(range(num_rows))
    steps = [plan({row: len(prompts[row]) for row in rows}, sequences)]
    steps += [plan(dict.fromkeys(rows, 1)) for _ in range(3)]
    steps += [plan(dict.fromkeys(rows[1:], 1), removed=[0]) for _ in range(1)]
    steps += [plan(dict.fromkeys(rows[1:], 1))]
    steps += [plan({9: 6} | dict.fromkeys(rows[1:], 1), [late])]
    steps += [plan(dict.fromkeys([9, *rows[1:]], 1)) for _ in range(3)]
    outputs = [runner.execute(step).wait() for step in steps]
    return [(output.token_ids.tolist(), output.logprobs) for output in outputs]


def test_padding_changes_no_bit(decoder: Decoder) -> None:
    assert decode_run(decoder, graphs=True) == decode_run(decoder, graphs=False)


def padded_with_row_1(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    padded = np.full(size, 1 if fill < 0 else fill, dtype=np.int32)
    padded[: len(array)] = array
    return padded


class Stale:
    """Leaves in the padding the rows that the step before had there."""

    def __init__(self) -> None:
        self._rows = np.full(16, -1, dtype=np.int32)

    def __call__(self, array: np.ndarray, size: int, fill: int) -> np.ndarray:
        padded = self._rows[:size].copy() if fill < 0 else np.full(size, fill, dtype=np.int32)
        padded[: len(array)] = array
        if fill < 0:
            self._rows[:size] = padded
        return padded


@pytest.mark.parametrize("padded", [padded_with_row_1, Stale()], ids=["row 1", "the step before"])
def test_a_real_row_in_the_padding_is_found(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, padded: Callable[..., Any]
) -> None:
    expected = decode_run(decoder, graphs=False, num_rows=4)
    monkeypatch.setattr(input_batch, "_padded", padded)
    assert decode_run(decoder, graphs=True, num_rows=4) != expected


def test_inputs_that_move_are_found(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in goes on reading what it was captured with, as a graph does: here nothing but padding."""
    upload = Staging.upload
    monkeypatch.setattr(Staging, "upload", lambda *args, **more: [each.clone() for each in upload(*args, **more)])
    runner, plan = make_runner(decoder, graphs=True), Steps()
    first = runner.execute(plan({0: 1, 1: 1}, [make_sequence(row, [50 + row], GREEDY) for row in range(2)])).wait()
    assert first.token_ids[0] == first.token_ids[1]  # both are the padding's
    assert first.logprobs[0] == first.logprobs[1]


def test_numbers_of_the_capturing_step_stay(monkeypatch: pytest.MonkeyPatch, decoder: Decoder) -> None:
    """What Python has had a say in when a bucket was captured is the same in every replay."""
    seen = []
    forward = decoder.forward

    def noted(token_ids: torch.Tensor, metadata: Any, *rest: Any) -> Any:
        seen.append((token_ids.data_ptr() > 0, metadata.num_decode_tokens, metadata.decode.block_table.shape))
        return forward(token_ids, metadata, *rest)

    runner, plan = make_runner(decoder, graphs=True), Steps()
    monkeypatch.setattr(decoder, "forward", noted)
    runner.execute(plan({0: 1, 1: 1, 2: 1}, [make_sequence(row, [row]) for row in range(3)])).wait()
    for _ in range(20):
        runner.execute(plan({0: 1, 1: 1, 2: 1})).wait()
    assert set(seen) == {(True, 4, (4, 8))}


def reasons(decoder: Decoder, steps: list[SchedulerOutput]) -> tuple[dict[str, int], list[ModelOutput]]:
    runner = make_runner(decoder, graphs=True)
    outputs = [runner.execute(step).wait() for step in steps]
    assert runner.graphs is not None
    return dict(runner.graphs.counts), outputs


def test_what_runs_op_by_op_is_told_once(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo.engine")
    plan, states = Steps(), SamplingParams(temperature=0, return_hidden_states=[1, 2])
    prompt = SamplingParams(temperature=0, prompt_logprobs=1)
    steps = [
        plan({0: 3}, [make_sequence(0, [1, 2, 3])]),
        plan({0: 1, 1: 5}, [make_sequence(1, [4, 5, 6, 7, 8])]),
        plan({0: 1, 1: 1}),
        plan({0: 1, 1: 1, 2: 1}, [make_sequence(2, [1], states)]),
        plan({0: 1, 1: 1, 2: 1}),
        plan({0: 1, 1: 1, 3: 1}, [make_sequence(3, [1, 2], prompt)], removed=[2]),
        plan({0: 1, 1: 1, 3: 1}),
    ]
    counts, outputs = reasons(decoder, steps)
    asked = "hidden states or logprobs of a prompt"
    assert counts == {MORE: 2, CAPTURED: 2, asked: 3}
    assert [output.hidden_states.keys() for output in outputs[3:5]] == [{2}, {2}]
    assert len(outputs[5].prompt_logprobs[3]) == 1
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"step 0 is run op by op, not as a captured graph: {MORE}; not told again",
        f"step 3 is run op by op, not as a captured graph: {asked}; not told again",
    ]


def test_more_keys_than_the_pool_has_slots(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that share their blocks can have more splits together than were promised to the plan."""
    monkeypatch.setattr(cuda_graphs, "SPLIT_TOKENS", 16)
    graphs = make_runner(decoder, graphs=True).graphs
    assert graphs is not None
    assert graphs._step.max_kv_splits == 128  # 16 rows of 128 tokens
    full = [127] * 16
    assert graphs.bucket(make_step(list(range(16)), full, [1] * 16), wants_states=False) == 16
    monkeypatch.setattr(cuda_graphs, "SPLIT_TOKENS", 8)  # twice the splits that were counted on
    assert graphs.bucket(make_step(list(range(16)), full, [1] * 16), wants_states=False) is None
    assert graphs.bucket(make_step(list(range(8)), full[:8], [1] * 8), wants_states=False) == 8


def test_many_new_blocks(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "NEW_BLOCKS", 9)
    plan = Steps()  # each row joins with all of its 8 blocks
    steps = [plan(dict.fromkeys(range(i + 1), 1), [make_sequence(i, [i])]) for i in range(2)]
    steps.append(plan({0: 1, 1: 1, 2: 1, 3: 1}, [make_sequence(row, [row]) for row in (2, 3)]))
    counts, _ = reasons(decoder, steps)
    assert counts == {CAPTURED: 2, "more than 9 new blocks": 1}


def test_all_at_once_says_what_it_took(decoder: Decoder) -> None:
    runner, told = make_runner(decoder, graphs=True), []
    assert runner.graphs is not None
    words = runner.graphs.capture_all(lambda done, total: told.append((done, total)))
    assert words.startswith("5 batch sizes up to 16, 0 MiB, ")
    assert told == [(done, 5) for done in range(1, 6)]


def break_capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Fail as a GPU does: first an op, and then the end of the capture."""
    try:
        raise ValueError("operation not permitted when stream is capturing")
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_an_engine_that_cannot_capture_runs_op_by_op(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    runner = make_runner(decoder, graphs=True)
    assert runner.graphs is not None
    runner.graphs._capture = break_capture
    words = runner.capture_graphs(lambda _done, _total: None, required=False)
    assert words.startswith("none: RuntimeError(")
    assert words.endswith("after ValueError('operation not permitted when stream is capturing')")
    (told,) = caplog.records
    assert told.levelname == "WARNING"
    assert told.getMessage().endswith("after ValueError('operation not permitted when stream is capturing')")
    sequences = [make_sequence(row, [row], GREEDY) for row in range(2)]
    step = Steps()({0: 1, 1: 1}, sequences)
    expected = make_runner(decoder).execute(step).wait()
    assert runner.execute(step).wait().token_ids.tolist() == expected.token_ids.tolist()


class FakeCuda:
    """The part of `torch.cuda` that captures: what ran on which stream, and which one is in force."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.in_force = "main"
        patch.setattr(torch.cuda, "Stream", lambda: FakeStream(self, "side"))
        patch.setattr(torch.cuda, "current_stream", lambda: FakeStream(self, self.in_force))
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "in_force", stream.name))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.log.append("replay")))
        patch.setattr(torch.cuda, "stream", self._on)
        patch.setattr(torch.cuda, "graph", self._capture)

    @contextmanager
    def _on(self, stream: FakeStream) -> Iterator[None]:
        before, self.in_force = self.in_force, stream.name
        yield
        self.in_force = before

    @contextmanager
    def _capture(self, graph: Any, *, pool: str, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        before, self.in_force = self.in_force, f"capture {pool} {stream.name} {capture_error_mode}"
        yield  # what is raised here is raised by the end of the capture, which then leaves its stream in force
        self.in_force = before


class FakeStream(NamedTuple):
    cuda: FakeCuda
    name: str

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_is_warmed_up_beside_and_leaves_the_stream_in_force(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    cuda, hidden = FakeCuda(monkeypatch), torch.zeros(2)

    def run() -> torch.Tensor:
        cuda.log.append(f"run on {cuda.in_force}")
        if fails and cuda.in_force != "side":
            raise RuntimeError("told to")
        return hidden

    with pytest.raises(RuntimeError, match="told to") if fails else nullcontext():
        assert cuda_graphs._CudaCapture()(run)() is hidden
    warm_up = ["side waits for main", "run on side", "main waits for side"]
    assert cuda.log == [*warm_up, "run on capture pool side thread_local", *["replay"] * (not fails)]
    assert cuda.in_force == "main"


@pytest.mark.parametrize(
    ("raised", "error", "match"),
    [
        (ValueError("not permitted"), ConfigError, "graphs is true and none can be captured: ValueError"),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, "out of memory"),
    ],
)
def test_graphs_that_were_asked_for_and_memory_that_is_missing_end_the_start(
    decoder: Decoder, raised: Exception, error: type[Exception], match: str
) -> None:
    runner = make_runner(decoder, graphs=True)
    assert runner.graphs is not None

    def fail(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise raised

    runner.graphs._capture = fail
    with pytest.raises(error, match=match):
        runner.capture_graphs(lambda _done, _total: None, required=error is ConfigError)
    assert runner.graphs is not None


MODEL = ModelConfig("llama", 300, 64, 96, 2, 4, 2, 16, 256)


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        ("cpu", {}, False),
        ("cpu", {"graphs": True}, True),
        ("cuda", {}, True),
        ("cuda", {"graphs": False}, False),
        ("cuda", {"backend": "torch"}, False),
    ],
)
def test_graphs_are_for_gpus(device: Any, settings: dict[str, Any], expected: bool) -> None:
    config = EngineConfig.from_settings({"kv_cache_tokens": 1024} | settings)
    assert resolve(config, MODEL, Hardware(device, "a machine", 2**33)).graphs is expected


def test_what_cannot_be_captured_is_refused() -> None:
    config = EngineConfig.from_settings({"graphs": True, "backend": "torch"})
    with pytest.raises(ConfigError, match=r"graphs is true and backend is torch on a GPU; allowed: false"):
        resolve(config, MODEL, Hardware("cuda", "a GPU", 2**33))
    with pytest.raises(ConfigError, match=r"graphs is 3; allowed: true, false, or left out for automatic"):
        EngineConfig(graphs=3)  # type: ignore[arg-type]
