"""`write_kv` and `copy_blocks`: what is written, where, and that nothing else is."""

from __future__ import annotations

import pytest
import torch
from octavo.kernels.kv_cache.reference import quantise_e4m3, quantise_int8
from octavo.kernels.spec import Case

from . import calls
from . import kv_cache_checks as checks
from .attention_checks import same_bits
from .seeds import case_inputs

OPS = ("write_kv", "plan_write_kv", "copy_blocks")


@pytest.mark.parametrize("case", checks.CASES, ids=lambda case: case.name)
def test_rounding(backend: str, case: Case, seeds: range) -> None:
    for seed in seeds:
        checks.writes_what_it_should(case, seed)


@pytest.mark.parametrize("style", ["neox", "interleaved"])
def test_rotation(backend: str, style: str) -> None:
    checks.rotation_is_exact_at_zero(style)


def test_padding(backend: str) -> None:
    checks.padding_writes_nothing()


def test_every_slot(backend: str) -> None:
    checks.every_slot_is_reached()


def test_rows_do_not_depend_on_each_other(backend: str) -> None:
    spec = checks.SPECS["write_kv"]
    whole, alone = (case_inputs(spec, spec.case("norm"), 0) for _ in range(2))
    calls.write_kv(**whole)
    for name in ("q", "k", "v", "slot_mapping", "positions"):
        alone[name] = alone[name][4:5]
    calls.write_kv(**alone)
    assert same_bits(alone["q"], whole["q"][4:5])


@pytest.mark.parametrize("case", checks.COPY_CASES, ids=lambda case: case.name)
def test_copy_blocks(backend: str, case: Case, seeds: range) -> None:
    for seed in seeds:
        checks.copies_blocks(case, seed)


def test_copy_blocks_reads_before_it_writes(backend: str) -> None:
    k_cache = torch.arange(3.0).view(3, 1, 1, 1).clone()
    v_cache = -k_cache
    calls.copy_blocks(k_cache, v_cache, torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert k_cache.flatten().tolist() == [0, 0, 1]
    assert v_cache.flatten().tolist() == [0, 0, -1]


def test_quantise_int8() -> None:
    values, scale = quantise_int8(torch.tensor([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0]]))
    assert values.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0]


def test_quantise_e4m3() -> None:
    stored = quantise_e4m3(torch.tensor([1.0, -1000.0, 1e9, 0.5 * 2**-10]), 0.5).float()
    assert stored.tolist() == [2.0, -448.0, 448.0, 0.0]
