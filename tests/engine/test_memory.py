"""This module holds what is made of measured memory, and of memory that runs out. It does not know a GPU: what torch
would say of one is said by the tests.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine import startup
from octavo.engine.config import EngineConfig
from octavo.engine.errors import CapacityError, ConfigError
from octavo.engine.footprint import split_bytes, table_bytes
from octavo.engine.llm import LLM
from octavo.engine.memory import Measured, as_measured, out_of_memory, resize, ways_to_spare
from octavo.engine.resolve import Hardware, ResolvedConfig, changed, flags, resolve
from octavo.engine.runner import kv_cache
from octavo.engine.runner.largest_step import largest_step
from octavo.engine.step import FinishReason
from octavo.engine.tools.plan import read_model
from octavo.kernels import dispatch, interpreted, use_backend
from triton.runtime.interpreter import GridExecutor

from ..tools.plan.live_tensors import LiveTensors

GIB = 2**30
LLAMA = read_model(str(Path(__file__).parent.parent / "tools" / "plan" / "configs" / "llama-3.1-8b.json"))
GPU = Hardware("cuda", "a GPU", 40 * GIB)
OUT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 39.39 GiB of which 1.50 GiB is "
    "free. Process 7 has 37.89 GiB memory in use. Of the allocated memory 30 GiB is allocated by PyTorch."
)


def config(**settings: Any) -> EngineConfig:
    return EngineConfig.from_settings(settings)


def total(resolved: ResolvedConfig) -> int:
    return resolved.weight_bytes + resolved.graph_bytes + resolved.activation_bytes + resolved.kv_cache_bytes


def as_reckoned(resolved: ResolvedConfig, hardware: Hardware = GPU) -> Measured:
    """Return what a measurement shows where all is as it was reckoned."""
    held = resolved.weight_bytes + table_bytes(LLAMA, resolved.max_model_len)
    splits = split_bytes(LLAMA, num_seqs=resolved.max_num_seqs, kv_tokens=0)
    return Measured(hardware.available_bytes - held, resolved.step_bytes - splits)


def resized(wanted: EngineConfig, resolved: ResolvedConfig, measured: Measured) -> ResolvedConfig:
    return resize(wanted, LLAMA, as_measured(LLAMA, GPU, resolved, measured), resolved)


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "int8"}, {"kv_cache_tokens": 6400}, {"max_num_seqs": 7}])
def test_a_measurement_that_shows_what_was_reckoned_changes_nothing(settings: dict[str, Any]) -> None:
    # A table as long as the pool lets it be leaves a little more than one of the model's whole length.
    wanted = config(**settings, max_model_len=4096)
    resolved = resolve(wanted, LLAMA, GPU)
    assert resized(wanted, resolved, as_reckoned(resolved)) == resolved


@pytest.mark.parametrize("more", [-3 * GIB, -1, 1 << 20, 5 * GIB])
def test_the_pool_grows_and_shrinks_by_what_was_measured(more: int) -> None:
    wanted = config(max_model_len=4096, gpu_memory_utilization=0.8)
    resolved = resolve(wanted, LLAMA, GPU)
    free_bytes, step_bytes = as_reckoned(resolved)
    found = [
        resized(wanted, resolved, Measured(free_bytes - more, step_bytes)),
        resized(wanted, resolved, Measured(free_bytes, step_bytes + more)),
    ]
    assert found[0] == found[1]
    block = resolved.block_size * resolved.kv_bytes_per_token
    split = (resolved.activation_bytes - resolved.step_bytes - table_bytes(LLAMA, 4096)) // resolved.num_blocks
    assert (resolved.num_blocks - found[0].num_blocks) * (block + split) == pytest.approx(0.8 * more, abs=block + split)


def test_the_pool_takes_its_share_of_what_is_really_left() -> None:
    wanted = config(max_model_len=4096, gpu_memory_utilization=0.5)
    resolved = resolve(wanted, LLAMA, GPU)
    found = resized(wanted, resolved, Measured(20 * GIB, 4 * GIB))
    splits = found.activation_bytes - found.step_bytes - table_bytes(LLAMA, 4096)
    left = 16 * GIB - split_bytes(LLAMA, num_seqs=256, kv_tokens=0) - found.graph_bytes
    assert found.kv_cache_bytes + splits == pytest.approx(left / 2, rel=0.001)
    assert found.kv_cache_bytes + splits <= left / 2


def test_the_longest_sequence_becomes_shorter_but_not_longer() -> None:
    wanted = config()
    resolved = resolve(wanted, LLAMA, replace(GPU, available_bytes=24 * GIB))
    assert resolved.max_model_len == resolved.num_blocks * 64 < LLAMA.max_position
    free_bytes, step_bytes = as_reckoned(resolved, replace(GPU, available_bytes=24 * GIB))
    more = resized(wanted, resolved, Measured(free_bytes + GIB, step_bytes))
    assert more.num_blocks > resolved.num_blocks
    assert more.max_model_len == resolved.max_model_len
    (told,) = [choice for choice in more.choices if choice.name == "max_model_len"]
    assert told.reason == "lowered from 131,072: the KV pool"
    less = resized(wanted, resolved, Measured(free_bytes - GIB, step_bytes))
    assert less.max_model_len == less.num_blocks * 64 < resolved.max_model_len
    assert len([choice for choice in less.choices if choice.name == "max_model_len"]) == 1


def test_too_little_is_told_with_what_would_fit() -> None:
    wanted = config(max_model_len=131_072)
    resolved = resolve(wanted, LLAMA, GPU)
    free_bytes, step_bytes = as_reckoned(resolved)
    with pytest.raises(CapacityError, match=r"a sequence of 131,072 tokens takes 16.00 GiB") as error:
        resized(wanted, resolved, Measured(free_bytes, step_bytes + 10 * GIB))
    assert "; try --max-model-len " in str(error.value)
    assert "--kv-cache-dtype fp8" in str(error.value)
    with pytest.raises(CapacityError, match="take"):
        resized(wanted, resolved, Measured(GIB, 10 * GIB))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["gpu_memory_utilization", "max_num_batched_tokens"]),
        ({"kv_cache_tokens": 100_000}, ["kv_cache_tokens", "kv_cache_dtype", "max_num_batched_tokens"]),
        ({"kv_cache_tokens": 100_000, "kv_cache_dtype": "int8"}, ["kv_cache_tokens", "kv_cache_dtype"]),
        ({"kv_cache_tokens": 100_000, "kv_cache_dtype": "fp8"}, ["kv_cache_tokens", "max_num_batched_tokens"]),
        ({"max_num_batched_tokens": 1}, ["max_model_len"]),
        ({"gpu_memory_utilization": 0.1}, ["max_num_batched_tokens"]),
    ],
    ids=str,
)
def test_what_to_change_once_memory_has_run_out(settings: dict[str, Any], names: list[str]) -> None:
    wanted = config(**settings)
    resolved = resolve(wanted, LLAMA, GPU)
    ways = ways_to_spare(wanted, LLAMA, GPU, resolved)
    assert [name for way, _ in ways for name in way][: len(names)] == names
    before = total(resolved)
    for way, spared in ways:
        grows = way.keys() & {"gpu_memory_utilization", "max_model_len"}
        pool = {} if grows else {"kv_cache_tokens": resolved.num_blocks * 64}
        less = resolve(changed(wanted, pool | dict(way)), LLAMA, GPU)
        assert before - total(less) == spared > 0
    said = str(out_of_memory(torch.OutOfMemoryError(OUT), "run a step", wanted, LLAMA, GPU, resolved))
    assert said.startswith("a GPU has run out of memory (run a step): CUDA out of memory. Tried to allocate 2.00 GiB. ")
    assert "of which 1.50 GiB is free; try --" in said
    assert [flags(way) for way, _ in ways] == re.findall(r"(--[^(]*) \([\d.]+ GiB less\)", said)


def test_every_way_to_spare_is_one(count: Callable[[int, int], int], seed: int) -> None:
    """Never raises, and never tells of what an engine would refuse."""
    rng, num_ways = random.Random(seed), 0
    for _ in range(count(60, 1000)):
        hardware = Hardware(rng.choice(["cpu", "cuda"]), "this machine", int(rng.uniform(20, 80) * GIB))
        settings = {
            "kv_cache_tokens": rng.choice([None, 64, 100, 4096, 10**5]),
            "max_num_seqs": rng.choice([1, 2, 256]),
            "max_num_batched_tokens": rng.choice([None, 1, 300]),
            "gpu_memory_utilization": rng.choice([0.05, 0.5, 1.0]),
            "kv_cache_dtype": rng.choice(["auto", "int8", "fp8"]),
        }
        wanted = config(**settings)
        try:
            resolved = resolve(wanted, LLAMA, hardware)
        except (CapacityError, ConfigError):
            continue
        for way, _ in ways_to_spare(wanted, LLAMA, hardware, resolved):
            resolve(changed(wanted, way), LLAMA, hardware)
            num_ways += 1
    assert num_ways > 50


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        ({"max_num_batched_tokens": 100, "max_num_seqs": 4, "max_model_len": 256}, [1, 1, 1, 97]),
        ({"max_num_batched_tokens": 100, "max_num_seqs": 4, "max_model_len": 41}, [1, 19, 40, 40]),
        ({"max_num_batched_tokens": 100, "max_num_seqs": 4, "max_model_len": 11}, [10, 10, 10, 10]),
        ({"max_num_batched_tokens": 3, "max_num_seqs": 3, "max_model_len": 256}, [1, 1, 1]),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 1, "max_model_len": 2}, [1]),
    ],
    ids=str,
)
def test_the_largest_step_is_as_large_as_the_limits(limits: dict[str, int], lengths: list[int]) -> None:
    step = largest_step(resolve(config(**limits, block_size=16), LLAMA, GPU))
    assert step.num_scheduled_tokens.tolist() == lengths
    assert step.num_tokens == sum(lengths)
    assert step.sampled.tolist() == list(range(len(lengths)))
    assert (step.num_decodes, step.num_decode_tokens) == (
        sum(length <= 16 for length in lengths),
        sum(length for length in lengths if length <= 16),
    )
    tables: dict[int, list[int]] = {}
    for row, column, block in zip(step.block_rows, step.block_columns, step.block_ids, strict=True):
        assert column == len(tables.setdefault(int(row), []))
        tables[int(row)].append(int(block))
    assert [tables[row] for row in range(len(lengths))] == [list(range(1, -(-n // 16) + 1)) for n in lengths]
    assert [len(sequence.token_ids) for sequence in step.new_sequences] == lengths


def zeros(shape: tuple[int, ...], dtype: torch.dtype, _device: torch.device) -> torch.Tensor:
    """Return what is counted, as numpy's memory is not."""
    return torch.zeros(math.prod(shape) * dtype.itemsize, dtype=torch.uint8).view(dtype).view(shape)


class FakeGpu:
    """Says what torch.cuda would, of tensors on the CPU."""

    def __init__(self, free_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free_bytes = free_bytes
        self.measured: list[int] = []
        self.factor = 1.0
        monkeypatch.setattr(kv_cache, "_zeros", zeros)
        monkeypatch.setattr(startup, "_is_measured", lambda resolved: True)
        monkeypatch.setattr(startup, "free_gpu_bytes", lambda: self.free_bytes)
        monkeypatch.setattr(startup, "peak_gpu_bytes", self._peak)

    def _peak(self, run: Callable[[], object]) -> int:
        with LiveTensors() as live:
            run()
        self.measured.append(int(live.peak * self.factor))
        return self.measured[-1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    if interpreted():  # what the kernels compute means nothing here
        monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    # But for this one: tables are looked up with what it makes.
    monkeypatch.setitem(dispatch.OPS["expand_rows"], "triton", dispatch.OPS["expand_rows"]["torch"])
    with use_backend("torch"):  # an engine chooses the backend of its process
        yield FakeGpu(3 << 19, monkeypatch)


SETTINGS: dict[str, Any] = {
    "invariant": False, "backend": "triton", "kv_cache_tokens": None, "max_num_seqs": 16, "max_num_batched_tokens": 200,
    "prefix_caching": False,
}  # fmt: skip


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_the_largest_step_takes_what_was_predicted(
    kv_cache_dtype: str, gpu: FakeGpu, make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(**SETTINGS, kv_cache_dtype=kv_cache_dtype)
    resolved = llm.engine.resolved
    (peak,) = gpu.measured
    num_blocks = -(-185 // 16)
    step_bytes = peak - (num_blocks + 1) * 16 * resolved.kv_bytes_per_token
    # What a runner keeps comes on top of a step's tensors; splits are reckoned with at their most.
    assert 0.5 * resolved.step_bytes < step_bytes < 1.1 * resolved.step_bytes
    phases = [phase.name for phase in llm.engine.phases]
    assert phases[-2:] == ["measure the largest step", "allocate the KV cache"]
    detail = llm.engine.phases[-2].detail
    assert detail.startswith(f"{step_bytes / GIB:,.2f} GiB, predicted {resolved.step_bytes / GIB:,.2f} GiB; 0.00 GiB")
    cache = llm.engine.core.runner.cache  # type: ignore[attr-defined]
    assert sum(each.nbytes for layer in cache for each in layer.tensors) == resolved.kv_cache_bytes
    assert len(cache[0].k) == resolved.num_blocks + 1
    left = gpu.free_bytes - step_bytes - split_bytes(llm.engine.model_config, num_seqs=16, kv_tokens=0)
    assert 0.2 * left < resolved.kv_cache_bytes < 0.25 * left  # of a CPU's memory a quarter is taken
    assert not caplog.records or step_bytes > resolved.step_bytes


def test_more_than_was_predicted_is_warned_of(
    gpu: FakeGpu, make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
) -> None:
    gpu.factor, gpu.free_bytes = 3.0, 4 << 20
    larger = make_llm(**SETTINGS).engine.resolved
    (record,) = caplog.records
    assert re.match(r"the largest step takes .* GiB, which is more than the .* GiB reckoned with", record.getMessage())
    gpu.factor = 0.5
    smaller = make_llm(**SETTINGS).engine.resolved
    assert len(caplog.records) == 1
    assert smaller.num_blocks > larger.num_blocks


def test_on_a_cpu_nothing_is_measured(make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "peak_gpu_bytes", None)
    assert "measure the largest step" not in [phase.name for phase in make_llm().engine.phases]


def test_what_to_change_is_reckoned_with_what_was_measured(
    gpu: FakeGpu, make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with what was reckoned to be free: of that there may be much more, and every way would seem to spare none."""
    llm = make_llm(**SETTINGS)
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(startup, "out_of_memory", lambda *args: told.append(args) or CapacityError("no room"))
    monkeypatch.setattr(llm.engine.core.runner, "execute", fail)
    assert "no room" in (llm.generate([1, 2, 3])[0].outputs[0].error or "")
    ((_, doing, wanted, model, hardware, resolved),) = told
    assert (doing, resolved) == ("run a step", llm.engine.resolved)
    assert resize(wanted, model, hardware, resolved).num_blocks == resolved.num_blocks
    assert hardware.available_bytes < 2 * gpu.free_bytes + resolved.weight_bytes


def fail(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(OUT)


@pytest.mark.parametrize("place", ["the weights", "the KV cache"])
def test_a_start_that_runs_out_of_memory_says_what_to_change(
    place: str, make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "the weights":
        monkeypatch.setattr("octavo.engine.models.decoder.Decoder.__init__", fail)
    else:
        monkeypatch.setattr(kv_cache, "_zeros", fail)
    with pytest.raises(CapacityError) as error:
        make_llm()
    said = str(error.value)
    assert re.match(r"this CPU \(\d+ threads?\) has run out of memory \((load|allocate) " + place, said)
    assert "; try --kv-cache-tokens 512 (" in said
    assert "GPU 0 has a total capacity of 39.39 GiB" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        MemoryError("Unable to allocate 8.00 TiB"),
    ],
    ids=["driver", "Triton", "cuBLAS", "CPU", "numpy"],
)
def test_memory_that_runs_out_elsewhere_is_told_of_as_well(
    error: Exception, make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(kv_cache, "_zeros", fault)
    with pytest.raises(CapacityError, match=r"has run out of memory \(allocate the KV cache\)") as told:
        make_llm()
    assert told.value.__cause__ is error
    assert "; try --kv-cache-tokens 512 (" in str(told.value)


def test_another_fault_of_a_start_stays_what_it_is(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = KeyError("cause")

    def fault(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory at all") from cause

    monkeypatch.setattr(kv_cache, "_zeros", fault)
    with pytest.raises(RuntimeError, match="no memory at all") as error:
        make_llm()
    assert error.value.__cause__ is cause


def test_a_step_that_runs_out_of_memory_ends_its_requests_and_says_what_to_change(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(invariant=False)
    runner = llm.engine.core.runner
    execute, runner.execute = runner.execute, fail  # type: ignore[method-assign]
    failed = llm.generate([1, 2, 3])[0].outputs[0]
    assert failed.finish_reason is FinishReason.ERROR
    assert "has run out of memory (run a step): CUDA out of memory." in (failed.error or "")
    assert "; try --kv-cache-tokens 512 (" in (failed.error or "")
    runner.execute = execute  # type: ignore[method-assign]
    assert llm.generate([1, 2, 3])[0].outputs[0].finish_reason is not FinishReason.ERROR


def test_bytes_of_a_gpu_are_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that can be without one."""
    from octavo.engine import hardware

    told: list[str] = []
    answers = {"memory_allocated": 100, "max_memory_allocated": 350, "mem_get_info": (7, 9)}
    for name in (*answers, "empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: (told.append(name), answers.get(name))[1])
    assert hardware.free_gpu_bytes() == 7
    assert hardware.peak_gpu_bytes(lambda: told.append("run")) == 250
    assert told == [
        *("empty_cache", "mem_get_info"),
        *("reset_peak_memory_stats", "run", "synchronize", "max_memory_allocated", "memory_allocated"),
    ]


def test_scales_that_a_checkpoint_has_are_told_of(gpu: FakeGpu) -> None:
    class Loaded:
        kv_scales: Any = None

    def told(kind: str, scales: Any) -> str:
        resolved = resolve(config(kv_cache_dtype=kind), LLAMA, GPU)
        loaded = Loaded()
        loaded.kv_scales = scales
        return startup._stored(resolved, loaded)  # type: ignore[arg-type]

    scales = np.ones((32, 2)).tolist()
    assert told("fp8", None) == "fp8, with scales of 1"
    assert told("fp8", scales) == "fp8, with the checkpoint's scales"
    assert told("int8", None) == "int8"
    assert told("auto", scales) == "bfloat16; the checkpoint's scales are for fp8"
