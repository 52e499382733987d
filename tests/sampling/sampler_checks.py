"""This module holds a life of many sequences on few rows, with an oracle beside each. It does not know torch's part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from octavo.engine.sampling_params import SamplingParams

from ..kernels.sampling.oracle import Row

VOCAB_SIZE = 40
NUM_VALID_IDS = 38
MAX_NUM_SEQS = 6
PAIRS = [[first, second] for first in range(8) for second in range(4)]


@dataclass
class Sequence:
    """One request's sequence, as the scheduler would know it."""

    params: SamplingParams
    prompt: list[int]
    seed: int
    choice: int
    stops: frozenset[int]
    output: list[int] = field(default_factory=list)

    def add_to(self, sampler: Any, row: int) -> None:
        sampler.add(
            row,
            self.params,
            prompt_token_ids=np.array(self.prompt, dtype=np.int32),
            output_token_ids=np.array(self.output, dtype=np.int32),
            seed=self.seed,
            choice=self.choice,
            stop_token_ids=self.stops,
        )

    def expected(self, logits: np.ndarray) -> Row:
        tokens, params = self.prompt + self.output, self.params
        banned = {
            ids[-1] for ids in params.bad_words_token_ids if len(ids) == 1 or tokens[1 - len(ids) :] == list(ids[:-1])
        }
        return Row(
            logits,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=self.seed,
            choice=self.choice,
            position=len(tokens),
            num_valid_ids=NUM_VALID_IDS,
            allowed=params.allowed_token_ids,
            banned=banned | (self.stops if len(self.output) < params.min_tokens else frozenset()),
            bias=params.logit_bias or {},
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            prompt=self.prompt,
            output=self.output,
        )


def new_sequence(rng: np.random.Generator) -> Sequence:
    """Draw a sequence; most have one or two features, some none."""
    ids = rng.permutation(VOCAB_SIZE).tolist()
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.0},
        {"logit_bias": {ids[0]: 5.0, ids[1]: -5.0}},
        {"allowed_token_ids": [token_id for token_id in ids if token_id % 3]},
        # A small alphabet, so that the beginnings of these really occur.
        {"bad_words_token_ids": [*PAIRS, [5], [2, 3, 1]], "logit_bias": dict.fromkeys(range(8), 4.0)},
        {"min_tokens": 3},
        {"logprobs": 2},
        {"logprobs": 0},
    ]
    fields = {"temperature": 1.0}
    for option in rng.choice(len(options), rng.integers(4), replace=False):
        fields |= options[option]
    return Sequence(
        SamplingParams(**fields),
        prompt=rng.integers(0, 8 if rng.random() < 0.5 else VOCAB_SIZE, rng.integers(1, 9)).tolist(),
        seed=int(rng.integers(2**63)),
        choice=int(rng.integers(3)),
        stops=frozenset(ids[5:20]),
    )


def check_life(sampler_class: Any, seed: int, num_steps: int = 60) -> None:
    """Start, stop, preempt and resume sequences at random; every token and every report must be the oracle's."""
    rng = np.random.default_rng(seed)
    sampler = sampler_class(MAX_NUM_SEQS, VOCAB_SIZE, num_valid_ids=NUM_VALID_IDS)
    running: dict[int, Sequence] = {}
    preempted: list[Sequence] = []
    unsure = sampled = 0
    for _ in range(num_steps):
        for row in list(running):
            if (chance := rng.random()) < 0.15:
                sampler.remove(row)
                sequence = running.pop(row)
                if chance < 0.08:
                    preempted.append(sequence)
        for row in rng.permutation(MAX_NUM_SEQS).tolist():
            if row not in running and rng.random() < 0.7:
                running[row] = preempted.pop() if preempted else new_sequence(rng)
                running[row].add_to(sampler, row)
        rows = rng.permutation(list(running))[: rng.integers(1, MAX_NUM_SEQS + 1)].astype(np.int32)
        logits = rng.standard_normal((len(rows), VOCAB_SIZE)).astype(np.float32)
        bad_at = int(rng.integers(len(rows))) if rng.random() < 0.1 else -1
        if bad_at >= 0:
            logits[bad_at, 1] = np.nan
        sequences = [running[row] for row in rows.tolist()]
        positions = np.array([len(sequence.prompt) + len(sequence.output) for sequence in sequences])
        found = sampler.sample(torch.from_numpy(logits), rows, positions)
        assert (found.failed is None) == (bad_at < 0)
        wanted = {at for at, sequence in enumerate(sequences) if sequence.params.logprobs is not None} - {bad_at}
        assert found.logprobs.keys() == wanted
        for at, sequence in enumerate(sequences):
            if at == bad_at:
                assert found.failed[at]
                continue
            token_id, ahead = sequence.expected(logits[at].astype(np.float64)).token()
            sampled += 1
            if ahead < 1e-4:
                unsure += 1
            else:
                assert int(found.token_ids[at]) == token_id, f"{sequence}"
            sequence.output.append(int(found.token_ids[at]))
            if at in wanted:
                assert_logprobs(found.logprobs[at], logits[at], sequence)
    assert sampled > num_steps
    assert unsure <= 1 + sampled // 100


def assert_logprobs(entry: Any, logits: np.ndarray, sequence: Sequence) -> None:
    """The raw distribution over the ids that exist, whatever changed the logits afterwards."""
    x = logits[:NUM_VALID_IDS].astype(np.float64)
    logprobs = x - np.log(np.exp(x).sum())
    ranking = np.argsort(-x, kind="stable")[: sequence.params.logprobs]
    chosen = sequence.output[-1]
    assert entry.top_ids == ranking.tolist()
    assert np.abs(np.array(entry.top_logprobs) - logprobs[ranking]).max(initial=0.0) < 1e-6
    assert abs(entry.logprob - logprobs[chosen]) < 1e-6
    assert entry.rank == (x >= x[chosen]).sum()
