"""This module holds what an op is, as data: its shapes, test cases, bounds and cost. It does not know any one op.

One `OpSpec` per op lives in its family's `spec.py`. Tests, benchmarks, ahead-of-time compilation and profiles are all
driven by it, so that a new op or a new case is written down once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

__all__ = ["Axis", "Case", "OpSpec", "TensorSpec", "generator", "load_specs"]

Inputs = dict[str, Any]
"""Argument name -> value: an op is called as `op(**inputs)`."""

FAMILIES: Final = ("activation", "attention", "batch", "kv_cache", "norm", "sampling")


@dataclass(frozen=True, slots=True)
class Axis:
    """One named axis: "const" is fixed by the model (a compile-time constant), "var" changes from step to step."""

    kind: Literal["const", "var"]
    meaning: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor argument or result.

    `shape` names axes of the op, or sizes derived from them ("num_seqs + 1"); `dtype` is a torch dtype's name, or
    "float" for the dtype of the case, "cache" for the cache's. A "float32" result is float64 in a float64 case.
    """

    shape: tuple[str, ...]
    dtype: str
    meaning: str
    optional: bool = False
    written: bool = False
    """An input that the op changes in place."""


@dataclass(frozen=True, slots=True)
class Case:
    """One point at which an op is tested or timed: a value for every axis, and options.

    `tier` says where it runs: "test" everywhere, "all" in the full test run, "bench" in benchmarks and compilation
    only (a real model's shape).
    """

    name: str
    values: Mapping[str, Any]
    dtype: str = "float32"
    tier: Literal["test", "all", "bench"] = "test"

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return an option's value, or `default` where the case does not set it."""
        return self.values.get(key, default)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the case's activations."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def itemsize(self) -> int:
        """Bytes per element of the case's activations."""
        return self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op.

    Args:
        name: the public name in `octavo.kernels`.
        axes: every axis that `inputs` and `outputs` name.
        make_inputs: draws the arguments of one case, on the CPU, from the generator alone.
        cases: where to test and time it.
        bounds: the row of `bounds.BOUNDS` it is held to.
        bytes: the least number of bytes one call moves between memory and chip (no cache, nothing twice).
        flops: the floating-point operations one call cannot do without (a multiply-add is two).
    """

    name: str
    axes: Mapping[str, Axis]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    make_inputs: Callable[[Case, torch.Generator], Inputs]
    cases: tuple[Case, ...]
    bounds: str
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    options: Mapping[str, str] = field(default_factory=dict)
    """Arguments that are no tensors: name -> meaning."""

    def case(self, name: str) -> Case:
        """Return the case of that name."""
        return next(case for case in self.cases if case.name == name)


def generator(*seed: int | str) -> torch.Generator:
    """Return a CPU generator whose stream depends on `seed` alone, on every machine."""
    text = "/".join(str(part) for part in seed)
    number = 0
    for byte in text.encode():
        number = (number * 1_000_003 + byte) % (1 << 63)
    return torch.Generator().manual_seed(number)


def load_specs() -> dict[str, OpSpec]:
    """Return every op's spec by its name."""
    specs: dict[str, OpSpec] = {}
    for family in FAMILIES:
        module = importlib.import_module(f".{family}.spec", __package__)
        specs.update({spec.name: spec for spec in module.SPECS})
    return specs
