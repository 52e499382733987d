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


@dataclass
class Drawn:
    """A draw, and what its rows were when it was launched."""

    draw: Any
    rows: list[int]
    logits: np.ndarray
    bad_at: int
    tenants: list[Tenant]


@dataclass(eq=False)
class Tenant:
    """A sequence for as long as it keeps its row."""

    sequence: Sequence
    in_flight: int = 0

    @property
    def position(self) -> int:
        return len(self.sequence.prompt) + len(self.sequence.output) + self.in_flight


@dataclass
class Life:
    """A sampler's rows over many steps; of two steps in flight the second may be launched before the first is known."""

    sampler: Any
    rng: np.random.Generator
    is_ahead: bool
    running: dict[int, Tenant] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)
    pending: list[Drawn] = field(default_factory=list)
    unsure: int = 0
    sampled: int = 0
    ahead: int = 0

    def come_and_go(self) -> None:
        for row in list(self.running):
            if (chance := self.rng.random()) < 0.15:
                self.sampler.remove(row)
                tenant = self.running.pop(row)
                if chance < 0.08:
                    self.preempted.append(tenant.sequence)
        for row in self.rng.permutation(MAX_NUM_SEQS).tolist():
            if row not in self.running and self.rng.random() < 0.7:
                sequence = self.preempted.pop() if self.preempted else new_sequence(self.rng)
                self.running[row] = Tenant(sequence)
                sequence.add_to(self.sampler, row)

    def launch(self, rows: np.ndarray) -> None:
        logits = self.rng.standard_normal((len(rows), VOCAB_SIZE)).astype(np.float32)
        bad_at = int(self.rng.integers(len(rows))) if self.rng.random() < 0.1 else -1
        if bad_at >= 0:
            logits[bad_at, 1] = np.nan
        tenants = [self.running[row] for row in rows.tolist()]
        if self.pending and self.stalls(tenants):
            self.land()
        positions = np.array([tenant.position for tenant in tenants])
        self.sampler.prepare(rows, positions)
        if self.pending and self.sampler.needs_host(rows):
            self.land()
        self.ahead += len(self.pending)
        draw = self.sampler.launch(torch.from_numpy(logits), rows, positions)
        for tenant in tenants:
            tenant.in_flight += 1
        self.pending.append(Drawn(draw, rows.tolist(), logits, bad_at, tenants))
        if len(self.pending) > self.is_ahead:
            self.land()

    def stalls(self, tenants: list[Tenant]) -> bool:
        """Whether the position of a token is not what it was said to be: a row that failed samples it again."""
        drawn = self.pending[0]
        return drawn.bad_at >= 0 and drawn.tenants[drawn.bad_at] in tenants

    def land(self) -> None:
        drawn = self.pending.pop(0)
        found = drawn.draw.wait()
        token_ids = drawn.draw.token_ids
        assert token_ids.dtype == torch.int32
        assert token_ids.tolist() == found.token_ids.tolist()
        assert (found.failed is None) == (drawn.bad_at < 0)
        wanted = {at for at, each in enumerate(drawn.tenants) if each.sequence.params.logprobs is not None}
        wanted -= {drawn.bad_at}
        assert found.logprobs.keys() == wanted
        for at, tenant in enumerate(drawn.tenants):
            tenant.in_flight -= 1
            if at == drawn.bad_at:
                assert found.failed[at]
                assert at not in found.errors
            elif self.running.get(drawn.rows[at]) is tenant:
                self.check(tenant.sequence, int(found.token_ids[at]), drawn.logits[at])
                if at in wanted:
                    assert_logprobs(found.logprobs[at], drawn.logits[at], tenant.sequence)

    def check(self, sequence: Sequence, found: int, logits: np.ndarray) -> None:
        token_id, ahead = sequence.expected(logits.astype(np.float64)).token()
        self.sampled += 1
        if ahead < 1e-4:
            self.unsure += 1
        else:
            assert found == token_id, f"{sequence}"
        sequence.output.append(found)


def check_life(sampler_class: Any, seed: int, num_steps: int = 60, *, is_ahead: bool = False) -> int:
    """Start, stop, preempt and resume sequences at random; every token and every report must be the oracle's.

    Returns:
        How many steps were launched before the one before was known.
    """
    rng = np.random.default_rng(seed)
    life = Life(sampler_class(MAX_NUM_SEQS, VOCAB_SIZE, num_valid_ids=NUM_VALID_IDS), rng, is_ahead)
    rows = np.empty(0, dtype=np.int32)
    for _ in range(num_steps):
        if not len(rows) or rng.random() < 0.35:
            life.come_and_go()
        if not len(rows) or not life.running.keys() >= set(rows.tolist()) or rng.random() < 0.35:
            rows = rng.permutation(list(life.running))[: rng.integers(1, MAX_NUM_SEQS + 1)].astype(np.int32)
        life.launch(rows)
    while life.pending:
        life.land()
    assert life.sampled > num_steps // 2
    assert life.unsure <= 1 + life.sampled // 100
    return life.ahead


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
