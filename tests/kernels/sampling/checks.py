"""This module holds the checks of `sample` that a planted bug must fail. It does not know which backend is in force."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from octavo.kernels.sampling import BannedTokens, LogitBias, Penalties, SampleParams

from .. import calls
from .oracle import Row
from .rows import assert_tokens, params_of, run

NUM_ROWS = 120
VOCAB_SIZE = 37


def rows_over(seed: int, num_rows: int = NUM_ROWS, vocab_size: int = VOCAB_SIZE, spread: float = 1.0) -> Iterator[Row]:
    """Yield greedy rows of different logits, seeds, choices and positions."""
    rng = np.random.default_rng(seed)
    for at in range(num_rows):
        logits = (rng.standard_normal(vocab_size) * spread).astype(np.float32).astype(np.float64)
        yield Row(logits, seed=int(rng.integers(2**63)), choice=at % 3, position=int(rng.integers(1000)))


def check_greedy(seed: int) -> None:
    assert_tokens(list(rows_over(seed)))
    tied = [replace(row, logits=np.round(row.logits)) for row in rows_over(seed)]
    found = run(tied)
    assert found.token_ids.tolist() == [int(row.logits.argmax()) for row in tied], "a tie goes to the lowest id"


def check_temperature(seed: int) -> None:
    assert_tokens([replace(row, temperature=(0.3, 1.0, 2.0)[at % 3]) for at, row in enumerate(rows_over(seed))])


def check_top_k(seed: int) -> None:
    assert_tokens([replace(row, temperature=1.5, top_k=1 + at % 6) for at, row in enumerate(rows_over(seed))])


def check_top_p(seed: int) -> None:
    assert_tokens(
        [replace(row, temperature=1.2, top_p=0.05 + at % 19 * 0.05) for at, row in enumerate(rows_over(seed))]
    )


def check_min_p(seed: int) -> None:
    assert_tokens(
        [replace(row, temperature=1.5, min_p=0.02 + at % 40 * 0.02) for at, row in enumerate(rows_over(seed))]
    )


def check_filters_together(seed: int) -> None:
    """Every combination, with greedy rows between; top_p counts mass among what min_p and top_k have left."""
    assert_tokens(
        [
            replace(
                row,
                temperature=(0.0, 1.0, 1.7)[at % 3],
                top_k=(0, 3, 7, 20)[at % 4],
                top_p=(1.0, 0.5, 0.8, 0.95, 0.2)[at % 5],
                min_p=(0.0, 0.0, 0.4)[at // 3 % 3],
            )
            for at, row in enumerate(rows_over(seed, 2 * NUM_ROWS))
        ]
    )


def check_ties_at_the_cut(seed: int) -> None:
    """Equal logits rank by id: exactly the lowest of them survive top_k and top_p."""
    flat = np.zeros(16)
    levels = np.array([0.0, 2.0, 1.0, 1.0, 1.0, 2.0, 1.0, -1.0])
    cuts: list[tuple[np.ndarray, int, float, set[int]]] = [
        (flat, 5, 1.0, set(range(5))),
        (flat, 0, 0.5, set(range(8))),
        (flat, 0, 0.25, set(range(4))),
        (flat, 8, 0.5, set(range(4))),
        (flat, 0, 1e-9, {0}),
        (levels, 3, 1.0, {1, 5, 2}),
        (levels, 5, 1.0, {1, 5, 2, 3, 4}),
        (levels, 1, 1.0, {1}),
        (levels, 0, 0.2, {1}),
    ]
    for logits, top_k, top_p, survivors in cuts:
        rows = [Row(logits, 1.0, top_k, top_p, seed=seed, position=at) for at in range(20)]
        assert set(np.nonzero(rows[0].probabilities())[0]) == survivors
        assert_tokens(rows)


def check_changed_logits(seed: int) -> None:
    """Allowed and banned tokens, bias and penalties, each on some rows only, so that a neighbour's would show."""
    rng = np.random.default_rng(seed)
    rows = []
    for at, row in enumerate(rows_over(seed)):
        few = rng.permutation(VOCAB_SIZE).tolist()
        rows.append(
            replace(
                row,
                temperature=float(at % 2),
                allowed=few[:20] if at % 3 == 0 else None,
                banned=few[:7] if at % 4 == 0 else (),
                bias={few[3]: 4.0, few[9]: -3.0, few[12]: 2.5} if at % 5 == 0 else {},
                repetition=(1.0, 1.8, 0.6)[at % 3],
                presence=1.5 * (at % 7 == 0),
                frequency=(0.4, 0.0, 1.6)[at // 2 % 3],
                prompt=few[15 - at % 5 : 22],
                output=rng.choice(few[20:24], 12).tolist(),
                num_valid_ids=35,
            )
        )
    assert_tokens(rows)


def check_invalid_ids(seed: int) -> None:
    """Ids past the tokenizer's are never sampled, whatever their logits; features may name them."""
    for temperature in (0.0, 1.0):
        rows = [
            replace(row, temperature=temperature, num_valid_ids=20, bias={30: 5.0}, banned=[31], repetition=1.5)
            for row in rows_over(seed, 20)
        ]
        for row in rows:
            row.logits[20:] = (50.0, np.nan, np.inf, *[9.0] * 14)
            row.prompt = [3, 25]
        assert_tokens(rows)


def check_neighbours(seed: int) -> None:
    """A row's token is the same alone, in any place, and beside rows that are not finite."""
    rng = np.random.default_rng(seed)
    rows = [
        replace(
            row,
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.8])),
            bias={4: 3.0} if at % 3 else {},
            repetition=1.0 + at % 2,
            prompt=[at],
        )
        for at, row in enumerate(rows_over(seed, 24))
    ]
    for at in range(0, 24, 5):
        rows[at].logits[at] = (np.nan, np.inf)[at % 2]
    together = run(rows)
    assert together.failed.tolist() == [at % 5 == 0 for at in range(24)]
    order = rng.permutation(24)
    assert run([rows[at] for at in order]).failed.tolist() == together.failed[order].tolist()
    for at in range(24):
        alone = run([rows[at]])
        assert bool(alone.failed) == bool(together.failed[at])
        assert together.failed[at] or int(alone.token_ids) == int(together.token_ids[at]), f"row {at}"
    moved = run([rows[at] for at in order])
    kept = ~moved.failed
    assert torch.equal(moved.token_ids[kept], together.token_ids[torch.from_numpy(order)][kept])


def check_no_token_left(seed: int) -> None:
    rows = list(rows_over(seed, 6))
    rows[1] = replace(rows[1], allowed=[3], banned=[3])
    rows[2] = replace(rows[2], logits=np.full(VOCAB_SIZE, -np.inf), temperature=1.0)
    rows[3].logits[5:] = -np.inf
    rows[4] = replace(rows[4], logits=np.where(np.arange(VOCAB_SIZE) == 3, np.nan, 0.0), banned=[3])
    found = run(rows)
    assert found.failed.tolist() == [False, True, True, False, True, False]
    assert int(found.token_ids[3]) == int(rows[3].logits.argmax())


def check_boundaries(seed: int) -> None:
    """top_k and top_p at the very edge of one token more or less, and tokens that were never to be had."""
    flat, steep = np.zeros(16), np.linspace(3.0, -3.0, 16)
    gaps = np.where(np.arange(16) % 3 == 0, steep, -np.inf)
    tied = np.where(np.arange(16) % 5 == 1, 2.0, steep - 2.0)
    zeros = np.where(np.arange(16) % 2, 0.0, -0.0)
    kept = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    cases = [(logits, {"top_k": top_k}) for logits in (flat, steep, gaps) for top_k in (1, 15, 16, 17, 2**31 - 1)]
    for num in (1, 5, 8, 15):
        cases += [(flat, {"top_p": num / 16}), (flat, {"top_p": float(np.nextafter(num / 16, 1))})]
    cases += [(zeros, {"top_k": top_k}) for top_k in (1, 5)]
    cases += [(flat, {"top_p": 1e-300}), (gaps, {"top_k": 8, "top_p": 0.9}), (tied, {"min_p": 1.0})]
    cases += [(tied, {"min_p": 0.3}), (tied, {"top_k": 2, "top_p": 0.6}), (flat, {"top_k": 8, "top_p": 0.3125})]
    found = [Row(x, 1.0, seed=seed, position=at, **(kept | case)) for x, case in cases for at in range(6)]
    assert_tokens(found)


def check_many_chunks(seed: int) -> None:
    """A vocabulary of several tiles, whose equal logits lie on both sides of their borders."""
    rows = []
    for at, row in enumerate(rows_over(seed, 14, 9001, spread=1.5)):
        logits = np.round(row.logits * 2) / 2 if at % 2 else row.logits
        filters = {"top_k": (0, 0, 300, 5000)[at % 4], "top_p": (1.0, 0.6, 0.9)[at % 3], "min_p": 0.05 * (at % 5 == 3)}
        rows.append(replace(row, logits=logits, temperature=float(at != 4), **filters))
    rows[0].logits[:4096] = -np.inf
    rows[6].logits[4096:] = -np.inf
    rows[8].logits[8900:] += 6.0
    assert_tokens(rows)
    tied = [replace(row, temperature=0.0, logits=np.zeros(9001)) for row in rows[:6]]
    for at, where in enumerate(([0, 5000], [4095, 4096], [8192, 9000], [9000], [4096, 100], [8191, 8192])):
        tied[at].logits[where] = 1.0
    assert run(tied).token_ids.tolist() == [0, 4095, 8192, 9000, 100, 8191]
    for at, (where, value) in enumerate([(0, np.nan), (4096, np.nan), (9000, np.nan), (5000, np.inf), (1, -np.inf)]):
        tied[at].logits[where] = value
    assert run(tied).failed.tolist() == [True] * 4 + [False] * 2


def check_low_precision(seed: int) -> None:
    """bfloat16 makes ties at every cut."""
    rows = [
        replace(row, temperature=(0.0, 1.0)[at % 2], top_k=(0, 6, 17)[at % 3], top_p=(1.0, 0.7)[at // 2 % 2])
        for at, row in enumerate(rows_over(seed, 48, spread=0.5))
    ]
    assert_tokens(rows, torch.bfloat16)
    assert_tokens(rows[:24], torch.float16)


def check_out(seed: int) -> None:
    """Results land in `out`, and the logits are left as they were."""
    rows = [replace(row, temperature=at % 2, bias={3: 9.0}) for at, row in enumerate(rows_over(seed, 9))]
    logits = torch.tensor(np.stack([row.logits for row in rows]), dtype=torch.float32)
    before = logits.clone()
    fresh = calls.sample(logits, params_of(rows))
    out = type(fresh)(torch.full_like(fresh.token_ids, -1), ~fresh.failed)
    found = calls.sample(logits, params_of(rows), out=out)
    assert found.token_ids is out.token_ids
    assert found.failed is out.failed
    assert torch.equal(out.token_ids, fresh.token_ids)
    assert torch.equal(out.failed, fresh.failed)
    assert torch.equal(logits, before)


def check_no_top_p(seed: int) -> None:
    """A top_p of 0 keeps the first token in order, whatever the other filters."""
    kept = ({}, {"top_k": 5}, {"min_p": 0.2})
    rows = [replace(row, temperature=2.0, top_p=0.0, **kept[at % 3]) for at, row in enumerate(rows_over(seed, 12))]
    rows[9:] = [replace(row, logits=np.round(row.logits)) for row in rows[9:]]
    found = run(rows)
    assert not found.failed.any()
    assert found.token_ids.tolist() == [int(row.logits.argmax()) for row in rows]


def check_ids_that_are_none(seed: int) -> None:
    """Entries for ids below 0 or past the vocabulary change nothing: not this row, nor its neighbours in memory."""
    logits = torch.arange(3.0)[:, None] + torch.arange(32.0)
    logits[:, 30] += 9.0
    rows, token_ids = torch.tensor([1, 1, 1, 1, 1]), torch.tensor([-1, -2, 32, 62, 63])
    ones, row, num_seen = torch.ones(1), rows[:1], torch.full((2,), len(rows), dtype=torch.int32)
    seen = token_ids.to(torch.int32).repeat(2, 1)
    for params in (
        SampleParams(banned=BannedTokens(rows, token_ids)),
        SampleParams(bias=LogitBias(rows, token_ids, torch.tensor([1e3, -1e3, 1e3, -1e3, 1e3]))),
        SampleParams(penalties=Penalties(row, 9 * ones, 9 * ones, ones, row, seen, seen.abs(), num_seen)),
    ):
        assert calls.sample(logits, params).token_ids.tolist() == [30, 30, 30]


CHECKS: tuple[Callable[[int], None], ...] = (
    check_no_token_left,
    check_out,
    check_ids_that_are_none,
    check_no_top_p,
    check_greedy,
    check_many_chunks,
    check_invalid_ids,
    check_changed_logits,
    check_low_precision,
    check_boundaries,
    check_temperature,
    check_neighbours,
    check_min_p,
    check_top_p,
    check_top_k,
    check_filters_together,
    check_ties_at_the_cut,
)
"""The quick ones first: a planted bug meets them in this order."""
