"""This module holds how every "auto" becomes a value. It does not know torch, files or requests.

It is a pure function of the settings, the model and the machine; each decision it makes is listed with its reason, for
the start-up lines and for `octavo plan`. The bytes it reckons with are those of `footprint.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from octavo.kernels.dispatch import TRITON_BLOCK_SIZES

from .config import BackendName, DTypeName, EngineConfig, ModelConfig
from .errors import CapacityError, ConfigError
from .footprint import (
    DTYPE_BYTES,
    CacheDTypeName,
    copies_tied_head,
    graph_bytes,
    kv_bytes_per_token,
    num_weights,
    split_bytes,
    step_memory,
    table_bytes,
)

__all__ = ["Choice", "Hardware", "ResolvedConfig", "changed", "flags", "gib", "resolve", "ways_to_fit"]

CPU_CACHE_FRACTION = 0.25
"""Part of the memory left on a CPU that the KV pool may take: the machine has other work."""
CPU_BATCHED_TOKENS = 512
GPU_BATCHED_TOKENS = 2048
HIGH_UTILIZATION = 0.97
"""The most of a GPU's memory that is recommended, where less is not enough."""


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
    kv_cache_dtype: CacheDTypeName
    backend: BackendName
    invariant: bool
    graphs: bool
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    overlap: bool
    weight_layout: Literal["transposed", "packed"]
    """How projections are stored; see `layers/linear.py`."""
    weight_bytes: int
    """Of all weights, and of a tied head's copy where there is one."""
    kv_bytes_per_token: int
    graph_bytes: int
    """Kept for captured graphs."""
    step_bytes: int
    """Most that one step's tensors take, but for what grows with the pool."""
    activation_bytes: int
    """Of a step with all that grows with the pool, and of the table of rotations, as the kernels run it; see
    `footprint.py`. The torch backend gathers keys and values besides."""
    choices: tuple[Choice, ...]

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the whole KV pool, the null block included."""
        return (self.num_blocks + 1) * self.block_size * self.kv_bytes_per_token


def resolve(config: EngineConfig, model: ModelConfig, hardware: Hardware) -> ResolvedConfig:
    """Turn every "auto" into a value.

    Args:
        config: the user's settings.
        model: the model's shape.
        hardware: the machine.

    Raises:
        ConfigError: settings contradict each other or the model.
        CapacityError: weights, a step's tensors or the smallest KV pool do not fit; says what would.
    """
    try:
        return _resolve(config, model, hardware)
    except CapacityError as error:
        ways = [flags(way) for way in ways_to_fit(config, model, hardware)]
        more = " or ".join(ways) or "a smaller model, or a machine with more memory"
        raise CapacityError(f"{error}; try {more}") from None


def flags(settings: Mapping[str, Any]) -> str:
    """Return settings as they are written on a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def ways_to_fit(config: EngineConfig, model: ModelConfig, hardware: Hardware) -> list[dict[str, Any]]:
    """Return at most three changes of settings, each of which makes what does not fit fit, the mildest first."""
    ways: list[dict[str, Any]] = []
    for way in _changes(config, model):
        try:
            resolved = _resolve(changed(config, way), model, hardware)
        except (CapacityError, ConfigError):
            continue
        found = {name: getattr(resolved, name, value) if value is None else value for name, value in way.items()}
        if "kv_cache_tokens" in found:
            found["kv_cache_tokens"] = resolved.num_blocks * resolved.block_size
        if not any(one.items() <= found.items() for one in ways):  # nothing beyond what is enough
            ways.append(found)
    return ways[:3]


def _changes(config: EngineConfig, model: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yield what may help; a None becomes what the engine would choose."""
    smaller: list[dict[str, Any]] = []
    for part, name in ((config.cache, "kv_cache_tokens"), (config.scheduler, "max_model_len")):
        if getattr(part, name) is not None:
            smaller.append({name: None})
    if len(smaller) == 2:
        smaller.append(smaller[0] | smaller[1])
    narrow = [] if config.invariant or config.cache.kv_cache_dtype != "auto" else [{"kv_cache_dtype": "fp8"}]
    if config.cache.gpu_memory_utilization < HIGH_UTILIZATION:
        more = {"gpu_memory_utilization": HIGH_UTILIZATION}
        smaller = [more, *smaller, *narrow, *(more | way for way in smaller)]
    else:
        smaller += narrow
    if (
        num_seqs := min(config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens or CPU_BATCHED_TOKENS)
    ) > 1:
        smaller.append({"max_num_seqs": num_seqs // 2})
    smaller.append({"max_num_batched_tokens": CPU_BATCHED_TOKENS})
    smaller.append({"max_num_batched_tokens": CPU_BATCHED_TOKENS, "max_num_seqs": 16})
    smaller.append({"block_size": 16})
    yield from smaller
    half = "float16" if model.dtype == "float16" else "bfloat16"
    if not config.invariant and config.dtype not in ("float16", "bfloat16"):
        yield {"dtype": half}
        yield from ({"dtype": half} | way for way in smaller)


def changed(config: EngineConfig, settings: Mapping[str, Any]) -> EngineConfig:
    """Return a configuration with some settings, by their flat names, changed."""
    cache = {name: value for name, value in settings.items() if hasattr(config.cache, name)}
    scheduler = {name: value for name, value in settings.items() if hasattr(config.scheduler, name)}
    own = {name: value for name, value in settings.items() if name not in cache and name not in scheduler}
    return replace(
        config, cache=replace(config.cache, **cache), scheduler=replace(config.scheduler, **scheduler), **own
    )


def _resolve(config: EngineConfig, model: ModelConfig, hardware: Hardware) -> ResolvedConfig:
    choices: list[Choice] = []
    dtype = _dtype(config, model, hardware, choices)
    kv_dtype: CacheDTypeName = dtype if config.cache.kv_cache_dtype == "auto" else config.cache.kv_cache_dtype
    if config.invariant and dtype != "float32":
        raise ConfigError(f"invariant is set and dtype is {dtype}; allowed: float32, the only one it is proved for")
    if config.invariant and kv_dtype != dtype:
        raise ConfigError(
            f"invariant is set and kv_cache_dtype is {kv_dtype}; allowed: auto, all that it is proved for"
        )
    backend = _backend(config, hardware, choices)
    max_num_batched_tokens, max_num_seqs = _step_limits(config, hardware, choices)
    layout: Literal["packed", "transposed"] = "packed" if max_num_seqs > 1 else "transposed"
    if hardware.device == "cpu" and max_num_seqs == 1:
        choices.append(Choice("weight layout", "transposed", "the fastest for one sequence at a time"))

    max_model_len = config.scheduler.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise ConfigError(f"max_model_len is {max_model_len}; allowed: at most the model's {model.max_position}")
    block_size = config.cache.block_size
    needs = _needs(
        model,
        dtype,
        kv_dtype,
        has_splits=backend == "triton",
        block_size=block_size,
        num_tokens=max_num_batched_tokens,
        num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )
    if (hardware.device, dtype, layout) == ("cpu", "float32", "packed") and copies_tied_head(model):
        needs = replace(needs, weights=needs.weights + model.vocab_size * model.hidden_size * DTYPE_BYTES[dtype])
    overlap = hardware.device == "cuda" if config.scheduler.overlap is None else config.scheduler.overlap
    if (graphs := _graphs(config, hardware, backend)) and hardware.device == "cuda":
        needs = replace(needs, graphs=graph_bytes(model, dtype, num_seqs=max_num_seqs))
    for name, given, now in (("overlap", config.scheduler.overlap, overlap), ("graphs", config.graphs, graphs)):
        if given is None and hardware.device == "cuda":
            choices.append(Choice(name, str(now).lower(), "default on a GPU"))
    num_blocks = _num_blocks(config, hardware, needs, max_num_seqs, max_model_len, choices)
    if num_blocks * block_size < max_model_len:
        if config.scheduler.max_model_len is not None:
            if config.cache.kv_cache_tokens is None:
                raise CapacityError(
                    f"a sequence of {max_model_len:,} tokens takes {gib(max_model_len * needs.kv_token)} of keys and "
                    f"values and {hardware.name} has room for {num_blocks * block_size:,} tokens"
                )
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
        kv_cache_dtype=kv_dtype,
        backend=backend,
        invariant=config.invariant,
        graphs=graphs,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        overlap=overlap,
        weight_layout=layout,
        weight_bytes=needs.weights,
        kv_bytes_per_token=needs.kv_token,
        graph_bytes=needs.graphs,
        step_bytes=needs.step,
        activation_bytes=needs.step + table_bytes(model, max_model_len) + num_blocks * needs.split_block,
        choices=tuple(choices),
    )


def _step_limits(config: EngineConfig, hardware: Hardware, choices: list[Choice]) -> tuple[int, int]:
    """Return the tokens and the sequences of one step."""
    max_num_batched_tokens = config.scheduler.max_num_batched_tokens
    if max_num_batched_tokens is None:
        max_num_batched_tokens = CPU_BATCHED_TOKENS if hardware.device == "cpu" else GPU_BATCHED_TOKENS
        where = "default on a CPU" if hardware.device == "cpu" else "default on a GPU"
        choices.append(Choice("max_num_batched_tokens", f"{max_num_batched_tokens:,}", where))
    max_num_seqs = config.scheduler.max_num_seqs
    if max_num_seqs > max_num_batched_tokens:
        max_num_seqs = max_num_batched_tokens
        choices.append(
            Choice("max_num_seqs", f"{max_num_seqs:,}", "lowered to the budget: a token for each in every step")
        )
    return max_num_batched_tokens, max_num_seqs


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


def _graphs(config: EngineConfig, hardware: Hardware, backend: BackendName) -> bool:
    can_be = hardware.device == "cpu" or backend == "triton"
    if config.graphs and not can_be:
        raise ConfigError("graphs is true and backend is torch on a GPU; allowed: false: its ops wait for the GPU")
    return hardware.device == "cuda" and can_be if config.graphs is None else config.graphs


def _dtype(config: EngineConfig, model: ModelConfig, hardware: Hardware, choices: list[Choice]) -> DTypeName:
    if config.dtype != "auto":
        return config.dtype
    if hardware.device == "cpu":
        choices.append(Choice("dtype", "float32", "the fastest on most CPUs"))
        return "float32"
    choices.append(Choice("dtype", model.dtype, "the checkpoint's own"))
    return model.dtype


@dataclass(frozen=True, slots=True)
class _Needs:
    """Bytes."""

    weights: int
    step: int
    """Of a step's tensors, but for what grows with the pool."""
    table: int
    """Of rotations, as long as the longest sequence that is asked for."""
    kv_token: int
    split_block: int
    """What decode attention may hold for each block; see `split_bytes`."""
    block_size: int
    graphs: int = 0

    @property
    def block(self) -> int:
        """Of one block's keys and values."""
        return self.block_size * self.kv_token

    def pool(self, num_blocks: int) -> int:
        """Return the bytes of so many blocks and the null block."""
        return (num_blocks + 1) * self.block + num_blocks * self.split_block


def _needs(
    model: ModelConfig,
    dtype: DTypeName,
    kv_dtype: CacheDTypeName,
    *,
    has_splits: bool,
    block_size: int,
    num_tokens: int,
    num_seqs: int,
    max_model_len: int,
) -> _Needs:
    step = step_memory(model, dtype, num_tokens=num_tokens, num_seqs=num_seqs).peak
    return _Needs(
        weights=num_weights(model) * DTYPE_BYTES[dtype],
        step=step + (split_bytes(model, num_seqs=num_seqs, kv_tokens=0) if has_splits else 0),
        table=table_bytes(model, max_model_len),
        kv_token=kv_bytes_per_token(model, kv_dtype),
        split_block=split_bytes(model, num_seqs=0, kv_tokens=block_size) if has_splits else 0,
        block_size=block_size,
    )


def _num_blocks(
    config: EngineConfig,
    hardware: Hardware,
    needs: _Needs,
    max_num_seqs: int,
    max_model_len: int,
    choices: list[Choice],
) -> int:
    cache, has = config.cache, f"{hardware.name} has {gib(hardware.available_bytes)}"
    left = hardware.available_bytes - needs.weights
    if left <= 0:
        raise CapacityError(f"the weights take {gib(needs.weights)} and {has} left")
    left -= needs.step + needs.table + needs.graphs
    if left <= 0:
        raise CapacityError(
            f"the weights take {gib(needs.weights)}, the tensors of a step {gib(needs.step + needs.table)}"
            f"{f', graphs {gib(needs.graphs)}' if needs.graphs else ''}, and {has}"
        )
    if cache.kv_cache_tokens is not None:
        num_blocks = cache.kv_cache_tokens // cache.block_size
        wanted = needs.pool(num_blocks)
        if wanted > left:
            raise CapacityError(
                f"a KV pool of {cache.kv_cache_tokens:,} tokens takes {gib(wanted)} and {hardware.name} has "
                f"{gib(left)} left beside the weights and a step's tensors"
            )
        return num_blocks
    share = CPU_CACHE_FRACTION if hardware.device == "cpu" else cache.gpu_memory_utilization
    affordable = (int(left * share) - needs.block) // (needs.block + needs.split_block)
    if affordable < 1:
        raise CapacityError(
            f"two blocks of {cache.block_size} tokens, the least there can be, take {gib(needs.pool(1))} and "
            f"{hardware.name} has {gib(int(left * share))} for the KV pool"
        )
    num_blocks = min(affordable, max_num_seqs * -(-max_model_len // cache.block_size))
    tokens = num_blocks * cache.block_size
    why = "room for every sequence at full length" if num_blocks < affordable else f"{share:.0%} of the memory left"
    choices.append(Choice("kv_cache_tokens", f"{tokens:,}", f"{gib((num_blocks + 1) * needs.block)}, {why}"))
    return num_blocks


def gib(num_bytes: int) -> str:
    """Return bytes in words."""
    return f"{num_bytes / 2**30:,.2f} GiB"
