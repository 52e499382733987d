# ruff: noqa: E501 (one line per bug)
"""The sampler's state: right rows, right tokens, through starts, ends, preemption and failures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from octavo.engine.runner import sampler as module
from octavo.engine.runner.sampler import Sampler, logprob_entries
from octavo.engine.sampling_params import SamplingParams
from octavo.kernels.sampling import log_softmax_top

from ..kernels.sampling.mutants import Mutant, planted
from .sampler_checks import check_life

MUTANTS = [
    Mutant("features of the batch position", "extras = self._extras_of(int(rows[at]))\n            if", "extras = self._extras[at] or self._extras_of(int(rows[at]))\n            if"),
    Mutant("bias on the neighbour's row", "tensor(np.repeat([at for at, _, _ in bias]", "tensor(np.repeat([at ^ 1 if at ^ 1 < len(rows) else at for at, _, _ in bias]"),
    Mutant(
        "bias stays after its request has left",
        "self._extras[row] = extras\n",
        "self._extras[row] = extras = extras or self._extras[row]\n",
        also=(("self._extras[row] = None", "pass"),),
    ),
    Mutant("new tokens are not counted", "self._num_seen[rows] += is_new", "self._num_seen[rows] += 0"),
    Mutant("penalties see the row's last tenant", "self._num_seen[row] = len(seen)", "self._num_seen[row] = max(len(seen), self._num_seen[row])"),
    Mutant("penalties see a neighbour's token", "rows[at_penalised], token_ids[at_penalised]", "rows[at_penalised], token_ids[: len(at_penalised)]"),
    Mutant("penalties forget outputs at preemption", "outputs = np.asarray(output_token_ids,", "outputs = np.asarray(output_token_ids[:0],"),
    Mutant("counts restart at preemption", "np.searchsorted(seen, outputs)", "np.searchsorted(seen, outputs[:1])"),
    Mutant("penalty strengths of the batch position", "presence=tensor(self._presence[penalised])", "presence=tensor(self._presence[at])"),
    Mutant("min_tokens one too few", "stops_from=num_prompt_tokens + params.min_tokens", "stops_from=num_prompt_tokens + params.min_tokens - 1"),
    Mutant("min_tokens one too many", "stops_from=num_prompt_tokens + params.min_tokens", "stops_from=num_prompt_tokens + params.min_tokens + 1"),
    Mutant("min_tokens ignored", "[self.stops, self.banned] if", "[self.banned] if"),
    Mutant("bad words do not follow the output", "self.tail.append(token_id)", "self.tail.append(self.tail[-1])"),
    Mutant("bad words do not see the prompt", "if missing := max_tail - len(tail):", "if missing := 0:"),
    Mutant("bad words of one token ignored", "if len(ids) == 1], dtype", "if len(ids) == 0], dtype"),
    Mutant("seed of another row", "seed=tensor(self._seed[rows])", "seed=tensor(np.roll(self._seed[rows], 1))"),
    Mutant("choice ignored", "self._choice[row] = choice", "self._choice[row] = 0"),
    Mutant("position one late", "tensor(np.asarray(positions, dtype=np.int64))", "tensor(np.asarray(positions + 1, dtype=np.int64))"),
    Mutant("top_p of the batch position", "tensor(self._top_p[rows])", "tensor(self._top_p[: len(rows)])"),
    Mutant("log-probabilities of another row", "logits[index], token_ids[index]", "logits[: len(at)], token_ids[index]"),
    Mutant("log-probabilities include ids that do not exist", "logits = logits[:, : self._num_valid_ids]", "logits = logits[:, :]"),
]  # fmt: skip


def test_many_lives(count: Callable[[int, int], int], seed: int) -> None:
    for trial in range(count(6, 60)):
        check_life(Sampler, seed + trial)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found(mutant: Mutant) -> None:
    sampler_class = planted(module, mutant).Sampler

    def lives() -> None:
        for trial in range(6):
            check_life(sampler_class, trial)

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
