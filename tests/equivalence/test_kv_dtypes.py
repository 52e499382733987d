"""This module holds keys and values in eight bits: how far answers move, in every way of running, and that wrong scales
move them further than is allowed. It does not know how anything is quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine.errors import ConfigError
from octavo.engine.layers import attention
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.tools.verify import Focus, Report, Text, verify, verify_page
from octavo.engine.tools.verify.report import QUANTISED_KL
from safetensors.torch import load_file, save_file

from ..checkpoints import make_prompts, make_tiny_llama
from ..smollm2 import load_prompts, spread
from .conftest import MakeLLM
from .runs import Task, run

KINDS = ("int8", "fp8")
SMOLLM2_DIFFERENCE = {"int8": 0.05, "fp8": 0.1}
"""Nats, in the mean, between the log-probabilities that two runs give the tokens of a prompt."""


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    first, second, third = make_prompts([80, 33, 50], seed=8)
    named = [first, second, third, first[:48] + second]
    return [Text(f"text {i}", token_ids) for i, token_ids in enumerate(named)]


def checked(llm: LLM, texts: list[Text], condition: str | None = None) -> Report:
    return verify(llm.engine, texts, against="torch", focus=Focus(condition))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_near_in_every_way_of_running(kind: str, make_llm: MakeLLM, texts: list[Text]) -> None:
    """Alone, batched, token by token, in chunks, preempted, from the prefix cache; every op equals its replay."""
    report = checked(make_llm(kv_cache_dtype=kind, kv_cache_tokens=512), texts)
    assert report.passed, report.first
    means = [float(each.logits.kl.mean()) for each in report.conditions]
    assert len(means) == 6
    assert max(means) < QUANTISED_KL[kind]
    assert min(means) > 1e-6, "nothing was quantised"
    assert max(means) < 3 * min(means), "a way of running loses more than the others"
    assert report.ops["paged_attention_decode"].num_replays > 0
    assert report.kv_cache_dtype == kind
    assert verify_page(report)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_near_on_the_triton_backend(kind: str, make_llm: MakeLLM, texts: list[Text]) -> None:
    some = [Text("long", texts[1].token_ids), Text("short", texts[0].token_ids[:18])]
    report = checked(make_llm(kv_cache_dtype=kind, kv_cache_tokens=512, backend="triton"), some, "chunked")
    assert report.passed, report.first
    assert 1e-6 < report.conditions[0].logits.kl.mean() < QUANTISED_KL[kind]


@contextmanager
def reading(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Change what attention is told of scales."""
    with monkeypatch.context() as patch:
        for name in ("paged_attention_prefill", "paged_attention_decode"):
            real = getattr(attention, name)

            def changed(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                if kwargs["k_scale"] is not None:  # the reference stores what it computes
                    change(kwargs)
                return real(*args, **kwargs)

            patch.setattr(attention, name, changed)
        yield


def swap(kwargs: dict[str, Any]) -> None:
    kwargs["k_scale"], kwargs["v_scale"] = kwargs["v_scale"], kwargs["k_scale"]


def neighbours(name: str, dim: int) -> Callable[[dict[str, Any]], None]:
    def change(kwargs: dict[str, Any]) -> None:
        kwargs[name] = kwargs[name].roll(1, dims=dim)

    return change


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "those of k for v": swap,
    "the neighbour slot's, of keys": neighbours("k_scale", 2),
    "the neighbour slot's, of values": neighbours("v_scale", 2),
    "the other head's, of values": neighbours("v_scale", 1),
    "the neighbour block's, of values": neighbours("v_scale", 0),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_scales_of_int8_are_seen(
    name: str, make_llm: MakeLLM, texts: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(kv_cache_dtype="int8", kv_cache_tokens=512)
    with reading(monkeypatch, WRONG[name]):
        report = checked(llm, texts, "chunked")
    assert report.conditions[0].logits.kl.mean() > QUANTISED_KL["int8"]
    assert not report.passed


def test_scales_that_a_blocks_last_owner_left_are_seen(
    make_llm: MakeLLM, texts: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written once and never again: blocks that are used again, as in all ways but the first two, hold others'."""
    real = attention.write_kv

    def once(*args: Any, **kwargs: Any) -> None:
        kept = {name: kwargs[name].clone() for name in ("k_scale", "v_scale") if kwargs[name] is not None}
        real(*args, **kwargs)
        for name, before in kept.items():
            kwargs[name].copy_(torch.where(before > 0, before, kwargs[name]))

    llm = make_llm(kv_cache_dtype="int8", kv_cache_tokens=512)
    monkeypatch.setattr(attention, "write_kv", once)
    assert checked(llm, texts, "preempted").conditions[0].logits.kl.mean() > QUANTISED_KL["int8"]


def with_scales(folder: Path, k_scale: float, v_scale: float) -> Path:
    """Write the tiny model, with scales for its keys and values."""
    make_tiny_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([value])
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits_kl(folder: Path, texts: list[Text]) -> float:
    llm = LLM(str(folder), device="cpu", block_size=16, kv_cache_tokens=512, kv_cache_dtype="fp8")
    return float(checked(llm, texts, "chunked").conditions[0].logits.kl.mean())


def test_scales_of_a_checkpoint_are_used(tmp_path: Path, make_llm: MakeLLM, texts: list[Text]) -> None:
    plain = checked(make_llm(kv_cache_dtype="fp8", kv_cache_tokens=512), texts, "chunked")
    expected = float(plain.conditions[0].logits.kl.mean())
    fine, coarse, narrow = (tmp_path / name for name in ("fine", "coarse", "narrow"))
    for folder in (fine, coarse, narrow):
        folder.mkdir()
    # A power of two moves only what is below the normal numbers of e4m3.
    assert logits_kl(with_scales(fine, 2**-4, 2**-5), texts) == pytest.approx(expected, rel=0.2)
    # So large that all numbers become the smallest ones; so small that all are clamped.
    assert logits_kl(with_scales(coarse, 300.0, 300.0), texts) > 2 * QUANTISED_KL["fp8"]
    assert logits_kl(with_scales(narrow, 1e-3, 1e-3), texts) > 2 * QUANTISED_KL["fp8"]


@pytest.mark.parametrize("wrong", [{"k_scale": 1.0}, {"v_scale": 1.0}], ids=str)
def test_a_scale_that_is_forgotten_when_reading_is_seen(
    wrong: dict[str, float], tmp_path: Path, texts: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_scales(tmp_path, 0.5, 0.5)
    with reading(monkeypatch, lambda kwargs: kwargs.update(wrong)):
        assert logits_kl(folder, texts) > QUANTISED_KL["fp8"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_never_written_is_never_read(kind: str, make_llm: MakeLLM, tasks: list[Task]) -> None:
    """Scales and numbers of slots that nobody owns may be anything."""
    llm = make_llm(kv_cache_dtype=kind, prefix_caching=False)
    expected = run(llm, tasks)
    cache = llm.engine.core.runner.cache  # type: ignore[attr-defined]
    for tensor in (each for layer in cache for each in layer.tensors):
        if tensor.dtype == torch.float32:
            tensor.fill_(float("nan"))
        else:
            tensor.view(torch.int8).fill_(127)  # NaN in e4m3
    found = run(llm, tasks)
    for one, other in zip(found, expected, strict=True):
        assert [choice.token_ids for choice in one.outputs] == [choice.token_ids for choice in other.outputs]


WAYS: dict[str, dict[str, Any]] = {
    "chunks of 16": {"max_num_batched_tokens": 16},
    "preemption every 3 steps, chunks of 16": {"preempt_every": 3, "max_num_batched_tokens": 16},
    "preemption every 5 steps, cache missed": {"preempt_every": 5, "miss_prefix_cache": True, "max_num_seqs": 5},
    "a small pool": {"kv_cache_tokens": 160, "max_model_len": 160},
    "blocks of 64": {"block_size": 64},
}
"""Of `test_matrix.py`, those that cut and use blocks again in the most ways."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_prompts_are_read_alike_in_every_way(way: str, kind: str, make_llm: MakeLLM, tasks: list[Task]) -> None:
    """What a GEMM rounds otherwise falls on another side of a half now and then, so that bits differ: little, and not
    in the mean.
    """
    few = [Task(task.prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)) for task in tasks[:9]]
    differences = []
    expected, found = (run(make_llm(kv_cache_dtype=kind, **more), few) for more in ({}, WAYS[way]))
    for one, other in zip(found, expected, strict=True):
        pairs = zip(one.prompt_logprobs or [], other.prompt_logprobs or [], strict=True)
        differences += [abs(a.logprob - b.logprob) for a, b in pairs if a is not None and b is not None]
    assert len(differences) > 300
    assert np.mean(differences) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_smollm2_says_nearly_the_same(kind: str, count: Callable[[int, int], int]) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
    answers = []
    for stored in ("auto", kind):
        llm = LLM("smollm2-135m", device="cpu", kv_cache_dtype=stored, kv_cache_tokens=2048)
        answers.append(run(llm, [Task(llm.encode(prompt), params) for prompt in spread(load_prompts(), count(2, 12))]))
    differences = [
        abs(one.logprob - other.logprob)
        for exact, near in zip(*answers, strict=True)
        for one, other in zip(exact.prompt_logprobs or [], near.prompt_logprobs or [], strict=True)
        if one is not None and other is not None
    ]
    assert 0 < np.mean(differences) < SMOLLM2_DIFFERENCE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_promised_bit_by_bit(kind: str, make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match=f"invariant is set and kv_cache_dtype is {kind}; allowed: auto"):
        make_llm(kv_cache_dtype=kind, invariant=True)
