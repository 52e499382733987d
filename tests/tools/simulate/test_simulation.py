"""The run of a simulation: against a plain one token by token, against itself without its short cut, against queueing
theory.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pytest
from octavo.engine.request import Request
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler, SchedulerLimits
from octavo.engine.step import ModelOutput
from octavo.engine.tools.roofline import CostModel, StepWork
from octavo.engine.tools.simulate.figures import _quantiles, figures, simulation_lines
from octavo.engine.tools.simulate.simulation import Outcome, Simulation, work_of
from octavo.engine.tools.simulate.workload import DrawnPrompts, Workload
from octavo.engine.tools.workload import gamma_arrivals

from .loads import Constant, Uneven, draw, limits

CASES = {
    "alone": (draw(40, 0.2), limits()),
    "a few": (draw(60, 2.0, seed=1), limits()),
    "crowded": (draw(80, 30.0, seed=2), limits()),
    "at once": (draw(80, math.inf, seed=3), limits()),
    "preempted": (draw(60, math.inf, seed=4, output=200), limits(num_blocks=40)),
    # Both rows fill a block in the same step, and one of them loses it in the next.
    "in step": (
        Workload(
            "alike", np.zeros(12), np.full(12, 20), np.full(12, 100), DrawnPrompts(0, np.zeros(12, dtype=np.int64))
        ),
        limits(max_num_seqs=2, num_blocks=10),
    ),
    "small blocks": (draw(40, 1.0, seed=5), limits(block_size=4, num_blocks=256)),
    "large blocks": (draw(40, 1.0, seed=6), limits(block_size=128, num_blocks=32)),
    "no cache": (draw(40, 1.0, seed=7), limits(prefix_caching=False)),
    "prefixes": (draw(80, 8.0, seed=8, prefix=48), limits()),
    "two rows": (draw(40, 3.0, seed=9), limits(max_num_seqs=2)),
    "refused": (draw(60, 3.0, seed=10, prompt=200, output=200), limits()),
}


def plain(workload: Workload, allowed: SchedulerLimits, cost: CostModel) -> dict[str, list[float]]:
    """Simulate one step after another with every row streaming, and keep when each token came."""
    now, number, times = 0.0, 0, defaultdict[str, list[float]](list)
    scheduler = Scheduler(allowed, lambda: now)
    arrivals = workload.arrival_s.tolist()
    while number < len(workload) or scheduler.has_unfinished:
        while number < len(workload) and arrivals[number] <= now:
            ids = workload.prompt(number, allowed.vocab_size)
            most = len(ids) + int(workload.output_tokens[number])
            if most <= allowed.max_model_len:
                asked = Request(str(number), 0, ids, len(ids), most, SamplingParams(), 0, arrival=number, stream=True)
                scheduler.add([asked], arrivals[number])
            number += 1
        step = scheduler.schedule()
        if step is None:
            now = arrivals[number] if number < len(workload) else now
            continue
        pairs = zip(step.num_scheduled_tokens.tolist(), step.num_computed_tokens.tolist(), strict=True)
        now += cost.step_s(StepWork.of([(count, done + count) for count, done in pairs], len(step.sampled)))
        for news in scheduler.update(step, ModelOutput(np.zeros(len(step.sampled), dtype=np.int32))):
            times[news.request_id] += [now] * len(news.new_token_ids)
    return times


def simulate(workload: Workload, allowed: SchedulerLimits, cost: CostModel, *, run_ahead: bool = True) -> Outcome:
    simulation = Simulation(workload, allowed, cost, run_ahead=run_ahead)
    outcome = simulation.run()
    simulation.scheduler.check_integrity()
    assert simulation.scheduler.kv.pool.num_free == allowed.num_blocks
    return outcome


@pytest.mark.parametrize("name", CASES)
def test_every_time_is_that_of_a_plain_simulation_token_by_token(name: str) -> None:
    workload, allowed = CASES[name]
    outcome = simulate(workload, allowed, Uneven())
    times = plain(workload, allowed, Uneven())
    assert np.flatnonzero(outcome.done).tolist() == sorted(map(int, times))
    for number, mine in times.items():
        assert len(mine) == workload.output_tokens[int(number)]
        assert (outcome.first_token_s[int(number)], outcome.finished_s[int(number)]) == (mine[0], mine[-1])
    gaps = np.concatenate([np.diff(mine) for mine in times.values()])
    assert np.array_equal(np.sort(np.repeat(outcome.gaps_s, outcome.num_gaps)), np.sort(gaps))
    assert outcome.busy_s <= outcome.finished_s[outcome.done].max()
    if name in ("preempted", "in step"):
        assert outcome.num_preemptions.sum() > 5
    if name == "refused":
        assert len(outcome.refused) == (~outcome.done).sum() > 5


@pytest.mark.parametrize("name", CASES)
def test_running_ahead_changes_nothing(name: str) -> None:
    workload, allowed = CASES[name]
    both = [Simulation(workload, allowed, Uneven(), run_ahead=ahead) for ahead in (True, False)]
    quick, slow = (simulation.run() for simulation in both)
    pools = [simulation.scheduler.kv.pool for simulation in both]
    assert pools[0].free_blocks() == pools[1].free_blocks()
    for block in range(1, allowed.num_blocks + 1):
        assert pools[0].cached_entry(block) == pools[1].cached_entry(block)
    for each in fields(Outcome):
        first, second = getattr(quick, each.name), getattr(slow, each.name)
        if each.name not in ("gaps_s", "num_gaps"):
            assert np.array_equal(first, second, equal_nan=isinstance(first, np.ndarray)) or first is second, each.name
    assert np.array_equal(np.repeat(quick.gaps_s, quick.num_gaps), np.repeat(slow.gaps_s, slow.num_gaps))


def test_running_ahead_spares_the_scheduler_most_steps_where_few_requests_run() -> None:
    workload, allowed = CASES["large blocks"]
    simulation = Simulation(workload, allowed, Uneven())
    outcome = simulation.run()
    assert simulation.scheduler.stats.num_steps < outcome.num_steps / 4


def test_the_work_of_a_step_is_counted_as_the_roofline_counts_it() -> None:
    seen: list[tuple[StepWork, StepWork]] = []
    workload, allowed = draw(30, 20.0, seed=11), limits(max_num_batched_tokens=100)
    scheduler = Scheduler(allowed, lambda: 0.0)
    for number in range(len(workload)):
        ids = workload.prompt(number, allowed.vocab_size)
        scheduler.add([Request(str(number), 0, ids, len(ids), len(ids) + 9, SamplingParams(), 0, arrival=number)])
    while (step := scheduler.schedule()) is not None:
        counts, ends = step.num_scheduled_tokens, step.num_computed_tokens + step.num_scheduled_tokens
        pairs = list(zip(counts.tolist(), ends.tolist(), strict=True))
        seen.append((work_of(step), StepWork.of(pairs, len(step.sampled))))
        scheduler.update(step, ModelOutput(np.zeros(len(step.sampled), dtype=np.int32)))
    assert any(work.num_tokens > work.num_seqs > work.num_sampled for work, _ in seen), "no chunk among them"
    assert all(work == expected for work, expected in seen)


def test_prompts_that_share_a_prefix_hit_exactly_its_full_blocks() -> None:
    num = 20
    zeros = np.zeros(num, dtype=np.int64)
    workload = Workload("prefix", np.arange(num) * 10.0, zeros + 90, zeros + 3, DrawnPrompts(70, zeros))
    outcome = simulate(workload, limits(), Uneven())
    assert outcome.num_cached_tokens.tolist() == [0] + [64] * (num - 1)
    assert outcome.prefix_hits == 64 * (num - 1)
    assert outcome.prefix_queries == 90 * num


def test_the_timeline_tells_what_ran_at_each_moment() -> None:
    zeros = np.zeros(3, dtype=np.int64)
    workload = Workload("three", np.array([0.0, 8.25, 8.25]), zeros + 40, zeros + 16, DrawnPrompts(0, zeros))
    step_s = 0.25 + 2**-11  # what happens lies just behind a moment that is told
    outcome = simulate(workload, limits(max_num_seqs=1), Constant(step_s))
    first, second, third = (16 * step_s, 8.25 + 16 * step_s, 8.25 + 32 * step_s)
    assert outcome.finished_s.tolist() == [first, second, third]
    at = (np.arange(len(outcome.moments)) * outcome.distance_s).tolist()
    for time_s, (running, waiting, used) in zip(at, outcome.moments.tolist(), strict=True):
        assert running == (not first <= time_s < 8.25), time_s
        assert waiting == (8.25 <= time_s < second), time_s
        assert (used > 0) == running, time_s
    assert 200 < len(at) <= 1024


def test_figures_are_those_of_numpy_over_every_single_time() -> None:
    workload, allowed = CASES["prefixes"]
    outcome = simulate(workload, allowed, Uneven())
    times = plain(workload, allowed, Uneven())
    result = figures(outcome, allowed.num_blocks, {"ttft": 60.0, "tpot": 16.0})
    gaps = 1000 * np.concatenate([np.diff(mine) for mine in times.values()])
    first = 1000 * np.array([times[str(i)][0] - workload.arrival_s[i] for i in range(len(workload))])
    tpot = np.array(
        [np.ptp(mine) / max(len(mine) - 1, 1) for _, mine in sorted(times.items(), key=lambda x: int(x[0]))]
    )
    for name, values in (("itl", gaps), ("ttft", first), ("tpot", 1000 * tpot[workload.output_tokens > 1])):
        expected = (
            values.mean(),
            np.median(values),
            values.std(),
            np.percentile(values, 90),
            np.percentile(values, 99),
        )
        found = [result[f"{each}_{name}_ms"] for each in ("mean", "median", "std", "p90", "p99")]
        assert found == pytest.approx(expected, rel=1e-9), name
    duration = max(mine[-1] for mine in times.values())
    good = int(((first <= 60) & (1000 * tpot <= 16)).sum())
    assert 0 < good < len(workload)
    assert result["request_goodput"] == pytest.approx(good / duration)
    assert result["output_throughput"] == pytest.approx(workload.output_tokens.sum() / duration)
    changes = [(workload.arrival_s[i], 1) for i in range(len(workload))] + [(each[-1], -1) for each in times.values()]
    assert result["max_concurrent_requests"] == np.cumsum([change for _, change in sorted(changes)]).max()
    assert json.loads(json.dumps(result)) == result
    assert any("Preemptions" in line for line in simulation_lines(result))


def test_quantiles_of_counted_values_are_those_of_all_of_them() -> None:
    rng = np.random.default_rng(0)
    for num in (1, 2, 3, 50):
        values, counts = rng.random(num).round(1), rng.integers(1, 9, num)
        percents = np.linspace(0, 100, 37)
        found = _quantiles(values, counts, percents)
        assert found == pytest.approx(np.percentile(np.repeat(values, counts), percents), abs=1e-12)


def test_nothing_at_all_is_a_result_too() -> None:
    zeros = np.zeros(1, dtype=np.int64)
    refused = Workload("too long", np.zeros(1), zeros + 5000, zeros + 1, DrawnPrompts(0, zeros))
    outcome = simulate(refused, limits(), Constant(1.0))
    assert "prompt and output are up to 5001 tokens" in outcome.refused[0]
    result = figures(outcome, 64, {"ttft": 1.0})
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 1, None)
    assert simulation_lines(result)


def lindley(arrival_s: npt.NDArray[np.float64], service_s: float) -> npt.NDArray[np.float64]:
    """Return the waiting times of a queue with one server: W' = max(0, W + S - gap), as running minima."""
    steps = np.concatenate(((0.0,), service_s - np.diff(arrival_s, axis=-1)))
    walk = np.cumsum(steps)
    waits: npt.NDArray[np.float64] = walk - np.minimum.accumulate(walk)
    return waits


def at_random(num: int, load: float, seed: int) -> npt.NDArray[np.float64]:
    return gamma_arrivals(num, load, 1.0, seed)


def test_one_row_waits_as_a_queue_with_one_server_does(count: Callable[[int, int], int], seed: int) -> None:
    """With the same arrivals the waiting times are those of Lindley's recursion; and their mean is that of M/D/1,
    rho / (2 (1 - rho)) times the service time (Pollaczek-Khinchine), as far as a run of this length can tell.
    """
    num, load = min(count(10_000, 1_000_000), 1_000_000), 0.6
    ones = np.ones(num, dtype=np.int64)
    workload = Workload("M/D/1", at_random(num, load, seed), 4 * ones, ones, DrawnPrompts(0, 0 * ones))
    outcome = simulate(workload, limits(max_num_seqs=1, prefix_caching=False), Constant(1.0))
    waits = outcome.scheduled_s - workload.arrival_s
    assert np.allclose(waits, lindley(workload.arrival_s, 1.0), rtol=0, atol=1e-6)
    expected = load / (2 * (1 - load))
    # How far the mean of so many waiting times strays: seen in short runs of the recursion alone, and 0.32 % for 10^6.
    means = [lindley(at_random(10_000, load, 1000 + i), 1.0).mean() for i in range(200)]
    spread = float(np.std(means)) * math.sqrt(10_000 / num)
    assert spread < 0.05 * expected
    bound = 0.015 * expected if num == 1_000_000 else 4 * spread
    assert abs(waits.mean() - expected) < bound, f"{waits.mean():.4f} for {expected:.4f}, spread {spread:.4f}"
