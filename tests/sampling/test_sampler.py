# ruff: noqa: E501 (one line per bug)
"""The sampler's state: right rows, right tokens, through starts, ends, preemption and failures."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from octavo.engine.runner import draw, row_extras, row_settings
from octavo.engine.runner import sampler as module
from octavo.engine.runner.sampler import Sampler, logprob_entries
from octavo.engine.sampling_params import SamplingParams
from octavo.kernels.sampling import log_softmax_top

from ..kernels.sampling.mutants import Mutant, planted
from .sampler_checks import check_life

MUTANTS = [
    (row_settings, Mutant("seed of another row", "{name: array[rows] for", "{name: np.roll(array[rows], name == 'seed') for")),
    (row_settings, Mutant("choice ignored", "self._choice[row] = choice", "self._choice[row] = 0")),
    (row_settings, Mutant("top_p of the batch position", "{name: array[rows] for", "{name: array[rows if name != 'top_p' else slice(len(rows))] for")),
    (row_settings, Mutant("penalty strengths of the batch position", "self._strengths[:, rows]", "self._strengths[:, : len(rows)]")),
    (row_extras, Mutant("bias on the neighbour's row", "LogitBias(*upload(staging, *_columns(bias)))", "LogitBias(*upload(staging, *_columns([(at ^ 1 if at ^ 1 < len(positions) else at, *rest) for at, *rest in bias])))")),
    (row_extras, Mutant("min_tokens one too few", "stops_from=len(prompt_token_ids) + params.min_tokens", "stops_from=len(prompt_token_ids) + params.min_tokens - 1")),
    (row_extras, Mutant("min_tokens one too many", "stops_from=len(prompt_token_ids) + params.min_tokens", "stops_from=len(prompt_token_ids) + params.min_tokens + 1")),
    (row_extras, Mutant("min_tokens ignored", "[self.stops, self.banned] if", "[self.banned] if")),
    (row_extras, Mutant("bad words do not follow the output", "self.tail.append(token_id)", "self.tail.append(self.tail[-1])")),
    (row_extras, Mutant("bad words do not see the prompt", "if missing := max_tail - len(tail):", "if missing := 0:")),
    (row_extras, Mutant("bad words of one token ignored", "if len(ids) == 1], dtype", "if len(ids) == 0], dtype")),
    (draw, Mutant("a draw is awaited for ever", "extras.num_awaited -= 1", "extras.num_awaited -= 0")),
    (draw, Mutant("log-probabilities of failed rows", "if failed is None or not failed[at]}", "}")),
    (module, Mutant("the bias stays after its request has left", "self._extras[row] = extras\n", "self._extras[row] = extras = extras or self._extras[row]\n", also=(("self._extras[row] = None", "pass"),))),
    (module, Mutant("position one late", "np.asarray(positions, dtype=np.int64)", "np.asarray(positions + 1, dtype=np.int64)")),
    (module, Mutant("positions of the step before", "if batch.used & DRAWN:\n", "if batch.used & DRAWN and batch.params.position is None:\n", also=(("return replace(batch.params, **changes) if changes else batch.params", "batch.params = replace(batch.params, **changes) if changes else batch.params\n        return batch.params"),))),
    (module, Mutant("settings of rows that have changed hands", "latest.version != self._version", "False")),
    (module, Mutant("settings of other rows", "not np.array_equal(latest.rows, rows)", "len(latest.rows) != len(rows)")),
    (module, Mutant("min_tokens goes on", "not np.array_equal(latest.may_stop, may_stop)", "False")),
    (module, Mutant("nothing is waited for", "any(each.extras.num_awaited for each", "any(False for each")),
    (module, Mutant("penalties count nothing", "if batch.penalised is not None:\n            self._seen.count", "if False:\n            self._seen.count")),
    (module, Mutant("log-probabilities of another row", "x[batch.wanted_at], chosen", "x[: len(batch.wanted_at)], chosen")),
    (module, Mutant("log-probabilities include ids that do not exist", "x = x[:, : self._num_valid_ids]", "x = x[:, :]")),
    (module, Mutant("features of the batch position", "row = int(rows[at])\n            extras = self._extras[row]", "row = int(rows[at])\n            extras = self._extras[at] or self._extras[row]")),
]  # fmt: skip
NEEDS_STEPS_IN_FLIGHT = {"nothing is waited for"}


@pytest.mark.parametrize("is_ahead", [False, True], ids=["one step in flight", "two steps in flight"])
def test_many_lives(count: Callable[[int, int], int], seed: int, is_ahead: bool) -> None:
    num_trials = count(6, 60)
    ahead = sum(check_life(Sampler, seed + trial, is_ahead=is_ahead) for trial in range(num_trials))
    assert ahead > 10 * num_trials if is_ahead else ahead == 0


@pytest.mark.parametrize(("owner", "mutant"), MUTANTS, ids=[mutant.name for _, mutant in MUTANTS])
def test_a_planted_bug_is_found(owner: ModuleType, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = planted(owner, mutant)
    for name in owner.__all__:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(broken, name))

    def lives() -> None:
        for trial in range(6):
            check_life(module.Sampler, trial, is_ahead=mutant.name in NEEDS_STEPS_IN_FLIGHT or trial % 2 == 1)

    with pytest.raises(AssertionError):
        lives()


def test_plain_greedy_rows_ask_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy batch gathers no settings, whatever its rows did before or other rows do."""
    sampler = Sampler(4, 50)
    for row in range(4):
        sampler.add(row, SamplingParams(logit_bias={3: 50.0}, top_k=2), prompt_token_ids=[1], seed=row)
    for row in (1, 2):
        sampler.remove(row)
        sampler.add(row, SamplingParams(temperature=0, top_k=5, top_p=0.5), prompt_token_ids=[1], seed=row)
    monkeypatch.setattr(sampler, "_gather", None)
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    found = sampler.sample(logits, np.array([2, 1], dtype=np.int32), np.array([1, 1], dtype=np.int32))
    assert found.token_ids.tolist() == logits.argmax(-1).tolist()
    assert found.failed is None
    assert found.logprobs == {}


def test_penalties_of_a_long_sequence() -> None:
    """Room for seen tokens grows with the sequence, and what was counted stays counted."""
    sampler = Sampler(3, 5000)
    sampler.add(1, SamplingParams(temperature=0, presence_penalty=2.0), prompt_token_ids=[7, 9], seed=0)
    logits, seen = torch.zeros(1, 5000), []
    logits[0, 9] = 1.0
    for position in range(2, 702):
        seen += sampler.sample(logits, np.array([1]), np.array([position])).token_ids.tolist()
    assert seen == [9, *(token_id for token_id in range(701) if token_id != 9)][:700]


def test_unresolved_bad_words_are_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="bad_words"):
        Sampler(1, 10).add(0, SamplingParams(bad_words=["x"]), prompt_token_ids=[1], seed=0)


def test_entries_of_a_prompt() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]])
    found = log_softmax_top(logits, 2, torch.tensor([2, 1]))
    entries = logprob_entries(found)
    assert [(entry.rank, entry.top_ids) for entry in entries] == [(2, [1, 2]), (2, [0, 1])]
    assert [entry.logprob for entry in entries] == found.values.tolist()
    assert [entry.top_ids for entry in logprob_entries(found, [0, 1])] == [[], [0]]
