"""Which decoding sequences read their first keys together, and that an engine's answers stay the same."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine.llm import LLM
from octavo.engine.runner import attention_metadata, shared_prefixes
from octavo.engine.runner.shared_prefixes import find_shared_prefixes, worth_sharing
from octavo.engine.sampling_params import SamplingParams
from octavo.kernels import use_backend
from octavo.kernels.attention import SPLIT_TOKENS

from ..checkpoints import make_prompts, make_tiny_llama

BLOCK_SIZE = 64
SPLIT_BLOCKS = SPLIT_TOKENS // BLOCK_SIZE


def tables(rows: list[list[tuple[int, int]]]) -> np.ndarray:
    """Return a block table whose rows are runs of (first block, splits), each padded with the rows' own numbers."""
    width = SPLIT_BLOCKS * max(sum(splits for _, splits in runs) for runs in rows)
    found = np.zeros((len(rows), width), dtype=np.int32)
    for row, runs in zip(found, rows, strict=True):
        blocks = np.concatenate([first + np.arange(splits * SPLIT_BLOCKS) for first, splits in runs])
        row[: len(blocks)] = blocks
    return found


def found(rows: list[list[tuple[int, int]]], lengths: list[int], query_lens: list[int] | None = None) -> Any:
    query = np.array(query_lens or [1] * len(rows), dtype=np.int32)
    result = find_shared_prefixes(tables(rows), np.array(lengths, dtype=np.int32), query, BLOCK_SIZE)
    return None if result is None else (result.leaders.tolist(), result.num_splits.tolist())


S = SPLIT_TOKENS


def test_groups() -> None:
    """Members need not be neighbours; each group has a depth of its own; others are in none."""
    rows = [[(1000, 2), (1, 1)], [(2000, 3)], [(1000, 2), (2, 1)], [(3, 3)], [(2000, 1), (4, 2)]]
    assert found(rows, [2 * S + 9, 2 * S + 1, 3 * S, 2 * S + 5, 2 * S]) == ([0, 1, 0, 0, 1], [2, 1, 2, 0, 1])


def test_what_is_not_shared() -> None:
    assert found([[(1, 2)], [(50, 2)]], [S + 9, S + 9]) is None  # nothing in common
    assert found([[(1, 2)], [(1, 2)]], [S, S + 9]) is None  # one of them ends with this step's token
    assert found([[(1, 2)], [(1, 2)]], [S + 2, S + 9], [3, 1]) is None
    assert found([[(1, 2)]], [2 * S]) is None
    # Other blocks with the same end: alike to a cache of prefixes, but not the same ones.
    other = tables([[(1, 1), (100, 1)], [(1, 1), (200, 1)]])
    other[1, 0] = 99
    lengths = np.array([S + 9, S + 9], dtype=np.int32)
    assert find_shared_prefixes(other, lengths, np.ones(2, dtype=np.int32), BLOCK_SIZE) is None
    assert find_shared_prefixes(other, lengths, np.ones(2, dtype=np.int32), 48) is None  # splits end inside blocks


def test_a_group_shares_what_spares_most() -> None:
    """Four members that share a split, of which three share four: 8 splits are spared instead of 3."""
    rows = [[(1, 5)], [(1, 4), (100, 1)], [(1, 1), (200, 4)], [(1, 4), (300, 1)]]
    assert found(rows, [4 * S + 9] * 4) == ([0, 0, 0, 0], [4, 4, 0, 4])
    rows = [[(1, 2)], [(1, 1), (100, 1)], [(1, 1), (200, 1)], [(1, 2)]]
    assert found(rows, [2 * S + 9] * 4) == ([0, 0, 0, 0], [1, 1, 1, 1])


def test_a_small_saving_is_none() -> None:
    """It must spare more than a twentieth of the step's keys, and whole splits."""
    assert worth_sharing(2, S, 20 * S - 1)
    assert not worth_sharing(2, S, 20 * S)
    assert not worth_sharing(20, S - 1, 20 * S)
    rows = [[(1, 1), (100 + 50 * i, 1)] for i in range(2)] + [[(1000, 30)]]
    assert found(rows, [S + 9, S + 9, 10 * S]) is not None
    assert found(rows, [S + 9, S + 9, 30 * S]) is None


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut sequences after 64 tokens, so that a tiny engine shares some."""
    pytest.importorskip("triton")
    names = [f"octavo.kernels.attention.{name}_triton" for name in ("decode", "cascade", "plan")]
    for module in (*map(importlib.import_module, names), attention_metadata, shared_prefixes):
        monkeypatch.setattr(module, "SPLIT_TOKENS", 64)
    with use_backend("torch"):  # an engine chooses the backend of its process
        yield


@pytest.mark.usefixtures("short_splits")
def test_an_engine_gives_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a common beginning of more than a split, two of three sequences share it, and all say what they would."""
    common, tail, other, alone = make_prompts([66, 3, 2, 4], seed=9)
    prompts = [common + tail, alone, common + other]
    shared = []

    def spy(*arguments: Any) -> Any:
        result = find_shared_prefixes(*arguments)
        shared.append(result)
        return result

    monkeypatch.setattr(attention_metadata, "find_shared_prefixes", spy)
    settings: dict[str, Any] = {"block_size": 16, "kv_cache_tokens": 1024, "max_num_seqs": 3, "dtype": "float32"}
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    answers = []
    folder = str(make_tiny_llama(tmp_path))
    for backend in ("torch", "triton"):
        device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
        llm = LLM(folder, backend=backend, device=device, **settings)
        llm.generate(prompts[:1], params.replace(max_tokens=1))  # its blocks are found by the others
        answers.append([result.outputs[0] for result in llm.generate(prompts, params)])
        assert any(step is not None for step in shared) == (backend == "triton")
    assert {tuple(step.num_splits.tolist()) for step in shared if step is not None} >= {(1, 0, 1)}
    for expected, found in zip(*answers, strict=True):
        assert found.token_ids == expected.token_ids
