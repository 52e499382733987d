"""Which token is sampled: against an oracle in float64, row by row, and against exact distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from octavo.kernels.sampling import SampleParams

from .. import calls
from . import checks
from .oracle import Row
from .rows import assert_tokens, params_of

OPS = ("sample",)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__[6:])
def test_sample(backend: str, check: Callable[[int], None], seeds: range) -> None:
    for seed in seeds:
        check(seed)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_float64(backend: str, dtype: torch.dtype) -> None:
    assert_tokens([replace(row, temperature=float(at % 2)) for at, row in enumerate(checks.rows_over(3))], dtype)


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
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_distribution(backend: str, row: Row, varied: str, count: Callable[[int, int], int], seed: int) -> None:
    """Chi-square of many draws that differ in one part of the key only; other backends are held to the same tokens."""
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
    drawn = np.bincount(calls.sample(logits, params).token_ids.numpy(), minlength=len(row.logits))
    p = row.probabilities()
    assert drawn[p == 0].sum() == 0
    assert scipy.stats.chisquare(drawn[p > 0], p[p > 0] * num_draws).pvalue > 1e-5


def test_temperatures_near_zero(backend: str) -> None:
    """Dividing by a tiny temperature, be it subnormal, overflows nothing: the most probable token wins."""
    rows = [replace(row, temperature=10.0**-at) for at, row in enumerate(checks.rows_over(1, 45, spread=30.0))]
    token_ids = checks.run(rows).token_ids.tolist()
    assert token_ids[3:] == [int(row.logits.argmax()) for row in rows[3:]]


def test_views_of_wider_rows(backend: str) -> None:
    """Rows may lie apart, or be one row again and again; none is changed."""
    wide = torch.randn(3, 90, generator=torch.Generator().manual_seed(4))
    rows = [Row(np.zeros(45), 1.0, 20, 0.9, seed=at, num_valid_ids=44, bias={3: 2.0}) for at in range(3)]
    for entries in (rows, [replace(row, bias={}) for row in rows], [replace(row, temperature=0.0) for row in rows]):
        for view in (wide[:, :45], wide[:, 5:50], wide[:, ::2], wide[1:2, :45].expand(3, -1)):
            expected, before = calls.sample(view.clone(), params_of(entries)), view.clone()
            assert torch.equal(calls.sample(view, params_of(entries)).token_ids, expected.token_ids)
            assert torch.equal(view, before)


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 64, 65])
def test_tiny_vocabularies(backend: str, vocab_size: int) -> None:
    rows = [
        replace(row, temperature=1.0, top_k=at % 4, top_p=(1.0, 0.7)[at % 2], min_p=0.1 * (at % 3))
        for at, row in enumerate(checks.rows_over(7, 12, vocab_size))
    ]
    assert_tokens(rows)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_float64_is_refused_by_name(backend: str) -> None:
    for call in (lambda x: calls.sample(x, SampleParams()), lambda x: calls.log_softmax_top(x, 1)):
        with pytest.raises(ValueError, match=r"logits has dtype torch.float64; the triton backend takes float32"):
            call(torch.zeros(1, 4, dtype=torch.float64))
