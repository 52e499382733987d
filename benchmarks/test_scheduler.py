"""This module holds the limits of what scheduling may cost on the host. It does not know why a machine is slow.

Steps are compared with a loop timed in the same run, so other load on the machine shifts both; the best of three tries
counts, since only interruptions make a try worse.
"""

from __future__ import annotations

import pytest

from .scheduler import measure_admission, measure_steps


@pytest.mark.parametrize("num_seqs", [32, 256, 1024])
def test_a_decode_step_costs_at_most_two_bare_loops_over_its_rows(num_seqs: int) -> None:
    costs = [measure_steps(num_seqs, 100, num_steps=64) for _ in range(3)]
    assert min(cost.ratio for cost in costs) < 2.0, costs


def test_a_decode_step_costs_what_changes_and_not_what_runs() -> None:
    few, many = ([measure_steps(num_seqs, 100, num_steps=64) for _ in range(3)] for num_seqs in (32, 1024))
    growth = min(cost.median_us for cost in many) / min(cost.median_us for cost in few)
    assert growth < 16.0, f"32 times the rows cost {growth:.1f} times as much"


def test_a_decode_step_costs_the_same_at_any_length() -> None:
    short, long = ([measure_steps(64, context, num_steps=64) for _ in range(3)] for context in (100, 4000))
    growth = min(cost.median_us for cost in long) / min(cost.median_us for cost in short)
    assert growth < 1.5, f"40 times the context costs {growth:.2f} times as much"


@pytest.mark.parametrize("block_size", [16, 64])
def test_admission_with_hashing_costs_little(block_size: int) -> None:
    costs = [measure_admission(1024, block_size, repeats=20) for _ in range(3)]
    assert min(cost.cold_us for cost in costs) < 150.0, costs
    assert min(cost.hit_us for cost in costs) < 200.0, costs
