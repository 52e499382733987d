"""What a row that looks back waits for, and what is found out only when a draw is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from octavo.engine.runner.sampler import Sampler
from octavo.engine.runner.staging import HostCopy
from octavo.engine.sampling_params import SamplingParams

VOCAB_SIZE = 40
ROWS = np.array([0, 1])


class Counting:
    """A grammar whose outputs are 0, 1, 2, ...; it never ends."""

    may_end = must_end = False
    error = ""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self.next_id = len(token_ids)

    def start(self, output_token_ids: Sequence[int]) -> Counting:
        return Counting(output_token_ids)

    def fill(self, bitmask: np.ndarray) -> None:
        bitmask[:] = 0
        bitmask[self.next_id // 32] = 1 << self.next_id % 32

    def accept(self, token_id: int) -> None:
        assert token_id == self.next_id
        self.next_id += 1


def make_sampler(params: SamplingParams, grammar: Counting | None = None) -> Sampler:
    """Return a sampler with a plain row, 1, beside one that has wishes, 0."""
    sampler = Sampler(2, VOCAB_SIZE)
    sampler.add(0, params, prompt_token_ids=[1, 2], seed=0, grammar=grammar)
    sampler.add(1, SamplingParams(), prompt_token_ids=[1, 2], seed=1)
    return sampler


@pytest.mark.parametrize("looks_back", ["grammar", "bad words"])
def test_a_row_that_looks_back_waits_for_its_last_token_and_nobody_else_does(looks_back: str) -> None:
    if looks_back == "grammar":
        sampler = make_sampler(SamplingParams(temperature=0), Counting())
    else:
        sampler = make_sampler(SamplingParams(temperature=0, bad_words_token_ids=[[0, 0]]))
    logits = torch.arange(VOCAB_SIZE, 0, -1.0).repeat(2, 1)
    assert not sampler.needs_host(ROWS)
    draw = sampler.launch(logits, ROWS, np.array([2, 2]))
    assert sampler.needs_host(ROWS)
    assert not sampler.needs_host(ROWS[1:])
    with pytest.raises(AssertionError, match="row 0 is launched before its last token is known"):
        sampler.launch(logits, ROWS, np.array([3, 3]))
    sampler.launch(logits[1:], ROWS[1:], np.array([3]))  # beside it, the plain row goes on
    assert draw.wait().token_ids[0] == 0
    assert not sampler.needs_host(ROWS)
    assert sampler.launch(logits[:1], ROWS[:1], np.array([3])).wait().token_ids[0] == 1


def test_nobody_waits_for_a_token_after_a_wait_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row's request ends; the next step, which is out with others in it, must go on."""
    sampler = make_sampler(SamplingParams(temperature=0), Counting())
    logits = torch.zeros(2, VOCAB_SIZE)
    draw = sampler.launch(logits, ROWS, np.array([2, 2]))

    def interrupted(self: HostCopy) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw.wait()
    assert not sampler.needs_host(ROWS)
    sampler.launch(logits, ROWS, np.array([3, 3])).wait()


def test_a_mask_is_begun_as_soon_as_its_token_is_known_and_no_sooner() -> None:
    sampler = make_sampler(SamplingParams(temperature=0), Counting())
    extras = sampler._extras[0]
    assert extras is not None
    assert extras.grammar is not None
    logits = torch.zeros(2, VOCAB_SIZE)
    draw = sampler.launch(logits, ROWS, np.array([2, 2]))
    first = extras.grammar._next
    sampler.prepare(ROWS, np.array([3, 3]))
    assert extras.grammar._next is first
    draw.wait()
    assert isinstance(extras.grammar._next, Future)
    assert extras.grammar._next.result()[0] == 2


def test_a_removed_rows_draw_says_nothing_to_its_next_owner() -> None:
    params = SamplingParams(temperature=0)
    sampler = make_sampler(params, Counting())
    draw = sampler.launch(torch.zeros(2, VOCAB_SIZE), ROWS, np.array([2, 2]))
    sampler.remove(0)
    sampler.add(0, params, prompt_token_ids=[1, 2], seed=0, grammar=Counting())
    assert not sampler.needs_host(ROWS)
    draw.wait()
    assert sampler.sample(torch.zeros(2, VOCAB_SIZE), ROWS, np.array([2, 2])).token_ids[0] == 0


def test_why_a_row_failed_is_found_when_it_is_waited_for() -> None:
    """Whatever becomes of the logits meanwhile."""
    sampler = make_sampler(SamplingParams(allowed_token_ids=[3], bad_words_token_ids=[[3]]))
    for is_finite in (True, False):
        logits = torch.zeros(2, VOCAB_SIZE)
        logits[0, 7] = 0.0 if is_finite else torch.nan
        draw = sampler.launch(logits, ROWS, np.array([2, 2]))
        logits.fill_(torch.nan if is_finite else 0.0)
        found = draw.wait()
        assert found.failed is not None
        assert found.failed.tolist() == [True, False]
        assert [error.param for error in found.errors.values()] == ["allowed_token_ids"] * is_finite


def test_a_steady_batch_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler(SamplingParams(top_p=0.9, min_tokens=3), None)
    sampler.add(0, SamplingParams(top_p=0.9, min_tokens=3), prompt_token_ids=[1, 2], seed=0, stop_token_ids=[5])
    gathered, gather = [], sampler._gather
    monkeypatch.setattr(sampler, "_gather", lambda *args: gathered.append(args) or gather(*args))
    for position in range(2, 9):
        sampler.sample(torch.zeros(2, VOCAB_SIZE), ROWS, np.full(2, position))
    assert len(gathered) == 2  # at first, and when `min_tokens` was reached
