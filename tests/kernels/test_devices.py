"""This module holds where the torch backend makes its tensors: beside its arguments. It does not know what ops compute.

A GPU is not needed: what is made without a word about its device comes to lie on the default one, here "meta", where
nothing can be computed together with an argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import octavo.kernels
import pytest
import torch
from octavo.kernels.dispatch import use_backend
from octavo.kernels.spec import Case, OpSpec, load_specs

from .attention_checks import call
from .paged import Shape, gaussian
from .planned import DECODE, PREFILL, plans
from .seeds import case_inputs

SMALL = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in load_specs().values()
    for case in spec.cases
    if case.tier == "test"
]


@pytest.fixture(autouse=True)
def _torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


def tensors(result: Any) -> list[torch.Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [each for each in results if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_an_op_stays_with_its_arguments(spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case, 0)
    function: Any = getattr(octavo.kernels, spec.name)
    with torch.device("meta"):
        found = function(**inputs)
    assert all(each.device.type == "cpu" for each in tensors(found))


SHAPES = [
    (PREFILL, Shape(((1, 1), (17, 17), (0, 9), (3, 65)))),
    (PREFILL, Shape(((300, 320), (2, 20)), window=9)),
    (DECODE, Shape(((1, 33), (1, 16), (0, 9), (1, 1)))),
    (DECODE, Shape(((3, 40), (1, 600)), num_kv_heads=1, group_size=3, window=7)),
]


@pytest.mark.parametrize(("op", "shape"), SHAPES, ids=lambda v: v.name if isinstance(v, Shape) else v[16:])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_planned_walk_stays_with_its_arguments(op: str, shape: Shape, invariant: bool) -> None:
    inputs = gaussian(shape).lay_out()
    with plans(invariant, repeat=False), torch.device("meta"):
        assert call(op, inputs).isfinite().any()
