"""This module holds how the oracle's rows become the op's arguments. It does not know what a token should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from octavo.kernels.sampling import (
    AllowedTokens,
    BannedTokens,
    LogitBias,
    Penalties,
    SampleOutput,
    SampleParams,
)

from .. import calls
from .oracle import Row


def params_of(rows: Sequence[Row], spare_state_rows: int = 2) -> SampleParams:
    """Return the op's parameters of a batch; penalty state lies in reverse order behind some rows of garbage."""
    vocab_size = len(rows[0].logits)

    def per_row(name: str, off: float, dtype: torch.dtype) -> torch.Tensor | None:
        values = [getattr(row, name) for row in rows]
        return None if all(value == off for value in values) else torch.tensor(values, dtype=dtype)

    allowed = [(at, row.allowed) for at, row in enumerate(rows) if row.allowed is not None]
    bits = np.zeros((len(allowed), -(-vocab_size // 32) * 32), dtype=np.uint64)
    for at, (_, ids) in enumerate(allowed):
        bits[at, list(ids)] = 1
    words = (
        (bits.reshape(len(allowed), -(-vocab_size // 32), 32) << np.arange(32, dtype=np.uint64))
        .sum(-1)
        .astype(np.uint32)
    )
    banned = [(at, token_id) for at, row in enumerate(rows) for token_id in row.banned]
    bias = [(at, token_id, value) for at, row in enumerate(rows) for token_id, value in row.bias.items()]
    temperature = per_row("temperature", 0.0, torch.float32)
    drawn = temperature is not None
    return SampleParams(
        num_valid_ids=rows[0].num_valid_ids,
        temperature=temperature,
        top_k=per_row("top_k", 0, torch.int32),
        top_p=per_row("top_p", 1.0, torch.float64),
        min_p=per_row("min_p", 0.0, torch.float64),
        seed=torch.tensor([row.seed for row in rows]) if drawn else None,
        choice=torch.tensor([row.choice for row in rows], dtype=torch.int32) if drawn else None,
        position=torch.tensor([row.position for row in rows]) if drawn else None,
        allowed=AllowedTokens(torch.tensor([at for at, _ in allowed]), torch.from_numpy(words.view(np.int32)))
        if allowed
        else None,
        banned=BannedTokens(*torch.tensor(banned).T) if banned else None,
        bias=LogitBias(*torch.tensor([entry[:2] for entry in bias]).T, torch.tensor([entry[2] for entry in bias]))
        if bias
        else None,
        penalties=_penalties_of(rows, spare_state_rows),
    )


def _penalties_of(rows: Sequence[Row], spare: int) -> Penalties | None:
    penalised = [at for at, row in enumerate(rows) if (row.repetition, row.presence, row.frequency) != (1.0, 0.0, 0.0)]
    if not penalised:
        return None
    seen = [list(dict.fromkeys([*rows[at].prompt, *rows[at].output])) for at in penalised]
    shape = spare + len(penalised), max(map(len, seen)) + 1
    seen_ids, seen_counts, num_seen = np.full(shape, 11), np.full(shape, -7), np.full(shape[0], shape[1])
    state_rows = list(range(shape[0] - 1, spare - 1, -1))
    for at, ids, state_row in zip(penalised, seen, state_rows, strict=True):
        num_seen[state_row] = len(ids)
        seen_ids[state_row, : len(ids)] = ids
        seen_counts[state_row, : len(ids)] = [list(rows[at].output).count(token_id) for token_id in ids]
    return Penalties(
        rows=torch.tensor(penalised),
        repetition=torch.tensor([rows[at].repetition for at in penalised]),
        presence=torch.tensor([rows[at].presence for at in penalised]),
        frequency=torch.tensor([rows[at].frequency for at in penalised]),
        state_rows=torch.tensor(state_rows),
        seen_ids=torch.tensor(seen_ids, dtype=torch.int32),
        seen_counts=torch.tensor(seen_counts, dtype=torch.int32),
        num_seen=torch.tensor(num_seen, dtype=torch.int32),
    )


def run(rows: Sequence[Row], dtype: torch.dtype = torch.float32) -> SampleOutput:
    logits = torch.tensor(np.stack([row.logits for row in rows]), dtype=dtype)
    return calls.sample(logits, params_of(rows))


def assert_tokens(rows: Sequence[Row], dtype: torch.dtype = torch.float32) -> None:
    """Assert that every row has the oracle's token, where float32 can tell the two best scores apart."""
    rows = [replace(row, logits=torch.tensor(row.logits).to(dtype).double().numpy()) for row in rows]
    found = run(rows, dtype)
    assert not found.failed.any()
    unsure = 0
    for at, row in enumerate(rows):
        token_id, ahead = row.token()
        if ahead < 1e-4 and row.temperature > 0:
            unsure += 1
        else:
            assert int(found.token_ids[at]) == token_id, f"row {at}: {row}"
    assert unsure <= 1 + len(rows) // 100
