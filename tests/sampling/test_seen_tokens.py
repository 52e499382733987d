# ruff: noqa: E501 (one line per bug)
"""What penalties know of each row: the distinct tokens of its prompt and output, and how often each was generated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine.runner import seen_tokens as module
from octavo.engine.runner.seen_tokens import SeenTokens
from octavo.engine.runner.staging import Staging

from ..kernels.sampling.mutants import Mutant, planted

MUTANTS = [
    Mutant("new tokens are not counted", "(is_new & counted))", "(is_new & ~is_new))"),
    Mutant("tokens that were seen are not counted", "masked_fill_(is_new, 0) + counted", "masked_fill_(is_new, 0) + (counted & is_new)"),
    Mutant("a count starts at what was there", ".masked_fill_(is_new, 0)", ""),
    Mutant("tokens of failed rows are counted", "counted = failed[rows.at].logical_not_()", "counted = failed[rows.at] | True"),
    Mutant("penalties see the row's last tenant", ".fill_(num_seen)", ".add_(0)"),
    Mutant("penalties see a neighbour's token", "rows.state_rows, token_ids[rows.at]", "rows.state_rows, token_ids[: len(rows.at)]"),
    Mutant("penalties forget outputs at preemption", "outputs = np.asarray(output_token_ids,", "outputs = np.asarray(output_token_ids[:0],"),
    Mutant("counts restart at preemption", "np.searchsorted(seen, outputs)", "np.searchsorted(seen, outputs[:1])"),
    Mutant("the bound of what was seen stays", "self._most[rows.rows] += 1", "self._most[rows.rows] += 0"),
    Mutant("what a last tenant left is found", ".amin(1)", ".amax(1)"),
]  # fmt: skip
NUM_ROWS, VOCAB_SIZE = 4, 12


def check_counts(seen_class: Any, seed: int, num_steps: int = 80) -> None:
    """Start sequences and sample for some rows at a time; the tables must say what a Counter says."""
    rng = np.random.default_rng(seed)
    staging, cpu = Staging(torch.device("cpu")), torch.device("cpu")
    seen = seen_class(NUM_ROWS, VOCAB_SIZE, staging, cpu)
    expected: list[Counter[int]] = [Counter()] * NUM_ROWS
    for step in range(num_steps):
        for row in range(NUM_ROWS):
            if step == 0 or rng.random() < 0.05:
                prompt, output = (rng.integers(0, VOCAB_SIZE, rng.integers(1, 6)) for _ in range(2))
                seen.add(row, prompt.tolist(), output)
                expected[row] = Counter(dict.fromkeys(prompt.tolist(), 0))
                expected[row].update(output.tolist())
        batch = rng.permutation(NUM_ROWS)[: rng.integers(2, NUM_ROWS + 1)]
        at = np.sort(rng.permutation(len(batch))[: rng.integers(1, len(batch) + 1)])
        token_ids = rng.integers(0, VOCAB_SIZE, len(batch)).astype(np.int32)
        failed = rng.random(len(batch)) < 0.1
        rows = batch[at]
        penalised = module.PenalisedRows(at, rows, np.zeros((3, len(at)), dtype=np.float32), staging)
        seen.count(penalised, torch.from_numpy(token_ids), torch.from_numpy(failed))
        for i, row in zip(at.tolist(), rows.tolist(), strict=True):
            if not failed[i]:
                expected[row][int(token_ids[i])] += 1
        found = seen.penalties(penalised)
        assert found.state_rows.tolist() == rows.tolist()
        for row in range(NUM_ROWS):
            num_seen = int(found.num_seen[row])
            ids, counts = found.seen_ids[row, :num_seen].tolist(), found.seen_counts[row, :num_seen].tolist()
            assert len(set(ids)) == num_seen
            assert dict(zip(ids, counts, strict=True)) == dict(expected[row])


def test_tokens_are_counted_as_they_are_sampled(count: Callable[[int, int], int], seed: int) -> None:
    for trial in range(count(5, 100)):
        check_counts(SeenTokens, seed + trial)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found(mutant: Mutant) -> None:
    def trials() -> None:
        for trial in range(10):
            check_counts(planted(module, mutant).SeenTokens, trial)

    with pytest.raises((AssertionError, IndexError)):
        trials()
