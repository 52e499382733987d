"""This module holds what follows once memory has been measured, or has run out: the size of the KV pool, and what to
change. It does not know torch or who has measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .config import EngineConfig, ModelConfig
from .errors import CapacityError, ConfigError
from .footprint import split_bytes, table_bytes
from .resolve import Hardware, ResolvedConfig, changed, flags, gib, resolve

__all__ = ["Measured", "as_measured", "out_of_memory", "resize", "ways_to_spare"]


class Measured(NamedTuple):
    """Of a GPU that holds the weights and the compiled kernels, and nothing else of the engine."""

    free_bytes: int
    step_bytes: int
    """The most that the largest step has held at once, with all that a runner keeps from step to step."""


def as_measured(model: ModelConfig, hardware: Hardware, resolved: ResolvedConfig, measured: Measured) -> Hardware:
    """Return the hardware with as many bytes more or less as what was measured and what was reckoned with differ by.

    What decode may split further than the measured step did is still reckoned with.
    """
    held = resolved.weight_bytes + table_bytes(model, resolved.max_model_len)
    splits = split_bytes(model, num_seqs=resolved.max_num_seqs, kv_tokens=0) if resolved.backend == "triton" else 0
    available = measured.free_bytes + held + resolved.step_bytes - measured.step_bytes - splits
    return replace(hardware, available_bytes=max(available, 0))


def resize(config: EngineConfig, model: ModelConfig, hardware: Hardware, resolved: ResolvedConfig) -> ResolvedConfig:
    """Size the KV pool by what was measured in place of what was reckoned with.

    The longest sequence can become shorter, but not longer: the table of rotations is there already.

    Args:
        hardware: see `as_measured`.
        resolved: as it was reckoned.

    Raises:
        CapacityError: what is left is too little; says what would fit.
    """
    found = resolve(config, replace(model, max_position=resolved.max_model_len), hardware)
    told = {choice.name for choice in found.choices}
    kept = (choice for choice in resolved.choices if choice.name not in told)
    return replace(found, choices=(*found.choices, *kept))


def ways_to_spare(
    config: EngineConfig, model: ModelConfig, hardware: Hardware, resolved: ResolvedConfig
) -> list[tuple[Mapping[str, Any], int]]:
    """Return changes of settings that make an engine take less, and how many bytes less each is; the mildest first."""
    cache, num_slots = config.cache, resolved.num_blocks * resolved.block_size
    ways: list[dict[str, Any]]
    if cache.kv_cache_tokens is None and num_slots >= resolved.max_num_seqs * resolved.max_model_len:
        ways = [{"max_model_len": resolved.max_model_len // 2}]  # there is room for all at full length
    elif cache.kv_cache_tokens is None:
        ways = [{"gpu_memory_utilization": round(cache.gpu_memory_utilization - 0.1, 2)}]
    else:
        ways = [{"kv_cache_tokens": num_slots // 2}, {"kv_cache_dtype": "fp8"}]
    ways += [{name: getattr(resolved, name) // 2} for name in ("max_num_batched_tokens", "max_num_seqs")]
    found: list[tuple[Mapping[str, Any], int]] = []
    for way in ways:
        # Of its own accord the pool would grow into what a step is spared.
        pool = {"kv_cache_tokens": num_slots} if way.keys() & {"max_num_batched_tokens", "max_num_seqs"} else {}
        try:
            spared = _total(resolved) - _total(resolve(changed(config, pool | way), model, hardware))
        except (CapacityError, ConfigError):
            continue
        if spared > 0:
            found.append((way, spared))
    return found


def out_of_memory(
    error: Exception,
    doing: str,
    config: EngineConfig,
    model: ModelConfig,
    hardware: Hardware,
    resolved: ResolvedConfig,
) -> CapacityError:
    """Return what to say of an allocation that has failed although everything was reckoned to fit.

    Args:
        error: torch's, whose first sentences have the numbers.
        doing: what was being done, in words.
    """
    ways = [f"{flags(way)} ({gib(less)} less)" for way, less in ways_to_spare(config, model, hardware, resolved)]
    found = ". ".join(" ".join(str(error).split()).split(". ")[:3]).rstrip(".")
    return CapacityError(
        f"{hardware.name} has run out of memory ({doing}): {found}; try {' or '.join(ways) or 'a smaller model'}"
    )


def _total(resolved: ResolvedConfig) -> int:
    return resolved.weight_bytes + resolved.graph_bytes + resolved.activation_bytes + resolved.kv_cache_bytes
