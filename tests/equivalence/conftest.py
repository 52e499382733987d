"""What the equivalence tests share: a tiny llama that takes text, engines around it, and a mixed workload."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams

from ..checkpoints import EOS, make_prompts, make_tiny_llama
from .runs import Task

MakeLLM = Callable[..., LLM]

ROOMY: dict[str, Any] = {
    "block_size": 16,
    "kv_cache_tokens": 8192,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 4096,
    "device": "cpu",
}
STRUCTURED: dict[str, Any] = {"structured_outputs": {"regex": "([a-z]{3} )*[0-9]"}, "n": 2, "max_tokens": 20}
"""Left out where the package for it is not installed: all the others shall run on a machine with a GPU, too."""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def make_llm(tiny_folder: Path) -> MakeLLM:
    """Return `make_llm(**settings)`: the tiny model with room for everything, unless the settings say otherwise."""
    return lambda **settings: LLM(str(tiny_folder), **(ROOMY | settings))


@pytest.fixture(scope="session")
def tasks() -> list[Task]:
    """Requests of every kind: short and long, sharing prefixes, one twice, with every feature that keeps state."""
    long, tail, short, one, exact = make_prompts([100, 20, 7, 1, 32], seed=11)
    shared = [long[:64] + tail, long[:48] + tail, long]
    greedy = {"temperature": 0, "max_tokens": 14, "logprobs": 3}
    drawn = greedy | {"temperature": 1.0, "seed": 123}
    few = greedy | {"allowed_token_ids": list(range(40, 48))}
    kinds: list[tuple[list[int], dict[str, Any]]] = [
        *((prompt, greedy) for prompt in shared),
        (long, greedy),
        (short, greedy | {"max_tokens": 40}),
        (one, greedy),
        (exact, greedy | {"max_tokens": 1}),
        (exact, greedy | {"prompt_logprobs": 2}),
        (long[:70], greedy | {"prompt_logprobs": 0, "max_tokens": 3}),
        (tail, drawn),
        (long[:64] + short, drawn | {"n": 3}),
        (short, drawn | {"n": 2, "top_k": 20, "top_p": 0.8, "min_p": 0.01}),
        (short, greedy | {"min_tokens": 10, "stop_token_ids": list(range(100)), "max_tokens": 20}),
        (short, drawn | {"logit_bias": {EOS: 5.0, 17: 8.0, 200: -100.0}}),
        (tail, drawn | {"allowed_token_ids": list(range(40, 90))}),
        (tail, drawn | {"bad_words_token_ids": [[3], [40, 41], list(range(60, 64))], "temperature": 1.5}),
        (one, drawn | {"stop": ["e", "th", "\n"], "max_tokens": 40, "temperature": 1.3}),
        (exact, drawn | {"ignore_eos": True, "logit_bias": {EOS: 6.0}}),
        *([(tail, drawn | STRUCTURED)] if importlib.util.find_spec("llguidance") else []),
        # The youngest are preempted most, and these have the most to remember: few tokens, so that all come again.
        (tail, few | {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7}),
        (shared[0], few | {"frequency_penalty": 2.0, "repetition_penalty": 0.8, "temperature": 1.0, "seed": 9}),
    ]
    # Priorities count only where the policy says so.
    return [Task(prompt, SamplingParams(priority=i % 3, **settings)) for i, (prompt, settings) in enumerate(kinds)]
