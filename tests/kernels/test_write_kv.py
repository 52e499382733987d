"""`write_kv` and `copy_blocks`: what is written, where, and that nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from octavo.kernels.dispatch import available_backends
from octavo.kernels.kv_cache.reference import quantise_e4m3, quantise_int8
from octavo.kernels.spec import Case, generator

from . import calls
from . import kv_cache_checks as checks
from .attention_checks import same_bits
from .seeds import case_inputs

OPS = ("write_kv", "plan_write_kv", "copy_blocks")
EXACT = [name.removeprefix("exact: ") for name, _ in checks.CHECKS if name.startswith("exact")]


@pytest.mark.parametrize("case", checks.CASES, ids=lambda case: case.name)
def test_rounding(backend: str, case: Case, seeds: range) -> None:
    for seed in seeds:
        checks.writes_what_it_should(case, seed)


@pytest.mark.parametrize("check", [check for name, check in checks.CHECKS if name.startswith("exact")], ids=EXACT)
def test_exact(backend: str, check: Callable[[], None]) -> None:
    check()


def test_a_plan_changes_nothing(backend: str) -> None:
    spec, case = checks.SPECS["write_kv"], next(case for case in checks.CASES if case.name == "partial-16")
    plain, planned = (case_inputs(spec, case, 0) for _ in range(2))
    calls.write_kv(**plain)
    names = ("slot_mapping", "positions", "cos_sin", "rope_style")
    plan = calls.plan_write_kv(
        **{name: planned[name] for name in names}, block_size=16, num_kv_heads=2, dtype=torch.float32
    )
    calls.write_kv(**planned, plan=plan)
    for name in ("q", "k_cache", "v_cache"):
        assert same_bits(planned[name], plain[name])


def test_an_e4m3_scale_may_be_a_number_or_a_tensor(backend: str) -> None:
    x = torch.randn(2, 1, 64, generator=generator("scale"))
    caches = [torch.zeros(1, 1, 16, 64, dtype=torch.float8_e4m3fn) for _ in range(4)]
    slots, positions = torch.tensor([3, 9]), torch.tensor([0, 1])
    calls.write_kv(x.clone(), x, x, *caches[:2], slots, positions=positions, k_scale=0.03, v_scale=torch.tensor(0.07))
    calls.write_kv(x.clone(), x, x, *caches[2:], slots, positions=positions, k_scale=torch.tensor([0.03]), v_scale=0.07)
    assert same_bits(caches[0], caches[2])
    assert same_bits(caches[1], caches[3])
    assert not same_bits(caches[0], caches[1])


@pytest.mark.parametrize("backend", [b for b in available_backends(*OPS) if b == "triton"], indirect=True)
def test_what_kernels_cannot_compute_is_refused(backend: str) -> None:
    x, cache, slots = torch.ones(1, 1, 64), torch.zeros(2, 1, 16, 64), torch.tensor([17])
    wide, far = cache.double(), torch.ones(1, 1, 64, 2)[..., 0]
    with pytest.raises(ValueError, match=r"q has dtype torch.float64; the triton backend takes float32"):
        calls.write_kv(x.double(), x.double(), x.double(), cache, cache.clone(), slots, positions=slots)
    with pytest.raises(ValueError, match=r"k_cache has dtype torch.float64; the triton backend takes no float64"):
        calls.write_kv(x, x, x, wide, wide.clone(), slots, positions=slots)
    with pytest.raises(ValueError, match=r"v has strides \(128, 128, 2\); the last one must be 1"):
        calls.write_kv(x, x, far, cache, cache.clone(), slots, positions=slots)
    with pytest.raises(ValueError, match=r"k_cache has strides .*; a block must be contiguous"):
        calls.copy_blocks(cache.transpose(2, 3), cache.transpose(2, 3), slots, slots)


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


def test_copies_every_bit(backend: str) -> None:
    checks.copies_every_bit()


def test_copies_beyond_31_bits(backend: str) -> None:
    checks.copies_beyond_31_bits()


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
