"""This module holds bugs that overlapping steps, graphs and what rows remember invite, each planted into a live engine.
It does not know what should find them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from octavo.engine.request import RowTable
from octavo.engine.runner import cuda_graphs, input_batch
from octavo.engine.runner.row_grammar import RowGrammar
from octavo.engine.scheduler import Scheduler
from octavo.kernels import dispatch

__all__ = ["PLANTED", "Plant"]

Plant = Callable[[pytest.MonkeyPatch], None]


def stale_static_buffer(patch: pytest.MonkeyPatch) -> None:
    """A captured step goes on with the lengths that it was captured with."""
    right, kept = cuda_graphs.DecodeStep.__call__, dict[int, torch.Tensor]()

    def run(self: Any, rows: Any, num_computed_tokens: Any, *others: Any) -> Any:
        return right(self, rows, kept.setdefault(len(rows), num_computed_tokens.clone()), *others)

    patch.setattr(cuda_graphs.DecodeStep, "__call__", run)


def neighbours_token(patch: pytest.MonkeyPatch) -> None:
    """A row that the host knows no token for is fed the one of the row before it."""
    right = input_batch.expand_rows

    def expand(
        rows: Any, computed: Any, starts: Any, tokens: Any, last: torch.Tensor, *others: Any, **named: Any
    ) -> Any:
        return right(rows, computed, starts, tokens, last.roll(1), *others, **named)

    for module in (input_batch, cuda_graphs):
        patch.setattr(module, "expand_rows", expand)


def late_grammar_mask(patch: pytest.MonkeyPatch) -> None:
    """What may stand at one position is asked of the next."""
    right, masks = RowGrammar.mask, dict[int, Any]()

    def mask(self: RowGrammar, position: int) -> Any:
        now = right(self, position).copy()
        before, masks[id(self)] = masks.get(id(self), now), now
        return before

    patch.setattr(RowGrammar, "mask", mask)


def late_penalties(patch: pytest.MonkeyPatch) -> None:
    """Penalties do not count the last token."""
    right, kept = dispatch.active["sample"], dict[tuple[int, ...], Any]()

    def sample(logits: torch.Tensor, params: Any, **named: Any) -> Any:
        if params.penalties is not None:
            names = ("seen_ids", "seen_counts", "num_seen")
            now = {name: getattr(params.penalties, name).clone() for name in names}
            key = tuple(now["seen_ids"].shape)
            before, kept[key] = kept.get(key, now), now
            params = dataclasses.replace(params, penalties=dataclasses.replace(params.penalties, **before))
        return right(logits, params, **named)

    patch.setitem(dispatch.active, "sample", sample)


def late_stop(patch: pytest.MonkeyPatch) -> None:
    """A stop is noticed where the next one would be, and what came in between is told."""
    right, spared = RowTable.finish_status, set[tuple[str, int]]()

    def finish_status(self: RowTable, row: int) -> Any:
        status, request = right(self, row), self.request(row)
        if status is None or (request.request_id, request.index) in spared or status[1] is None:
            return status
        spared.add((request.request_id, request.index))
        return None

    patch.setattr(RowTable, "finish_status", finish_status)


def wasted_tokens_count(patch: pytest.MonkeyPatch) -> None:
    """Tokens that were sampled for nobody are counted as somebody's."""
    right = Scheduler.update

    def update(self: Scheduler, work: Any, output: Any) -> Any:
        before = self.stats.num_wasted_tokens
        said = right(self, work, output)
        self._num_output_tokens += self.stats.num_wasted_tokens - before
        return said

    patch.setattr(Scheduler, "update", update)


PLANTED: tuple[Plant, ...] = (
    stale_static_buffer,
    neighbours_token,
    late_grammar_mask,
    late_penalties,
    late_stop,
    wasted_tokens_count,
)
