"""This module holds every two features together: the tokens must be those of the synchronous eager engine. It does not
know which features there are.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo.engine.llm import LLM
from octavo.engine.step import FinishReason, RequestOutput

from ..checkpoints import make_prompts
from .conftest import MakeLLM
from .interactions import PLAIN, WAYS, WISHES, covering, make_table, params, refused_wishes, wish_sets
from .planted import PLANTED, Plant
from .runs import Task, assert_same, run, run_alone
from .storm import Storm

README = Path(__file__).parents[2] / "engine" / "README.md"
MARKS = ("<!-- interactions -->\n", "<!-- end of interactions -->")
LONG, TAIL, SHORT = make_prompts([70, 20, 5], seed=31)
PROMPTS = [LONG, [*LONG[:48], *TAIL], SHORT, TAIL]
REFUSED = refused_wishes()
WISHED = wish_sets()
PAIRWISE = [tuple(way for way in WAYS if way in ways) for ways in covering(list(WAYS), lambda _: True)]
ALL = [ways for size in range(len(WAYS) + 1) for ways in itertools.combinations(WAYS, size)]
MORE = [ways for ways in ALL if ways not in PAIRWISE]

Expected = dict[bool, list[RequestOutput]]


@pytest.fixture(scope="module")
def requests() -> list[Task]:
    return [Task(prompt, params(wishes)) for prompt, wishes in zip(itertools.cycle(PROMPTS), WISHED, strict=False)]


@pytest.fixture(scope="module")
def expected(make_llm: MakeLLM, requests: list[Task]) -> Expected:
    """Each request alone, by whether in invariant mode."""
    return {invariant: run_alone(make_llm(invariant=invariant, **PLAIN), requests) for invariant in (False, True)}


def settings_of(ways: tuple[str, ...]) -> dict[str, Any]:
    found = dict(PLAIN)
    for way in ways:
        found |= WAYS[way]
    return found


def check(llm: LLM, ways: tuple[str, ...], requests: list[Task], expected: Expected) -> None:
    """Run all requests in these ways at once and compare everything that they are told."""
    core = llm.engine.core
    if "prefix hits" in ways:
        run(llm, requests)
    before = core.scheduler.stats
    storm = Storm(llm, random.Random(len(ways)), PROMPTS) if "aborts" in ways else None
    found = run(llm, requests, storm)
    invariant = "invariant" in ways
    assert_same(found, expected[invariant], bitwise=invariant)
    _assert_same_states(found, expected[invariant], bitwise=invariant)
    after = core.scheduler.stats
    if storm is None:
        num_tokens = sum(len(choice.token_ids) for answer in found for choice in answer.outputs)
        assert after.num_output_tokens - before.num_output_tokens == num_tokens, "tokens that nobody got are counted"
    else:
        assert storm.num_aborted > 20
        assert_same(run(llm, requests), expected[invariant], bitwise=invariant)  # its steps may be captured
    assert (after.num_preemptions > before.num_preemptions) == ("preemption" in ways)
    assert (max(answer.num_cached_tokens for answer in found) > 0) == ("prefix hits" in ways)
    assert (graph_counts(llm)["captured"] > 0) == ("graphs" in ways)


def graph_counts(llm: LLM) -> Counter[str]:
    """Return how many steps were captured ones, and how many were not, by reason."""
    graphs = llm.engine.core.runner.graphs  # type: ignore[attr-defined]
    return Counter() if graphs is None else Counter(graphs.counts)


def _assert_same_states(found: list[RequestOutput], expected: list[RequestOutput], *, bitwise: bool) -> None:
    for answer, right in zip(found, expected, strict=True):
        for ours, theirs in zip(answer.outputs, right.outputs, strict=True):
            if theirs.hidden_states is None or ours.token_ids != theirs.token_ids:
                assert (ours.hidden_states is None) == (theirs.hidden_states is None)
            else:
                assert ours.hidden_states is not None
                near = 0.0 if bitwise else 1e-4
                np.testing.assert_allclose(ours.hidden_states, theirs.hidden_states, rtol=near, atol=near)


@pytest.mark.parametrize("ways", PAIRWISE, ids=", ".join)
def test_same_answers(ways: tuple[str, ...], make_llm: MakeLLM, requests: list[Task], expected: Expected) -> None:
    check(make_llm(**settings_of(ways)), ways, requests, expected)


@pytest.mark.full
@pytest.mark.parametrize("ways", MORE, ids=", ".join)
def test_same_answers_in_all_ways(
    ways: tuple[str, ...], make_llm: MakeLLM, requests: list[Task], expected: Expected
) -> None:
    check(make_llm(**settings_of(ways)), ways, requests, expected)


def test_the_requests_use_what_they_claim(expected: Expected) -> None:
    """Wishes that never take effect would be compared in vain; every two that may meet do."""
    choices = [choice for answer in expected[True] for choice in answer.outputs]
    assert {choice.finish_reason for choice in choices} == {FinishReason.STOP, FinishReason.LENGTH}
    assert any(isinstance(choice.stop_reason, str) for choice in choices), "no stop string was found"
    assert any(isinstance(choice.stop_reason, int) for choice in choices), "no stop token was sampled"
    assert len({token for choice in choices for token in choice.token_ids}) > 40, "the model repeats itself"
    for a, b in itertools.combinations(WISHES, 2):
        assert any({a, b} <= set(wishes) for wishes in WISHED) == (frozenset((a, b)) not in REFUSED), (a, b)


@pytest.fixture(scope="module")
def cells(make_llm: MakeLLM) -> dict[frozenset[str], str]:
    """How each way gets on with every other feature; with graphs: why some steps are no captured ones."""
    found = {frozenset((way, feature)): "equal" for way in WAYS for feature in (*WAYS, *WISHES) if way != feature}
    plain = _graphed(make_llm, (), ())
    for feature in (*WAYS, *WISHES):
        if feature != "graphs":
            ways, wishes = ((feature,), ()) if feature in WAYS else ((), (feature,))
            more = _graphed(make_llm, ways, wishes) - plain
            del more["captured"]
            if more:
                found[frozenset(("graphs", feature))] = ", ".join(sorted(more))
    return found


def _graphed(make_llm: MakeLLM, ways: tuple[str, ...], wishes: tuple[str, ...]) -> Counter[str]:
    """Return the steps of three requests with the same beginning, by whether they were captured ones or why not."""
    llm = make_llm(**settings_of(("graphs", *ways)))
    tasks = [Task(prompt, params(wishes)) for prompt in (LONG, PROMPTS[1], SHORT)]
    if "prefix hits" in ways:
        run(llm, tasks)
    before = graph_counts(llm)
    run(llm, tasks, Storm(llm, random.Random(1), [SHORT]) if "aborts" in ways else None)
    return graph_counts(llm) - before


def test_readme_has_the_table(cells: dict[frozenset[str], str]) -> None:
    """To renew it, put what this says is missing between its marks."""
    num_equal = len(WISHES) * (len(WISHES) - 1) // 2 - len(REFUSED)
    table = make_table(cells, REFUSED, num_equal)
    text = README.read_text(encoding="utf-8")
    assert text.partition(MARKS[0])[2].partition(MARKS[1])[0] == table, f"engine/README.md should have:\n{table}"


def test_every_two_ways_meet() -> None:
    """And each of them also does without the other."""
    for a, b in itertools.combinations(WAYS, 2):
        assert {(a in ways, b in ways) for ways in PAIRWISE} == set(itertools.product((True, False), repeat=2)), (a, b)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_finds_planted_bugs(
    plant: Plant, make_llm: MakeLLM, requests: list[Task], expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = ("overlap", "graphs")
    llm = make_llm(**settings_of(ways))
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"request|tokens that nobody got"):
        check(llm, ways, requests, expected)
