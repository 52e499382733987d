"""Which token is sampled: against an oracle in float64, row by row, and against exact distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import octavo.kernels
import pytest
import scipy.stats
import torch
from octavo.kernels.sampling import SampleParams

from . import checks
from .oracle import Row
from .rows import assert_tokens


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__[6:])
def test_sample(backend: str, check: Callable[[int], None], seeds: range) -> None:
    for seed in seeds:
        check(seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    """bfloat16 makes ties at every cut."""
    rows = [
        replace(row, temperature=(0.0, 1.0)[at % 2], top_k=(0, 6)[at // 2 % 2], top_p=(1.0, 0.7)[at // 4 % 2])
        for at, row in enumerate(checks.rows_over(3, spread=0.5))
    ]
    assert_tokens(rows, dtype)


def test_a_vocabulary_of_many_chunks(backend: str) -> None:
    """The real width, more rows than are worked on at once, and a large top_k."""
    rows = [
        replace(row, temperature=0.9, top_k=(0, 0, 40, 700)[at % 4], top_p=(1.0, 0.9)[at % 2], bias={7: 2.0})
        for at, row in enumerate(checks.rows_over(5, num_rows=12, vocab_size=49152, spread=2.5))
    ]
    plain = [replace(row, bias={}) for row in rows]
    for batch in (rows[:4], plain):
        assert_tokens(batch)


@pytest.mark.parametrize(
    "row",
    [
        Row(np.linspace(0.0, -3.0, 12)),
        Row(np.linspace(0.0, -3.0, 12), top_k=5),
        Row(np.linspace(0.0, -3.0, 12), top_p=0.7),
        Row(np.linspace(0.0, -1.0, 12), top_p=0.6, min_p=0.45),
        Row(np.zeros(40), top_k=33, top_p=0.8),
    ],
    ids=["plain", "top_k", "top_p", "top_p-min_p", "flat"],
)
@pytest.mark.parametrize("varied", ["position", "seed", "choice"])
def test_distribution(backend: str, row: Row, varied: str, count: Callable[[int, int], int], seed: int) -> None:
    """Chi-square of many draws that differ in one part of the key only."""
    num_draws = count(4000, 100_000)
    row = replace(row, temperature=1.3)
    key = {name: torch.full((num_draws,), 11 + seed) for name in ("seed", "choice", "position")}
    key[varied] = torch.arange(num_draws)
    params = SampleParams(
        temperature=torch.full((num_draws,), row.temperature),
        top_k=torch.full((num_draws,), row.top_k, dtype=torch.int32),
        top_p=torch.full((num_draws,), row.top_p, dtype=torch.float64),
        min_p=torch.full((num_draws,), row.min_p, dtype=torch.float64),
        **key,
    )
    logits = torch.tensor(row.logits, dtype=torch.float32).expand(num_draws, -1)
    drawn = np.bincount(octavo.kernels.sample(logits, params).token_ids.numpy(), minlength=len(row.logits))
    p = row.probabilities()
    assert drawn[p == 0].sum() == 0
    assert scipy.stats.chisquare(drawn[p > 0], p[p > 0] * num_draws).pvalue > 1e-5


def test_temperatures_near_zero(backend: str) -> None:
    """Dividing by a tiny temperature overflows nothing: the most probable token wins."""
    rows = [replace(row, temperature=10.0**-at) for at, row in enumerate(checks.rows_over(1, 38, spread=30.0))]
    token_ids = checks.run(rows).token_ids.tolist()
    assert token_ids[3:] == [int(row.logits.argmax()) for row in rows[3:]]
