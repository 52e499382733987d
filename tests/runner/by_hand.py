"""This module holds steps made by hand, and runners for them. It does not know what they shall show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from octavo.engine.config import ModelConfig
from octavo.engine.layers.attention import AttentionMetadata
from octavo.engine.models.decoder import Decoder
from octavo.engine.runner.kv_cache import allocate_kv_cache
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.runner.sampler import Sampler
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler.batch import batch_order
from octavo.engine.step import NewSequence, SchedulerOutput

NONE = np.empty(0, dtype=np.int32)
BLOCK_SIZE, MAX_LEN, MAX_SEQS = 16, 128, 16
GREEDY = SamplingParams(temperature=0, logprobs=2)


def int32(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def make_step(
    rows: list[int],
    first: list[int],
    counts: list[int],
    new: tuple[NewSequence, ...] = (),
    blocks: Sequence[tuple[int, int, int]] = (),
    *,
    removed: Sequence[int] = (),
    sampled: Sequence[int] = (),
    num_decodes: int = 0,
    number: int = 0,
) -> SchedulerOutput:
    block_rows, columns, ids = int32(blocks).reshape(-1, 3).T  # type: ignore[arg-type]
    return SchedulerOutput(
        step=number,
        removed_rows=int32(removed),
        new_sequences=new,
        rows=int32(rows),
        num_computed_tokens=int32(first),
        num_scheduled_tokens=int32(counts),
        num_tokens=sum(counts),
        num_decodes=num_decodes,
        num_decode_tokens=sum(counts[:num_decodes]),
        sampled=int32(sampled),
        block_rows=block_rows,
        block_columns=columns,
        block_ids=ids,
    )


def make_sequence(row: int, tokens: Sequence[int], params: SamplingParams | None = None, seed: int = 0) -> NewSequence:
    return NewSequence(row, int32(tokens), len(tokens), params or SamplingParams(), seed, 0, frozenset())


class Steps:
    """Makes the steps of rows that each have blocks of their own, as a scheduler that looks ahead would.

    A token that a step samples counts as there in the next one, whether it is known or not.
    """

    def __init__(self) -> None:
        self._computed = dict[int, int]()
        self._num_tokens = dict[int, int]()
        self._number = 0

    def __call__(
        self, counts: Mapping[int, int], new: Sequence[NewSequence] = (), removed: Sequence[int] = ()
    ) -> SchedulerOutput:
        """Return the next step: row -> tokens, in any order."""
        for row in removed:
            del self._computed[row], self._num_tokens[row]
        blocks = []
        for sequence in new:
            row, width = sequence.row, MAX_LEN // BLOCK_SIZE
            self._computed[row], self._num_tokens[row] = 0, len(sequence.token_ids)
            blocks += [(row, column, 1 + row * width + column) for column in range(width)]
        order, num_decodes = batch_order(int32(list(counts.values())))
        rows = [list(counts)[at] for at in order]
        first = [self._computed[row] for row in rows]
        for row in rows:
            self._computed[row] += counts[row]
        sampled = [at for at, row in enumerate(rows) if self._computed[row] == self._num_tokens[row]]
        for at in sampled:
            self._num_tokens[rows[at]] += 1
        self._number += 1
        return make_step(
            rows,
            first,
            [counts[row] for row in rows],
            tuple(new),
            blocks,
            removed=removed,
            sampled=sampled,
            num_decodes=num_decodes,
            number=self._number - 1,
        )


def make_runner(model: Decoder, **settings: Any) -> ModelRunner:
    """Return a runner with blocks for every row at full length."""
    cache = allocate_kv_cache(
        model.config,
        num_blocks=MAX_SEQS * MAX_LEN // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        dtype=model.dtype,
        device=model.device,
    )
    sampler = Sampler(MAX_SEQS, model.config.vocab_size, device=model.device)
    limits = {"max_num_seqs": MAX_SEQS, "max_model_len": MAX_LEN, "block_size": BLOCK_SIZE}
    return ModelRunner(model, cache, sampler, **limits, **settings)


class NullDecoder:
    """Computes nothing, on a device that may be no real one."""

    def __init__(self, device: str = "cpu", vocab_size: int = 40) -> None:
        self.config = ModelConfig("llama", vocab_size, 8, 8, 2, 2, 1, 16, MAX_LEN)
        self.dtype, self.device = torch.float32, torch.device(device)
        self.calls: list[Any] = []

    def forward(
        self, token_ids: torch.Tensor, metadata: AttentionMetadata, cache: Any, capture: Sequence[int] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        self.calls.append("forward")
        hidden = torch.zeros((len(token_ids), self.config.hidden_size), device=self.device)
        return hidden, [hidden for _ in capture]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros((len(hidden), self.config.vocab_size), device=self.device)
