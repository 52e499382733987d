"""This module holds the simulator's runs: fresh seeds, old failures, and bugs planted to see that it finds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .planted import PLANTED, PLANTED_IN_OVERLAP
from .scenario import FAULTS, Scenario
from .simulator import Failure, Simulation, run, shrink

REGRESSIONS = Path(__file__).with_name("regressions.txt")


def test_every_invariant_holds_under_load_and_faults(count: Callable[[int, int], int], seed: int) -> None:
    failures = []
    scenarios = [Scenario.from_seed(seed + i) for i in range(count(30, 360))]
    for scenario in [each.replace(overlap=overlap) for each in scenarios for overlap in (False, True)]:
        result = run(scenario)
        if isinstance(result, Failure):
            failures.append(f"{result}\nshrunk: {shrink(result, max_runs=50)}")
    assert not failures, "\n".join(failures)


def test_scenarios_reach_what_they_are_meant_to_test() -> None:
    faults: set[str] = set()
    preemptions = hits = cut = failed = wasted = 0
    for i in range(12):
        simulation = Simulation(Scenario.from_seed(i).replace(overlap=i % 2 == 1))
        simulation.run()
        stats = simulation.scheduler.stats
        faults |= simulation.scenario.faults
        preemptions += stats.num_preemptions
        hits += stats.prefix_cache_hits
        wasted += stats.num_wasted_tokens
        sequences = simulation.sequences.values()
        cut += sum(sequence.cut() is not None for sequence in sequences)
        failed += sum(sequence.may_fail for sequence in sequences)
    assert faults == set(FAULTS)
    assert min(preemptions, hits, cut, failed, wasted) >= 20, (preemptions, hits, cut, failed, wasted)


def test_a_scenario_runs_the_same_every_time() -> None:
    first, second = Simulation(Scenario.from_seed(7)), Simulation(Scenario.from_seed(7))
    assert first.run() == second.run()
    assert first.scheduler.stats == second.scheduler.stats
    assert [seq.tokens for seq in first.sequences.values()] == [seq.tokens for seq in second.sequences.values()]


@pytest.mark.parametrize("line", [line for line in REGRESSIONS.read_text().splitlines() if not line.startswith("#")])
def test_old_failures_stay_away(line: str) -> None:
    seed, *words = line.partition("#")[0].split()
    result = run(Scenario.from_seed(int(seed)).with_settings(words))
    assert not isinstance(result, Failure), str(result)


@pytest.mark.parametrize(
    ("name", "overlap"),
    [*((name, overlap) for name in PLANTED for overlap in (False, True)), *((n, True) for n in PLANTED_IN_OVERLAP)],
)
def test_a_planted_bug_is_found_by_name(name: str, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = (PLANTED | PLANTED_IN_OVERLAP)[name]
    scenarios = [Scenario.from_seed(i).with_settings(bug.settings).replace(overlap=overlap) for i in range(8)]
    bug.plant(monkeypatch)
    found = []
    for scenario in scenarios:
        result = run(scenario)
        found.append(result.name if isinstance(result, Failure) else "nothing")
        if found[-1] in bug.caught_by:
            break
    assert found[-1] in bug.caught_by, f"found {found}, wanted one of {bug.caught_by}"


def test_a_failure_shrinks_and_its_command_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED["floor blocks"].plant(monkeypatch)
    failure = run(Scenario.from_seed(1))
    assert isinstance(failure, Failure)
    small = shrink(failure, max_runs=40)
    assert small.name == failure.name
    assert small.scenario.num_requests < failure.scenario.num_requests
    seed, *settings = [word for word in small.scenario.command().split()[3:] if not word.startswith("--")]
    assert Scenario.from_seed(int(seed)).with_settings(settings) == small.scenario
