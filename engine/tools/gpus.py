"""This module holds what GPUs have: memory, bandwidth and arithmetic. It does not know any model.

All numbers are NVIDIA's data sheets', not measurements: dense rates (data sheets like to print twice that, with
sparsity), with float32 accumulation where a card is slower with it, float32 without the tensor cores. Memory alone is
what the driver reports, which is less than the gigabytes printed on some boxes and more on others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, describe
from ..resolve import Hardware

__all__ = ["CUDA_CONTEXT_BYTES", "GPUS", "Gpu", "find_gpu", "hardware_of"]

MIB = 2**20
CUDA_CONTEXT_BYTES = 512 * MIB
"""Taken off a GPU's memory for the CUDA context and the compiled kernels: an allowance, not a measurement."""
OTHER = "memory=24GiB,bandwidth=1TB/s,flops=160TFLOP/s"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, or a CPU."""

    name: str
    """How it is asked for."""
    title: str
    architecture: str
    """As the compiler has it: "sm_90"; "cpu"."""
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: Mapping[str, float]
    """Dense FLOP/s by dtype: float32, float16 and bfloat16."""
    num_sms: int
    source: str
    """Where the numbers come from, for whoever reads a prediction."""


def _gpu(
    name: str, title: str, arch: int, memory_mib: int, gb_per_s: float, half: float, single: float, num_sms: int
) -> Gpu:
    flops = {"float32": single * 1e12, "float16": half * 1e12, "bfloat16": half * 1e12}
    source = "data sheet"
    return Gpu(name, title, f"sm_{arch}", memory_mib * MIB, gb_per_s * 1e9, flops, num_sms, source)


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", "NVIDIA B200", 100, 183_359, 8000, 2250, 75, 148),
        _gpu("h200", "NVIDIA H200 SXM", 90, 143_771, 4800, 989, 67, 132),
        _gpu("h100", "NVIDIA H100 SXM 80 GB", 90, 81_559, 3350, 989, 67, 132),
        _gpu("h100-pcie", "NVIDIA H100 PCIe 80 GB", 90, 81_559, 2000, 756, 51, 114),
        _gpu("a100", "NVIDIA A100 SXM 80 GB", 80, 81_920, 2039, 312, 19.5, 108),
        _gpu("a100-40gb", "NVIDIA A100 SXM 40 GB", 80, 40_960, 1555, 312, 19.5, 108),
        _gpu("l40s", "NVIDIA L40S", 89, 46_068, 864, 362, 91.6, 142),
        _gpu("l4", "NVIDIA L4", 89, 23_034, 300, 121, 30.3, 58),
        _gpu("a10", "NVIDIA A10", 86, 23_028, 600, 125, 31.2, 72),
        _gpu("a10g", "NVIDIA A10G", 86, 23_028, 600, 70, 35, 80),
        _gpu("5090", "NVIDIA GeForce RTX 5090", 120, 32_607, 1792, 209.5, 104.8, 170),
        _gpu("4090", "NVIDIA GeForce RTX 4090", 89, 24_564, 1008, 165.2, 82.6, 128),
        _gpu("3090", "NVIDIA GeForce RTX 3090", 86, 24_576, 936, 71, 35.6, 82),
    )
}
_TOO_OLD: Mapping[str, str] = {"t4": "sm_75", "v100": "sm_70", "2080ti": "sm_75", "p100": "sm_60", "1080ti": "sm_61"}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "memory": {"GiB": 2**30, "GB": 1e9, "MiB": 2**20},
    "bandwidth": {"TB/s": 1e12, "GB/s": 1e9},
    "flops": {"TFLOP/s": 1e12, "TFLOPS": 1e12, "GFLOP/s": 1e9, "GFLOPS": 1e9},
}


def find_gpu(name: str) -> Gpu:
    """Return a card by its name, by `memory=24GiB,bandwidth=1TB/s,flops=160TFLOP/s`, or by a name and changes to it.

    Changed flops are those of float16 and bfloat16, and of every dtype where nothing else is known.

    Raises:
        ConfigError: there is none such, or the kernels do not run on it; lists the names.
    """
    first, *settings = name.strip().split(",")
    if "=" in first:
        first, settings = "", [first, *settings]
    key = re.sub(r"^(nvidia|geforce|rtx)+", "", re.sub(r"[\s_]+", "", first.lower())).strip("-")
    if key in _TOO_OLD:
        raise ConfigError(
            f"gpu {first} is {_TOO_OLD[key]}; the kernels need sm_80 or newer; allowed: {', '.join(GPUS)}, cpu"
        )
    if key not in GPUS and not (settings and not first):
        raise ConfigError(f"gpu is {describe(name)}; allowed: {', '.join(GPUS)}, cpu, or {OTHER}")
    values = _settings(settings)
    if not first:
        missing = [each for each in _UNITS if each not in values]
        if missing:
            raise ConfigError(f"gpu {name}: {missing[0]} is missing; write it as {OTHER}")
        nothing = Gpu(name, "a GPU described by hand", "unknown", 0, 0.0, {}, 0, "")
        return _changed(nothing, values, "given")
    return _changed(GPUS[key], values, "data sheet, and as given") if values else GPUS[key]


def hardware_of(gpu: Gpu) -> Hardware:
    """Return what an engine would find on a card, or a CPU."""
    if gpu.architecture == "cpu":
        return Hardware("cpu", gpu.title, gpu.memory_bytes)
    return Hardware("cuda", gpu.title, max(gpu.memory_bytes - CUDA_CONTEXT_BYTES, 0))


def _changed(gpu: Gpu, values: Mapping[str, float], source: str) -> Gpu:
    changes: dict[str, Any] = {"source": source}
    if "memory" in values:
        changes["memory_bytes"] = int(values["memory"])
    if "bandwidth" in values:
        changes["bandwidth_bytes_per_s"] = values["bandwidth"]
    if "flops" in values:
        single = {"float32": gpu.flops["float32"]} if gpu.flops else {}
        changes["flops"] = dict.fromkeys(("float32", "float16", "bfloat16"), values["flops"]) | single
    return replace(gpu, **changes)


def _settings(words: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in _UNITS:
            raise ConfigError(f"gpu: {describe(name)} is no property of one; allowed: {', '.join(_UNITS)}")
        if name in found:
            raise ConfigError(f"gpu: {name} is given twice")
        units = _UNITS[name]
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\S*)", text.strip())
        scale = {key.lower(): value for key, value in units.items()}.get(match[2].lower()) if match else None
        if match is None or scale is None or not 0 < float(match[1]) < 1e9:
            allowed = f"a number above 0 and below 1e9 of {', '.join(units)}"
            raise ConfigError(f"gpu: {name} is {describe(text)}; allowed: {allowed}")
        found[name] = float(match[1]) * scale
    return found
