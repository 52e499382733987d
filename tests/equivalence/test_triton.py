"""The engine on the Triton kernels against the engine on the torch backend: the same answers to the same requests.

Where there is no GPU the kernels run under Triton's interpreter, so the small tier keeps to few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from octavo.engine.errors import ConfigError
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import RequestOutput
from octavo.kernels import current_backend, use_backend

from ..checkpoints import EOS, make_prompts
from .conftest import MakeLLM
from .runs import Task, assert_same, run, run_alone

ON_TRITON = {"backend": "triton", "device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": "float32"}
WAYS: dict[str, dict[str, Any]] = {
    "in one batch": {},
    "preemption every 2 steps, chunks of 16": {"preempt_every": 2, "max_num_batched_tokens": 16},
}
MORE_WAYS: dict[str, dict[str, Any]] = {
    "one token per step": {"max_num_batched_tokens": 1},
    "no prefix cache": {"prefix_caching": False, "max_num_batched_tokens": 64},
    "a small pool": {"kv_cache_tokens": 160, "max_model_len": 160},
    "blocks of 64": {"block_size": 64},
}


@pytest.fixture(autouse=True)
def _restore_backend() -> Iterator[None]:
    """An engine chooses the backend of its process: what later tests find must not depend on these."""
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def few_tasks() -> list[Task]:
    """Requests that meet every kernel: a shared prefix of whole blocks, filters, penalties, bias, several choices."""
    long, tail, short = make_prompts([40, 9, 5], seed=3)
    greedy = {"temperature": 0, "max_tokens": 4, "logprobs": 2}
    drawn = greedy | {"temperature": 1.0, "seed": 31}
    kinds: list[tuple[list[int], dict[str, Any]]] = [
        (long[:32] + tail, greedy),
        (long, greedy | {"prompt_logprobs": 1}),
        (short, drawn | {"n": 2, "top_k": 30, "top_p": 0.9, "min_p": 0.01}),
        (tail, drawn | {"frequency_penalty": 0.7, "repetition_penalty": 1.3, "logit_bias": {EOS: -100.0, 17: 4.0}}),
        (tail, drawn | {"allowed_token_ids": list(range(40, 90)), "bad_words_token_ids": [[41], [50, 51]]}),
    ]
    return [Task(prompt, SamplingParams(**settings)) for prompt, settings in kinds]


@pytest.fixture(scope="module")
def expected(make_llm: MakeLLM, few_tasks: list[Task]) -> list[RequestOutput]:
    return run(make_llm(backend="torch"), few_tasks)


@pytest.mark.parametrize("way", WAYS)
def test_same_answers(way: str, make_llm: MakeLLM, few_tasks: list[Task], expected: list[RequestOutput]) -> None:
    llm = make_llm(**ON_TRITON, **WAYS[way])
    assert current_backend() == "triton"
    assert_same(run(llm, few_tasks), expected, bitwise=False)


def test_a_warm_prefix_cache(make_llm: MakeLLM, few_tasks: list[Task], expected: list[RequestOutput]) -> None:
    """A second run finds the first one's blocks: their contents, written by the kernel, are what it needs."""
    llm = make_llm(**ON_TRITON)
    run(llm, few_tasks[:1])
    warm = run(llm, few_tasks[:2])
    assert_same(warm, expected[:2], bitwise=False)
    assert warm[0].num_cached_tokens == 32


def test_invariant_mode(make_llm: MakeLLM) -> None:
    """A request's tokens and log-probabilities are the same bits in one batch and in chunks, among preemptions."""
    long, short = make_prompts([37, 6], seed=5)
    drawn = {"temperature": 1.0, "seed": 7}
    settings: list[dict[str, Any]] = [{"temperature": 0, "prompt_logprobs": 1}, drawn | {"top_k": 30}]
    tasks = [
        Task(prompt, SamplingParams(max_tokens=3, logprobs=2, **one))
        for prompt, one in zip((long, short), settings, strict=True)
    ]
    together = run(make_llm(**ON_TRITON, invariant=True), tasks)
    for way in list(WAYS.values())[1:]:
        assert_same(run(make_llm(**ON_TRITON, invariant=True, **way), tasks), together, bitwise=True)


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS | MORE_WAYS)
def test_all_requests_in_invariant_mode(way: str, make_llm: MakeLLM, few_tasks: list[Task]) -> None:
    settings = ON_TRITON | {"invariant": True}
    alone = run_alone(make_llm(**settings, prefix_caching=False), few_tasks)
    assert_same(run(make_llm(**(settings | (WAYS | MORE_WAYS)[way])), few_tasks), alone, bitwise=True)


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS | MORE_WAYS)
def test_all_requests(way: str, make_llm: MakeLLM, tasks: list[Task]) -> None:
    settings = (WAYS | MORE_WAYS)[way]
    assert_same(run(make_llm(**ON_TRITON, **settings), tasks), run(make_llm(**settings), tasks), bitwise=False)


def test_the_cpu_of_a_machine_with_a_gpu_is_refused(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the backend itself could run, only not where the tensors are."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ConfigError, match="backend is 'triton' and device is 'cpu'; allowed: cuda, or auto"):
        make_llm(backend="triton", device="cpu")
