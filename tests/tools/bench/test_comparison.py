"""How two measurements are compared: against scipy, and against what must be seen and what must not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from octavo.engine.tools.bench.comparison import difference_lines, of_repeats, t_quantile
from scipy import stats


@pytest.mark.parametrize("degrees", [1.0, 1.5, 2.0, 3.7, 10.0, 58.0, 1000.0])
def test_the_quantile_is_students(degrees: float) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (30, 7)])
def test_the_interval_is_welchs_on_logarithms(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    old, new = (rng.lognormal(0.0, spread, size) for spread, size in zip((0.1, 0.3), sizes, strict=True))
    found = of_repeats("x", old.tolist(), new.tolist())
    interval = stats.ttest_ind(np.log(new), np.log(old), equal_var=False).confidence_interval(0.95)
    assert found.old == pytest.approx(stats.gmean(old))
    assert found.new == pytest.approx(stats.gmean(new))
    assert found.low is not None
    assert found.high is not None
    assert (math.log1p(found.low), math.log1p(found.high)) == pytest.approx((interval.low, interval.high), rel=5e-3)


def test_intervals_hold_what_is_true_as_often_as_they_say(count: Callable[[int, int], int]) -> None:
    trials, rng, held = count(300, 3000), np.random.default_rng(7), 0
    for _ in range(trials):
        old, new = rng.lognormal(1.0, 0.05, 3), rng.lognormal(1.0 + math.log(1.2), 0.05, 4)
        found = of_repeats("x", old.tolist(), new.tolist())
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.2 <= found.high
    # Four standard deviations of a binomial; Welch's is a little wide where there are so few.
    reach = 4 * math.sqrt(0.95 * 0.05 / trials)
    assert 0.95 - reach <= held / trials <= min(1.0, 0.97 + reach)


def test_what_differs_is_said_and_what_does_not_is_not() -> None:
    assert of_repeats("x", [1.0, 1.01, 0.99], [1.0, 1.02, 0.98]).verdict == "no difference seen"
    assert of_repeats("x", [1.0, 1.01, 0.99], [1.3, 1.31, 1.29]).verdict == "higher"
    assert of_repeats("x", [1.0, 1.01, 0.99], [0.7, 0.71, 0.69]).verdict == "lower"
    assert of_repeats("x", [2.0, 2.0], [3.0, 3.0])[1:] == pytest.approx((2.0, 3.0, 0.5, 0.5))
    alone = of_repeats("x", [2.0], [3.0, 3.1])
    assert (alone.low, alone.high, alone.verdict) == (None, None, "")
    assert alone.change == pytest.approx(math.sqrt(3.0 * 3.1) / 2.0 - 1)


def test_a_long_name_keeps_the_columns_in_line() -> None:
    names = ("a", "paged_attention_prefill/llama-8b-chunk, bfloat16, µs")
    lines = difference_lines([of_repeats(name, [1.0, 2.0], [2.0, 3.0]) for name in names], "so it is")
    assert lines[-1] == "so it is"
    assert len({line.index("%") for line in lines[1:-1]}) == 1
