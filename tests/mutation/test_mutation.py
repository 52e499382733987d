"""Each planted bug turns a check red, by that check's own assertion; without a bug every check is green."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from octavo.kernels.dispatch import OPS, override, use_backend

from . import kernels
from .mutants import Mutant, healthy, killer, mutants
from .triton import Patch

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
KERNELS = kernels.mutants()
SMALL_KERNELS = {mutant.name for mutant in kernels.a_handful()}


def _param(mutant: Mutant) -> object:
    small = mutant.name in SMALL | SMALL_KERNELS
    return pytest.param(mutant, id=mutant.name, marks=[] if small else [pytest.mark.full])


def test_the_small_set_exists() -> None:
    assert {mutant.name for mutant in ALL} >= SMALL
    assert len({mutant.name for mutant in (*ALL, *KERNELS)}) == len(ALL) + len(KERNELS)


@pytest.mark.parametrize("mutant", [_param(mutant) for mutant in (*ALL, *KERNELS)])
def test_a_planted_bug_is_caught(mutant: Mutant) -> None:
    assert killer(mutant) is not None, f"nothing catches: {mutant.meaning}"


@pytest.mark.parametrize("mutant", healthy(), ids=lambda mutant: mutant.name)
def test_no_false_alarm(mutant: Mutant) -> None:
    assert killer(mutant) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", kernels.healthy(), ids=lambda mutant: mutant.name)
def test_no_false_alarm_of_a_kernel(mutant: Mutant) -> None:
    assert killer(mutant) is None


def test_every_patch_fits_its_source() -> None:
    for patch in (patch for group in kernels.patches().values() for patch in group):
        source = kernels.patched_source(patch)
        assert patch.new in source
        compile(source, patch.module, "exec")
        assert kernels.ops_of(patch.module), f"{patch.name}: no op uses {patch.module}"


def test_an_op_that_crashes_is_not_caught() -> None:
    """Not even by its own assertion."""
    crashes: dict[str, Any] = {}
    exec(compile("def crash(x, *_, **__): assert x is None", "elsewhere.py", "exec"), crashes)
    mutant = replace(next(m for m in healthy() if m.name.startswith("rms_norm")), plant=partial(_crashing, crashes))
    with pytest.raises(AssertionError):
        killer(mutant)


@contextmanager
def _crashing(crashes: dict[str, Any]) -> Iterator[None]:
    with use_backend("torch"), override("rms_norm", crashes["crash"]):
        yield


@pytest.mark.parametrize("mutant", kernels.healthy()[:1], ids=lambda mutant: mutant.name)
def test_a_planted_bug_leaves_nothing_behind(mutant: Mutant) -> None:
    def loaded() -> dict[str, object]:
        return {name: module for name, module in sys.modules.items() if name.endswith("_triton")}

    before, line = loaded(), "from __future__ import annotations\n"
    patch = Patch("broken", "", OPS[mutant.name.partition(": ")[2]]["triton"], line, f"{line}\n1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        killer(replace(mutant, plant=partial(kernels.planted, patch)))
    assert loaded() == before
