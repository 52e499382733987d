"""This module checks that an engine on compiled kernels has compiled all of them before it serves. It does not know
what they compute.

Engines on compiled kernels run in programs of their own, on a GPU that is not there: this process interprets kernels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from octavo.engine.config import EngineConfig, ModelConfig, RopeConfig
from octavo.engine.errors import ConfigError
from octavo.engine.llm import LLM
from octavo.engine.resolve import Hardware, resolve
from octavo.kernels import use_backend

from ..kernels.aot.programs import output_of

PHASE = "compile the kernels"
MODEL = ModelConfig(
    family="qwen3",
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_layers=4,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_position=256,
    rope=RopeConfig(theta=1e4, rotary_dim=8, style="interleaved"),
    qk_norm=True,
)
WARMED = [
    ("llama", ()),
    ("qwen3, a window in one layer", ("--num-valid-ids", "290")),
]
MORE_WARMED = [
    ("mistral", ("--num-valid-ids", "290")),
    ("gpt2", ()),
    ("llama", ("--kv-cache-dtype", "int8")),
    ("llama", ("--kv-cache-dtype", "fp8")),
]


def random_engine(*arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(output_of("random_engine.py", *arguments))
    return report


@pytest.mark.parametrize(
    ("config", "settings"), [*WARMED, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE_WARMED)]
)
def test_what_a_random_run_launches_has_been_compiled_and_loaded(
    config: str, settings: tuple[str, ...], count: Callable[[int, int], int], seed: int
) -> None:
    batches = count(2, 10)
    report = random_engine(f"--config={config}", *settings, f"--batches={batches}", f"--seed={seed}")
    assert report["num_warmed"] == report["num_loaded"] > 30
    assert report["launched_before"] == 0
    assert report["is_warm"]
    assert (report["num_late"], report["late"], report["warnings"]) == (0, [], [])
    assert report["num_launched"] > 15
    assert report["never_launched"] == ["_copy_kernel"]  # and this no engine launches yet
    assert report["phase"].startswith(f"{report['num_warmed']} variants, ")
    first, *ready = report["told"]
    assert first == PHASE
    total = report["num_warmed"]
    words = [f"{PHASE}: {done} of {total}, " for done in range(1, total + 1)]
    assert all(text.startswith(word) for text, word in zip(ready, words, strict=True))


def test_captured_steps_launch_only_what_has_been_compiled() -> None:
    """Their tables are as wide as the longest sequence there can be, and their batches padded."""
    report = random_engine("--graphs", "--batches=2")
    assert (report["num_late"], report["late"], report["warnings"]) == (0, [], [])
    assert report["num_captured"] > 10


def test_what_the_warm_up_is_not_told_of_is_late_and_warned_of_once() -> None:
    """The negative control."""
    report = random_engine("--forget=_choose_kernel", "--batches=2")
    assert report["num_late"] == len(report["late"]) > 1
    assert set(report["late"]) == {"_choose_kernel"}
    (warning,) = report["warnings"]
    assert warning.startswith("kernel _choose_kernel was compiled after warm-up")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_where_no_kernel_is_compiled_there_is_no_such_phase(make_llm: Callable[..., LLM], backend: str) -> None:
    """On the torch backend, and under the interpreter."""
    told: list[str] = []
    with use_backend("torch"):
        engine = make_llm(backend=backend, on_phase=told.append).engine
    assert told[-1] == "allocate the KV cache"
    assert [phase.name for phase in engine.phases] == told


def resolved(**settings: Any) -> Any:
    hardware = Hardware("cuda", "a GPU", 2**30)
    config = EngineConfig.from_settings({"dtype": "float16", "block_size": 16} | settings)
    return resolve(config, MODEL, hardware)


@pytest.mark.parametrize(("kind", "cache"), [("auto", "auto"), ("int8", "int8"), ("fp8", "e4m3")])
def test_kernels_are_compiled_for_what_keys_and_values_are_stored_as(kind: str, cache: str) -> None:
    from octavo.engine.runner.warmup import kernel_settings

    assert kernel_settings(resolved(kv_cache_dtype=kind)).cache == cache


def test_kernels_are_compiled_for_the_model_and_the_limits() -> None:
    from octavo.engine.runner.warmup import kernel_models, kernel_settings

    limits = resolved(max_num_seqs=7, max_num_batched_tokens=100, max_model_len=200, kv_cache_tokens=320)
    settings = kernel_settings(limits)
    assert dataclasses.asdict(settings) == {
        "block_size": 16, "cache": "auto", "invariant": False, "max_num_batched_tokens": 100, "max_num_seqs": 7,
        "max_model_len": 200, "num_blocks": 21,
    }  # fmt: skip
    (model,) = kernel_models(MODEL, limits.dtype, num_valid_ids=290)
    assert dataclasses.asdict(model) == {
        "num_q_heads": 6, "num_kv_heads": 2, "head_dim": 16, "hidden_size": 64, "intermediate_size": 96,
        "vocab_size": 300, "dtype": "float16", "norm": "rms_norm", "activation": "silu", "gated": True, "rotary": True,
        "rotary_dim": 8, "rope_style": "interleaved", "head_norm": True, "window": None, "num_valid_ids": 290,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("windows", "expected"),
    [((), {None}), ((None,) * 4, {None}), ((9, 9, 9, 9), {9}), ((None, 9, 9, None), {None, 9})],
)
def test_layers_with_and_without_a_window_need_kernels_of_their_own(
    windows: tuple[int | None, ...], expected: set[int | None]
) -> None:
    from octavo.engine.runner.warmup import kernel_models

    models = kernel_models(dataclasses.replace(MODEL, windows=windows), resolved().dtype, None)
    assert {model.window for model in models} == expected
    assert len(models) == len(expected)


def test_a_model_that_no_kernel_takes_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.engine.runner import warmup

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("head_dim is 512; the triton backend takes 16 to 256")

    monkeypatch.setattr(warmup, "warm_up", refuse)
    with pytest.raises(ConfigError, match=r"cannot run on the triton backend: head_dim is 512; .* takes 16 to 256"):
        warmup.warm_kernels(MODEL, resolved(), num_valid_ids=None)
