"""This module holds how every "auto" becomes a value. It does not know torch, files or requests.

It is a pure function of the settings, the model and the machine; each decision it makes is listed with its reason, for
the start-up lines and for `octavo plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.kernels.dispatch import TRITON_BLOCK_SIZES

from .config import BackendName, DTypeName, EngineConfig, ModelConfig
from .errors import CapacityError, ConfigError

__all__ = ["DTYPE_BYTES", "Choice", "Hardware", "ResolvedConfig", "resolve"]

DTYPE_BYTES: dict[DTypeName, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
CPU_CACHE_FRACTION = 0.25
"""Part of the memory left on a CPU that the KV pool may take: the machine has other work."""
CPU_BATCHED_TOKENS = 512
GPU_BATCHED_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine, as far as settings depend on it."""

    device: Literal["cpu", "cuda"]
    name: str
    available_bytes: int
    """Memory that can still be taken: the machine's on a CPU, the device's on a GPU."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision: a setting, the value it got and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """Every setting as a value."""

    device: Literal["cpu", "cuda"]
    dtype: DTypeName
    backend: BackendName
    invariant: bool
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    weight_layout: Literal["transposed", "packed"]
    """How projections are stored; see `layers/linear.py`."""
    weight_bytes: int
    kv_bytes_per_token: int
    choices: tuple[Choice, ...]

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the whole KV pool, without the null block."""
        return self.num_blocks * self.block_size * self.kv_bytes_per_token


def resolve(config: EngineConfig, model: ModelConfig, hardware: Hardware, *, num_parameters: int) -> ResolvedConfig:
    """Turn every "auto" into a value.

    Args:
        config: the user's settings.
        model: the model's shape.
        hardware: the machine.
        num_parameters: elements of all weights.

    Raises:
        ConfigError: settings contradict each other or the model.
        CapacityError: weights or the smallest KV pool do not fit.
    """
    choices: list[Choice] = []
    dtype = _dtype(config, model, hardware, choices)
    if config.invariant and dtype != "float32":
        raise ConfigError(f"invariant is set and dtype is {dtype}; allowed: float32, the only one it is proved for")
    backend = _backend(config, hardware, choices)
    weight_bytes = num_parameters * DTYPE_BYTES[dtype]
    bytes_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * DTYPE_BYTES[dtype]

    max_num_batched_tokens = config.scheduler.max_num_batched_tokens
    if max_num_batched_tokens is None:
        max_num_batched_tokens = CPU_BATCHED_TOKENS if hardware.device == "cpu" else GPU_BATCHED_TOKENS
        choices.append(
            Choice("max_num_batched_tokens", f"{max_num_batched_tokens:,}", f"default on a {hardware.device.upper()}")
        )
    max_num_seqs = config.scheduler.max_num_seqs
    if max_num_seqs > max_num_batched_tokens:
        max_num_seqs = max_num_batched_tokens
        choices.append(
            Choice("max_num_seqs", f"{max_num_seqs:,}", "lowered to the budget: a token for each in every step")
        )

    if hardware.device == "cpu" and max_num_seqs == 1:
        choices.append(Choice("weight layout", "transposed", "the fastest for one sequence at a time"))

    max_model_len = config.scheduler.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise ConfigError(f"max_model_len is {max_model_len}; allowed: at most the model's {model.max_position}")
    block_size = config.cache.block_size
    num_blocks = _num_blocks(config, hardware, weight_bytes, bytes_per_token, max_num_seqs, max_model_len, choices)
    if num_blocks * block_size < max_model_len:
        if config.scheduler.max_model_len is not None:
            raise ConfigError(
                f"max_model_len is {max_model_len}; allowed: at most the KV pool's {num_blocks * block_size}"
            )
        max_model_len = num_blocks * block_size
        choices.append(
            Choice("max_model_len", f"{max_model_len:,}", f"lowered from {model.max_position:,}: the KV pool")
        )
    if max_model_len < 2:
        raise ConfigError(f"max_model_len is {max_model_len}; allowed: at least 2, a token to read and one to generate")
    return ResolvedConfig(
        device=hardware.device,
        dtype=dtype,
        backend=backend,
        invariant=config.invariant,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        weight_layout="packed" if max_num_seqs > 1 else "transposed",
        weight_bytes=weight_bytes,
        kv_bytes_per_token=bytes_per_token,
        choices=tuple(choices),
    )


def _backend(config: EngineConfig, hardware: Hardware, choices: list[Choice]) -> BackendName:
    backend = config.backend
    if backend == "auto":
        backend, reason = ("triton", "the GPU's") if hardware.device == "cuda" else ("torch", "the CPU's")
        choices.append(Choice("backend", backend, reason))
    if backend == "triton" and config.cache.block_size not in TRITON_BLOCK_SIZES:
        allowed = ", ".join(map(str, TRITON_BLOCK_SIZES))
        raise ConfigError(
            f"block_size is {config.cache.block_size}; allowed: {allowed}, for which the Triton kernels are made"
        )
    return backend


def _dtype(config: EngineConfig, model: ModelConfig, hardware: Hardware, choices: list[Choice]) -> DTypeName:
    if config.dtype != "auto":
        return config.dtype
    if hardware.device == "cpu":
        choices.append(Choice("dtype", "float32", "the fastest on most CPUs"))
        return "float32"
    choices.append(Choice("dtype", model.dtype, "the checkpoint's own"))
    return model.dtype


def _num_blocks(
    config: EngineConfig,
    hardware: Hardware,
    weight_bytes: int,
    bytes_per_token: int,
    max_num_seqs: int,
    max_model_len: int,
    choices: list[Choice],
) -> int:
    cache = config.cache
    left = hardware.available_bytes - weight_bytes
    if left <= 0:
        raise CapacityError(
            f"the weights take {_gib(weight_bytes)} and {hardware.name} has {_gib(hardware.available_bytes)} left; "
            "try --dtype bfloat16, or a smaller model"
        )
    if cache.kv_cache_tokens is not None:
        num_blocks = cache.kv_cache_tokens // cache.block_size
        wanted = num_blocks * cache.block_size * bytes_per_token
        if wanted > left:
            raise CapacityError(
                f"a KV pool of {cache.kv_cache_tokens:,} tokens takes {_gib(wanted)} and {hardware.name} has "
                f"{_gib(left)} left beside the weights; try --kv-cache-tokens {left // bytes_per_token // 2}"
            )
        return num_blocks
    share = CPU_CACHE_FRACTION if hardware.device == "cpu" else cache.gpu_memory_utilization
    blocks_per_seq = -(-max_model_len // cache.block_size)
    affordable = int(left * share) // (bytes_per_token * cache.block_size)
    if affordable < 1:
        raise CapacityError(
            f"one block of {cache.block_size} tokens takes {_gib(bytes_per_token * cache.block_size)} and "
            f"{hardware.name} has {_gib(int(left * share))} for the KV pool; try --block-size 16, or a smaller model"
        )
    num_blocks = min(affordable, max_num_seqs * blocks_per_seq)
    tokens = num_blocks * cache.block_size
    why = "room for every sequence at full length" if num_blocks < affordable else f"{share:.0%} of the memory left"
    choices.append(Choice("kv_cache_tokens", f"{tokens:,}", f"{_gib(tokens * bytes_per_token)}, {why}"))
    return num_blocks


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
