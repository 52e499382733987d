"""This module holds what the fake runner must notice, since every test over it relies on that."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from octavo.engine.core import EngineCore
from octavo.engine.runner.fake_runner import FakeRunner, InjectedError, reference_tokens
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler
from octavo.engine.step import ModelOutput, SchedulerOutput

from .building import Clock, limits

ALPHABET = 500


def make_runner() -> FakeRunner:
    return FakeRunner(num_blocks=32, block_size=4, max_num_seqs=8, max_model_len=128, alphabet=ALPHABET)


class Tampering:
    """Changes one step before the runner sees it."""

    def __init__(self, runner: FakeRunner, at_step: int, change: str) -> None:
        self.runner, self.at_step, self.change = runner, at_step, change

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        if step.step == self.at_step:
            if self.change == "slot":
                self.runner.slots[int(self.runner.block_table[0, 0]) * 4 + 1] += np.uint64(1)
            elif self.change == "swapped slots":
                first = int(self.runner.block_table[0, 0]) * 4
                self.runner.slots[[first, first + 1]] = self.runner.slots[[first + 1, first]]
            elif self.change == "stale table":
                step = dataclasses.replace(step, block_ids=step.block_ids[::-1].copy())
            elif self.change == "swapped blocks":
                self.runner.block_table[0, [0, 1]] = self.runner.block_table[0, [1, 0]]
        return self.runner.execute(step)


def generate(runner: FakeRunner | Tampering, prompt: list[int], max_tokens: int, **params: object) -> list[int]:
    core = EngineCore(Scheduler(limits(max_num_batched_tokens=8), Clock()), runner)
    core.add_request("a", prompt, SamplingParams(max_tokens=max_tokens, **({"seed": 3} | params)))
    while core.has_unfinished:
        outputs = core.step()
    return outputs[0].new_token_ids


PROMPT = list(range(20, 33))


def test_tokens_equal_the_reference() -> None:
    expected = reference_tokens(PROMPT, 30, seed=3, alphabet=ALPHABET)
    assert generate(make_runner(), PROMPT, 30) == expected
    assert len(set(expected)) > 20


@pytest.mark.parametrize("change", ["slot", "swapped slots", "swapped blocks"])
def test_one_wrong_slot_changes_every_token_after_it(change: str) -> None:
    expected = reference_tokens(PROMPT, 30, seed=3, alphabet=ALPHABET)
    # The prompt takes steps 0 and 1; from then on step i samples token i - 1.
    got = generate(Tampering(make_runner(), 11, change), PROMPT, 30)
    assert got[:10] == expected[:10]
    assert sum(a == b for a, b in zip(got[10:], expected[10:], strict=True)) <= 2


def test_blocks_in_the_wrong_columns_of_the_first_step_change_nothing_but_who_holds_what() -> None:
    """The table is only names: what matters is that reads go where writes went."""
    expected = reference_tokens(PROMPT, 10, seed=3, alphabet=ALPHABET)
    assert generate(Tampering(make_runner(), 0, "stale table"), PROMPT, 10) == expected


@pytest.mark.parametrize("changed", [{"seed": 4}, {"index": 1}])
def test_seed_and_choice_change_the_tokens(changed: dict[str, int]) -> None:
    base = reference_tokens(PROMPT, 10, seed=3, alphabet=ALPHABET)
    other = reference_tokens(PROMPT, 10, **({"seed": 3, "alphabet": ALPHABET} | changed))
    assert base != other


def test_the_order_of_the_prompt_matters() -> None:
    swapped = [PROMPT[1], PROMPT[0], *PROMPT[2:]]
    assert reference_tokens(PROMPT, 5, seed=3, alphabet=ALPHABET) != reference_tokens(
        swapped, 5, seed=3, alphabet=ALPHABET
    )


def test_stop_tokens_are_not_drawn_before_min_tokens() -> None:
    stops = frozenset(range(0, ALPHABET, 2))
    free = reference_tokens(PROMPT, 30, seed=3, alphabet=ALPHABET, stop_token_ids=stops)
    held = reference_tokens(PROMPT, 30, seed=3, alphabet=ALPHABET, stop_token_ids=stops, min_tokens=8)
    assert len(free) < 8 < len(held) + 1
    assert all(token % 2 for token in held[:8])
    got = generate(make_runner(), PROMPT, 30, stop_token_ids=sorted(stops)[:256], min_tokens=8)
    assert got == held


def test_it_raises_when_told_before_or_after_writing() -> None:
    for when in ("before", "after"):
        runner = make_runner()
        core = EngineCore(Scheduler(limits(), Clock()), runner)
        core.add_request("a", PROMPT, SamplingParams(max_tokens=2, seed=0))
        work = core.scheduler.schedule()
        assert work is not None
        untouched = runner.slots.copy()
        runner.fail_next = when
        with pytest.raises(InjectedError, match=when):
            runner.execute(work)
        assert (runner.slots == untouched).all() == (when == "before")
        assert runner.fail_next is None
