"""Each planted bug turns at least one check red, by an assertion."""

from __future__ import annotations

import pytest
from octavo.kernels.dispatch import override
from octavo.kernels.sampling import reference

from .checks import CHECKS
from .mutants import SAMPLE_MUTANTS, Mutant, planted


def killers(mutant: Mutant, seed: int = 0) -> list[str]:
    """Return the checks that fail by an assertion while the bug is planted."""
    found = []
    with override("sample", planted(reference, mutant).sample):
        for check in CHECKS:
            try:
                check(seed)
            except AssertionError:
                found.append(check.__name__)
            except (IndexError, RuntimeError):
                continue  # a crash is no proof that the checks see a wrong token
    return found


@pytest.mark.parametrize("mutant", SAMPLE_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found(mutant: Mutant) -> None:
    assert killers(mutant)


def test_no_false_alarm() -> None:
    assert not killers(Mutant("nothing", "SMALL_TOP_K: Final = 256", "SMALL_TOP_K: Final = 255"))
