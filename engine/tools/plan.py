"""This module holds what a model would take and reach on a card: bytes, blocks, sequences and predicted speeds. It does
not know how a plan is shown.

The bytes are those that an engine of these settings allocates, by the same functions (`resolve.py`, `footprint.py`).
The speeds are predictions: the roofline of a whole step (`roofline.py`), which real kernels do not reach.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config import DTypeName, EngineConfig, ModelConfig
from ..errors import CapacityError, ConfigError
from ..footprint import (
    DTYPE_BYTES,
    CacheDTypeName,
    kv_bytes_per_token,
    num_weights,
    step_memory,
    table_bytes,
    weight_groups,
)
from ..resolve import ResolvedConfig, changed, resolve, ways_to_fit
from .gpus import CUDA_CONTEXT_BYTES, GPUS, Gpu, hardware_of
from .roofline import Roofline, StepWork

__all__ = ["Decode", "NoRoomError", "Part", "Plan", "Prefill", "Variant", "make_plan", "plan_json", "read_model"]

CONTEXTS = (512, 2048, 8192, 32_768, 131_072)
BATCH_SIZES = (1, 8, 32, 128, 256)
REFERENCE_CONTEXT = 8192
"""Where dtypes are compared, if the model goes so far."""


class Part(NamedTuple):
    """A part of the memory."""

    name: str
    num_bytes: int
    note: str = ""


class Prefill(NamedTuple):
    """A prediction: one prompt, alone, in chunks of the token budget."""

    num_tokens: int
    seconds: float
    tokens_per_s: float
    bound: str
    """What takes most of the time: "memory" or "arithmetic"."""


class Decode(NamedTuple):
    """A prediction: a step of so many sequences of equal length that generate a token each."""

    context: int
    batch_size: int
    fits: bool
    step_s: float
    tokens_per_s: float
    bound: str


class Variant(NamedTuple):
    """What another choice of dtypes would give."""

    dtype: DTypeName
    kv_cache_dtype: CacheDTypeName
    is_current: bool
    weight_bytes: int
    kv_bytes_per_token: int
    pool_tokens: int
    """0: it does not fit."""
    largest_context: int
    num_seqs: int
    """Sequences of the reference context that fit together."""
    decode_tokens_per_s: float
    """Predicted, with them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known of a model on a card before it runs."""

    name: str
    model: ModelConfig
    gpu: Gpu
    resolved: ResolvedConfig
    parts: tuple[Part, ...]
    """Of the card's memory, in whole."""
    num_weights: int
    concurrency: tuple[tuple[int, int], ...]
    """(context, sequences of it that the pool holds, at most `max_num_seqs`)."""
    prefills: tuple[Prefill, ...]
    decodes: tuple[Decode, ...]
    reference_context: int
    variants: tuple[Variant, ...]

    @property
    def pool_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return self.resolved.num_blocks * self.resolved.block_size


class NoRoomError(CapacityError):
    """A model does not fit: says why, and carries what would help.

    Attributes:
        ways: changes of settings that make it fit.
        gpus: names of cards on which it fits as it is, the smallest first.
    """

    def __init__(self, reason: str, ways: Sequence[Mapping[str, Any]], gpus: Sequence[str]) -> None:
        super().__init__(reason)
        self.ways = tuple(ways)
        self.gpus = tuple(gpus)


def read_model(name: str) -> ModelConfig:
    """Return a model's shape from what `resolve_model` finds, or from a config.json; no weight is needed.

    Raises:
        ConfigError, CheckpointError: there is none, or it is not supported.
    """
    from ..loader import resolve_model
    from ..loader.hf_config import read_model_config

    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return read_model_config(path)
    return resolve_model(name, load_format="dummy").model_config


def make_plan(
    config: EngineConfig,
    model: ModelConfig,
    gpu: Gpu,
    *,
    contexts: Sequence[int] | None = None,
    batch_sizes: Sequence[int] | None = None,
) -> Plan:
    """Plan an engine.

    Args:
        config: its settings; the device is the card's.
        model: its shape.
        gpu: where it would run.
        contexts, batch_sizes: what to predict; None: some sizes, and the engine's limit.

    Raises:
        ConfigError: the settings contradict each other or the model.
        NoRoomError: it does not fit.
    """
    hardware = hardware_of(gpu)
    try:
        resolved = resolve(config, model, hardware)
    except CapacityError as error:
        ways = ways_to_fit(config, model, hardware)
        raise NoRoomError(str(error).partition("; try")[0], ways, _fitting_gpus(config, model)) from None
    if gpu.flops.get(resolved.dtype) is None:
        raise ConfigError(f"dtype is {resolved.dtype}; allowed: {', '.join(gpu.flops)}, whose rate is known")
    lengths = _sizes("context", contexts, CONTEXTS, "max_model_len", resolved.max_model_len)
    batches = _sizes("batch", batch_sizes, BATCH_SIZES, "max_num_seqs", resolved.max_num_seqs)
    roofline = Roofline(model, gpu, dtype=resolved.dtype, kv_cache_dtype=resolved.kv_cache_dtype)
    reference = min(REFERENCE_CONTEXT, resolved.max_model_len)
    return Plan(
        name=config.model,
        model=model,
        gpu=gpu,
        resolved=resolved,
        parts=tuple(_parts(model, resolved, gpu)),
        num_weights=num_weights(model),
        concurrency=tuple((length, _num_seqs(resolved, length)) for length in lengths),
        prefills=tuple(_prefill(roofline, resolved, length) for length in lengths),
        decodes=tuple(_decode(roofline, resolved, length, size) for size in batches for length in lengths),
        reference_context=reference,
        variants=tuple(_variants(config, model, gpu, resolved, reference)),
    )


def _sizes(name: str, given: Sequence[int] | None, usual: Sequence[int], limit: str, most: int) -> list[int]:
    if given is None:
        return [*(size for size in usual if size < most), most]
    for size in given:
        if size > most:
            raise ConfigError(f"{name} is {size}; allowed: at most {limit}, {most}")
    return sorted(set(given))


def _fitting_gpus(config: EngineConfig, model: ModelConfig) -> list[str]:
    found = []
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory_bytes):
        try:
            resolve(config, model, hardware_of(gpu))
        except (CapacityError, ConfigError):  # a CPU takes block sizes that a GPU does not
            continue
        found.append(gpu.name)
    return found


def _parts(model: ModelConfig, resolved: ResolvedConfig, gpu: Gpu) -> Iterator[Part]:
    element, num_tokens, num_seqs = DTYPE_BYTES[resolved.dtype], resolved.max_num_batched_tokens, resolved.max_num_seqs
    for group, num in weight_groups(model).items():
        note = "the embedding's" if group == "head" and model.tie_embeddings else ""
        yield Part(f"weights: {group}", num * element, note)
    if copied := resolved.weight_bytes - num_weights(model) * element:
        yield Part("weights: head, packed", copied, "a copy, for speed")
    step = step_memory(model, resolved.dtype, num_tokens=num_tokens, num_seqs=num_seqs)
    place = max(("attention", step.attention), ("MLP", step.mlp), ("head", step.head), key=lambda each: each[1])[0]
    more = "; more on the torch backend, which gathers keys" if resolved.backend == "torch" else ""
    yield Part("a step's tensors", step.peak, f"{num_tokens:,} tokens; most in the {place}{more}")
    table = table_bytes(model, resolved.max_model_len)
    if splits := resolved.activation_bytes - step.peak - table:
        yield Part("splits of decode", splits, "at most")
    if table:
        yield Part("rotations", table, f"{resolved.max_model_len:,} positions")
    yield Part("KV pool", resolved.kv_cache_bytes, f"{resolved.num_blocks:,} blocks and the null block")
    left = gpu.memory_bytes - resolved.weight_bytes - resolved.activation_bytes - resolved.kv_cache_bytes
    if gpu.architecture == "cpu":
        yield Part("left to the machine", left)
        return
    yield Part("CUDA graphs", resolved.graph_bytes, "kept for them, not measured" if resolved.graphs else "none")
    yield Part("CUDA context", CUDA_CONTEXT_BYTES, "an allowance, not measured")
    yield Part("left free", left - resolved.graph_bytes - CUDA_CONTEXT_BYTES)


def _num_seqs(resolved: ResolvedConfig, context: int) -> int:
    return min(resolved.max_num_seqs, resolved.num_blocks // -(-context // resolved.block_size))


def _prefill(roofline: Roofline, resolved: ResolvedConfig, num_tokens: int) -> Prefill:
    chunk = resolved.max_num_batched_tokens
    works = [
        StepWork.of(
            [(min(chunk, num_tokens - start), min(start + chunk, num_tokens))], int(start + chunk >= num_tokens)
        )
        for start in range(0, num_tokens, chunk)
    ]
    seconds = sum(map(roofline.step_s, works))
    return Prefill(num_tokens, seconds, num_tokens / seconds, roofline.bound(works))


def _decode(roofline: Roofline, resolved: ResolvedConfig, context: int, batch_size: int) -> Decode:
    work = StepWork.of([(1, context)] * batch_size)
    seconds = roofline.step_s(work)
    fits = batch_size <= _num_seqs(resolved, context)
    return Decode(context, batch_size, fits, seconds, batch_size / seconds, roofline.bound([work]))


def _variants(
    config: EngineConfig,
    model: ModelConfig,
    gpu: Gpu,
    current: ResolvedConfig,
    context: int,
) -> Iterator[Variant]:
    half: DTypeName = "float16" if "float16" in (current.dtype, model.dtype) else "bfloat16"
    wide: tuple[DTypeName, ...] = ("float32", half)
    for dtype, kind in itertools.product((each for each in wide if each in gpu.flops), ("auto", "int8", "fp8")):
        stored: CacheDTypeName = dtype if kind == "auto" else kind  # type: ignore[assignment]
        try:
            found = resolve(changed(config, {"dtype": dtype, "kv_cache_dtype": kind}), model, hardware_of(gpu))
        except CapacityError:
            found = None
        except ConfigError:
            continue  # an invariant engine has one dtype
        num_seqs = 0 if found is None else _num_seqs(found, context)
        step_s = Roofline(model, gpu, dtype=dtype, kv_cache_dtype=stored).step_s(StepWork.of([(1, context)] * num_seqs))
        pool_tokens = 0 if found is None else found.num_blocks * found.block_size
        yield Variant(
            dtype=dtype,
            kv_cache_dtype=stored,
            is_current=(dtype, stored) == (current.dtype, current.kv_cache_dtype),
            weight_bytes=num_weights(model) * DTYPE_BYTES[dtype] if found is None else found.weight_bytes,
            kv_bytes_per_token=kv_bytes_per_token(model, stored),
            pool_tokens=pool_tokens,
            largest_context=min(model.max_position, pool_tokens),
            num_seqs=num_seqs,
            decode_tokens_per_s=num_seqs / step_s,
        )


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON: every number by its name and unit."""
    gpu, resolved = plan.gpu, plan.resolved
    settings = asdict(resolved)
    choices = settings.pop("choices")
    return {
        "model": plan.name,
        "shape": asdict(plan.model),
        "num_weights": plan.num_weights,
        "gpu": asdict(gpu) | {"flops": dict(gpu.flops)},
        "fits": True,
        "settings": settings,
        "choices": choices,
        "memory": [part._asdict() for part in plan.parts],
        "kv_bytes_per_block": resolved.block_size * resolved.kv_bytes_per_token,
        "pool_tokens": plan.pool_tokens,
        "concurrency": [{"context": context, "num_seqs": num} for context, num in plan.concurrency],
        "predictions": {
            "what": "roofline of a whole step: an upper bound, not a measurement",
            "ceilings": gpu.source,
            "prefill": [each._asdict() for each in plan.prefills],
            "decode": [each._asdict() for each in plan.decodes],
        },
        "reference_context": plan.reference_context,
        "variants": [each._asdict() for each in plan.variants],
    }
