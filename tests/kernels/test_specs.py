"""The specs say what the ops are: their arguments, shapes, dtypes and costs, checked against real calls."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

import octavo.kernels
import pytest
import torch
from octavo.kernels.bounds import BOUNDS, UNIT
from octavo.kernels.spec import Case, OpSpec, TensorSpec, generator, load_specs

from .attention_checks import same_bits
from .seeds import case_inputs

SPECS = load_specs()
SMALL = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in SPECS.values()
    for case in spec.cases
    if case.tier == "test"
]


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_a_spec_names_what_exists(spec: OpSpec) -> None:
    parameters = inspect.signature(getattr(octavo.kernels, spec.name)).parameters
    planned = {"out", "return_lse", "worklist", "plan"}
    assert set(spec.inputs) | set(spec.options) == set(parameters) - planned
    for tensor in (*spec.inputs.values(), *spec.outputs.values()):
        for axis in tensor.shape:
            assert set(re.findall(r"[a-z_]+", axis)) <= set(spec.axes), axis
    assert spec.bounds in BOUNDS
    assert len({case.name for case in spec.cases}) == len(spec.cases)
    for name, tensor in spec.inputs.items():
        required = parameters[name].default is inspect.Parameter.empty
        assert required or tensor.optional, f"{name} has a default, so its spec must say optional"


def _check_tensor(name: str, x: torch.Tensor, tensor: TensorSpec, sizes: dict[str, int], case: Case) -> None:
    if x.dim() == 0:
        return  # one number in the place of a tensor of scales
    assert x.dim() == len(tensor.shape), name
    for axis, size in zip(tensor.shape, x.shape, strict=True):
        if axis in sizes or axis.isidentifier():
            assert sizes.setdefault(axis, size) == size, f"{name}: {axis} is {size}, elsewhere {sizes[axis]}"
        else:
            assert eval(axis, {}, sizes) == size, f"{name}: {axis}"
    if tensor.dtype == "float":
        assert x.dtype == case.torch_dtype, name
    elif tensor.dtype != "cache":
        assert x.dtype == getattr(torch, tensor.dtype), name


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_inputs_and_outputs_have_the_shapes_they_claim(spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case, 0)
    # Derived sizes ("2 * intermediate_size") need their axis known first.
    sizes: dict[str, int] = {axis: case[axis] for axis in spec.axes if isinstance(case.get(axis), int)}
    if "seqs" in case.values:
        sizes["num_seqs"] = len(case["seqs"])
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    for name, tensor in spec.inputs.items():
        if inputs.get(name) is None:
            assert tensor.optional, f"{name} is missing"
        else:
            _check_tensor(name, inputs[name], tensor, sizes, case)
    function: Any = getattr(octavo.kernels, spec.name)
    wants_lse = "lse" in spec.outputs
    result = function(**inputs, return_lse=True) if wants_lse else function(**inputs)
    results = result if isinstance(result, tuple) else (result,) * len(spec.outputs)
    for (name, tensor), x in zip(spec.outputs.items(), results, strict=True):
        if tensor.dtype == "float32" and case.dtype == "float64":
            tensor = replace(tensor, dtype="float64")
        _check_tensor(name, x, tensor, sizes, case)
    for name, old in before.items():
        same = same_bits(old, inputs[name])
        assert same or spec.inputs[name].written, f"{name} was changed and its spec does not say so"


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_costs_are_positive_and_repeat(spec: OpSpec) -> None:
    for case in spec.cases:
        assert spec.bytes(case) >= 0
        assert spec.flops(case) >= 0
    case = next(case for case in spec.cases if case.tier == "test")
    first, second = case_inputs(spec, case, 3), case_inputs(spec, case, 3)
    for name, x in first.items():
        if isinstance(x, torch.Tensor):
            assert same_bits(x, second[name])


def test_attention_costs_by_hand() -> None:
    decode = SPECS["paged_attention_decode"]
    shape = {"num_kv_heads": 2, "group_size": 4, "head_dim": 8, "block_size": 16}
    case = Case("hand", {"seqs": ((1, 3),), **shape}, "bfloat16")
    assert decode.bytes(case) == 2 * (8 * 8) * 2 + 2 * 3 * 2 * 8 * 2  # q and out, then K and V
    assert decode.flops(case) == 4 * 3 * 8 * 8
    prefill = SPECS["paged_attention_prefill"]
    chunk = Case("hand", {**case.values, "seqs": ((2, 4), (0, 9)), "window": 2})
    assert prefill.flops(chunk) == 4 * (2 + 2) * 8 * 8
    assert prefill.bytes(chunk) == (2 * 2 * 8 * 8 + 2 * 3 * 2 * 8) * 4


def test_generators_depend_on_every_part() -> None:
    first = torch.rand(3, generator=generator("op", "case", 0))
    assert torch.equal(first, torch.rand(3, generator=generator("op", "case", 0)))
    for other in (("op", "case", 1), ("op", "other", 0), ("po", "case", 0)):
        assert not torch.equal(first, torch.rand(3, generator=generator(*other)))


def test_units() -> None:
    for dtype, unit in UNIT.items():
        assert unit == torch.finfo(getattr(torch, dtype)).eps / 2
