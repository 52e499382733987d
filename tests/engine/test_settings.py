"""This module holds what becomes of an engine's settings on a given machine. It does not know how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from octavo.engine import hardware, startup
from octavo.engine.config import EngineConfig, ModelConfig
from octavo.engine.errors import ConfigError
from octavo.engine.resolve import Hardware, ResolvedConfig, resolve

MODEL = ModelConfig(
    family="llama",
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=256,
)
GIB = 2**30


CPU = Hardware("cpu", "a CPU", GIB)
GPU = Hardware("cuda", "a GPU", GIB)


def settle(hardware: Hardware = CPU, **settings: Any) -> ResolvedConfig:
    return resolve(EngineConfig.from_settings(settings), MODEL, hardware)


def test_a_context_nobody_asked_for_is_lowered_to_the_pool_and_says_so() -> None:
    resolved = settle(kv_cache_tokens=100, block_size=16)
    assert (resolved.num_blocks, resolved.max_model_len) == (6, 96)
    (choice,) = [choice for choice in resolved.choices if choice.name == "max_model_len"]
    assert (choice.value, choice.reason) == ("96", "lowered from 256: the KV pool")


def test_a_context_asked_for_is_honoured_or_refused() -> None:
    assert settle(kv_cache_tokens=100, block_size=16, max_model_len=96).max_model_len == 96
    with pytest.raises(ConfigError, match="max_model_len is 97; allowed: at most the KV pool's 96"):
        settle(kv_cache_tokens=100, block_size=16, max_model_len=97)


@pytest.mark.parametrize("settings", [{"max_model_len": 1}, {"kv_cache_tokens": 1, "block_size": 1}])
def test_a_context_without_room_for_an_output_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 1; allowed: at least 2"):
        settle(**settings)


@pytest.mark.parametrize(
    "name", ["seed", "kv_cache_tokens", "max_num_batched_tokens", "max_model_len", "max_num_seqs", "block_size"]
)
@pytest.mark.parametrize("value", [pytest.param(10**5000, id="huge"), 2**63, -1, True, 1.5, "1"])
def test_numbers_that_no_setting_takes(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is "):
        settle(**{name: value})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable:   2048 kB"}, 2 << 20),
        ({"meminfo": "MemAvailable: 2048 kB", "memory.max": "max\n"}, 2 << 20),
        ({"meminfo": "MemAvailable: 2048 kB", "memory.max": "1000000\n", "memory.current": "400000\n"}, 600_000),
        (
            {
                "meminfo": "MemAvailable: 2048 kB",
                "memory.max": "1000000\n",
                "memory.current": "900000\n",
                "memory.stat": "anon 100\ninactive_file 700000\n",
            },
            800_000,
        ),
    ],
)
def test_memory_left_is_that_of_the_machine_and_its_cgroup(
    files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_read", lambda path: files.get(path.name, ""))
    assert hardware.available_memory_bytes() == expected


def test_a_machine_that_does_not_say_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    monkeypatch.setattr(hardware, "_read", lambda path: "")
    assert hardware.available_memory_bytes() == pytest.approx(total * 1024 / 2, rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_invariant_mode_is_refused_where_it_is_not_proved(dtype: str) -> None:
    assert settle(invariant=True).dtype == "float32"
    with pytest.raises(ConfigError, match=rf"dtype is {dtype}; allowed: float32"):
        settle(invariant=True, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_are_stored_as_is_said(dtype: str) -> None:
    assert settle(dtype=dtype).kv_cache_dtype == dtype
    assert settle(dtype=dtype, kv_cache_dtype="int8").kv_cache_dtype == "int8"
    assert settle(dtype=dtype, kv_cache_dtype="fp8").kv_cache_dtype == "fp8"
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'e4m3'; allowed: auto, int8, fp8"):
        settle(kv_cache_dtype="e4m3")


@pytest.mark.parametrize(("machine", "backend"), [(CPU, "torch"), (GPU, "triton")])
def test_the_backend_follows_the_device_unless_it_is_named(machine: Hardware, backend: str) -> None:
    assert settle(machine).backend == backend
    for named in ("torch", "triton"):
        assert settle(machine, backend=named).backend == named


def test_what_is_the_default_on_a_gpu_is_said_and_what_was_found_there() -> None:
    """Of graphs that cannot be captured it is known only at the end of the start."""

    def said(resolved: ResolvedConfig) -> dict[str, tuple[str, str]]:
        return {each.name: (each.value, each.reason) for each in resolved.choices if each.name in ("overlap", "graphs")}

    class Runner:
        graphs: object = object()

        def capture_graphs(self, _on_progress: object, *, required: bool) -> str:
            assert not required
            self.graphs = None if self.fails else self.graphs
            return "none: why"

        def __init__(self, *, fails: bool) -> None:
            self.fails = fails

    usual = ("true", "default on a GPU")
    assert said(settle(GPU)) == {"overlap": usual, "graphs": usual}
    assert said(settle(GPU, overlap=False, graphs=True)) == said(settle(CPU)) == {}
    for fails, graphs in ((False, usual), (True, ("false", "none could be captured"))):
        plan: Any = startup._Plan(EngineConfig(), cast(Any, None), GPU, settle(GPU))
        found = startup._capture_graphs(plan, cast(Any, Runner(fails=fails)), startup._Phases(None)).resolved
        assert found.graphs is not fails
        assert said(found) == {"overlap": usual, "graphs": graphs}


def test_block_sizes_that_the_kernels_do_not_take_are_refused() -> None:
    assert settle(backend="torch", block_size=24).block_size == 24
    with pytest.raises(ConfigError, match="block_size is 24; allowed: 16, 32, 64, 128"):
        settle(backend="triton", block_size=24)


@pytest.mark.parametrize(
    ("capability", "asked", "found"),
    [
        (None, {"device": "auto"}, "cpu"),
        ((9, 0), {"device": "auto"}, "cuda"),
        ((9, 0), {"device": "auto", "backend": "torch"}, "cpu"),
        ((9, 0), {"device": "cuda", "backend": "torch"}, "cuda"),
        ((9, 0), {"device": "cpu"}, "cpu"),
        ((7, 5), {"device": "auto"}, "cpu"),
        (
            (7, 5),
            {"device": "cuda"},
            r"the GPU's capability is \(7, 5\); allowed: cpu, auto, or a GPU of capability 8.0",
        ),
        (None, {"device": "cuda"}, "no CUDA device is visible; allowed: cpu, auto"),
    ],
)
def test_a_gpu_is_used_where_the_kernels_run_on_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, asked: dict[str, Any], found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, 2 * GIB))
    if found in ("cpu", "cuda"):
        assert hardware.detect(**asked).device == found
    else:
        with pytest.raises(ConfigError, match=found):
            hardware.detect(**asked)


def test_what_torch_keeps_of_an_engine_that_is_gone_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [GIB]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * GIB - sum(kept), 4 * GIB))
    assert hardware.detect("auto").available_bytes == 3 * GIB
