"""Each planted bug turns a check red, by that check's own assertion; without a bug every check is green."""

from __future__ import annotations

import pytest

from .mutants import Mutant, healthy, killer, mutants

# The smallest set with one bug for each kind of check.
SMALL = {
    "attention: floor_blocks",
    "attention: future_token",
    "attention: window_plus_one",
    "attention: max_starts_at_zero",
    "attention: scale_2_percent",
    "attention: merge_ignores_lse",
    "attention: values_masked_by_product",
    "write_kv: position_plus_one",
    "write_kv: slot_minus_one",
    "rms_norm: padded_row",
}
ALL = mutants()


def _param(mutant: Mutant) -> object:
    return pytest.param(mutant, id=mutant.name, marks=[] if mutant.name in SMALL else [pytest.mark.full])


def test_the_small_set_exists() -> None:
    assert {mutant.name for mutant in ALL} >= SMALL
    assert len({mutant.name for mutant in ALL}) == len(ALL)


@pytest.mark.parametrize("mutant", [_param(mutant) for mutant in ALL])
def test_a_planted_bug_is_caught(mutant: Mutant) -> None:
    assert killer(mutant) is not None, f"nothing catches: {mutant.meaning}"


@pytest.mark.parametrize("mutant", healthy(), ids=lambda mutant: mutant.name)
def test_no_false_alarm(mutant: Mutant) -> None:
    assert killer(mutant) is None
