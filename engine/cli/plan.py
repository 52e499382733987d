"""This module holds `octavo plan`: what a model would take and reach on a card, as tables. It does not know the
arithmetic.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import EngineConfig, setting_names
from ..errors import ConfigError
from ..resolve import flags
from .endings import FAILED, OK
from .flags import FILE_ONLY, Options, own_options
from .outputs import STDOUT, write_output
from .plan_options import PlanOptions, numbers
from .terminal import error_line, show, stderr

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..tools.gpus import Gpu
    from ..tools.plan import Decode, NoRoomError, Plan

__all__ = ["plan"]

GIB = 2**30


def plan(
    model_name: Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)] = None,
    *,
    options: Options,
) -> int:
    """Say what a model would take and reach on a GPU, without one: memory, blocks, sequences, predicted speeds.

    MODEL is a folder, a config.json, a bundled name, a .gguf file or a hub id; no weight is read. The engine's own
    settings can be given as for serve, and an engine allocates what is told here.
    """
    own, config = own_options(PlanOptions, options.own), options.config
    if options.sampling:
        raise ConfigError("[sampling] is given; a plan does not depend on it")
    if model_name is not None:
        if options.names_model:
            raise ConfigError(f"the model is given twice: {model_name!a}, and {config.model!a}")
        config = dataclasses.replace(config, model=model_name)
    contexts, batch_sizes = numbers("--context", own.context), numbers("--batch", own.batch)
    from ..tools.plan import NoRoomError, make_plan, plan_json, read_model

    model = read_model(config.model)
    gpu = _gpu(own.gpu, config, model, quiet=options.quiet)
    try:
        found = make_plan(config, model, gpu, contexts=contexts, batch_sizes=batch_sizes)
    except NoRoomError as error:
        _write(own.json, _no_room_json(error, config, gpu))
        error_line(str(error))
        for line in _ways_out(error, config):
            stderr().print(line)
        return FAILED
    if own.json != STDOUT:
        show("\n".join(plan_lines(found)))
    _write(own.json, plan_json(found))
    return OK


def _gpu(name: str, config: EngineConfig, model: ModelConfig, *, quiet: bool) -> Gpu:
    from ..tools.gpus import find_gpu

    device = "cpu" if name == "cpu" else "cuda"
    if config.device not in ("auto", device):
        raise ConfigError(f"device is {config.device!r} and --gpu is {name!r}; allowed: {device}, or auto")
    if device == "cuda":
        return find_gpu(name)
    from ..tools.cpu import measure_cpu

    if not quiet:
        stderr().print("measure this CPU: memory bandwidth and matrix products, about a second", style="dim")
    return measure_cpu("float32" if config.dtype == "auto" else config.dtype)


def _write(file: Path | None, record: dict[str, Any]) -> None:
    if file is not None:
        write_output(file, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _no_room_json(error: NoRoomError, config: EngineConfig, gpu: Gpu) -> dict[str, Any]:
    return {
        "model": config.model,
        "gpu": dataclasses.asdict(gpu) | {"flops": dict(gpu.flops)},
        "fits": False,
        "reason": str(error),
        "commands": [_command(config, way) for way in error.ways],
        "gpus": list(error.gpus),
    }


def _ways_out(error: NoRoomError, config: EngineConfig) -> Iterator[str]:
    if error.ways:
        yield "these would fit:"
        yield from (f"  {_command(config, way)}" for way in error.ways)
    if error.gpus:
        yield f"as it is, it fits on: {', '.join(error.gpus)}"
    if not error.ways and not error.gpus:
        yield "it fits on none of the cards known here; a smaller model would"


def _command(config: EngineConfig, way: Mapping[str, Any]) -> str:
    """Return the command that serves with these changes and the user's settings, as far as they have flags."""
    path = Path(config.model)
    model = config.model
    if path.suffix == ".json":
        model = str(path.parent) if path.name == "config.json" else "MODEL"
    settings: dict[str, Any] = {}
    for name, part in setting_names().items():
        owner, default = (getattr(each, part) if part else each for each in (config, EngineConfig()))
        is_flag = name not in ("model", "device", *FILE_ONLY) and part != "faults"
        if is_flag and getattr(owner, name) != getattr(default, name):
            settings[name] = getattr(owner, name)
    return f"octavo serve {shlex.quote(model)} {flags({**settings, **way})}"


def plan_lines(found: Plan) -> list[str]:
    """Return a plan as text."""
    resolved, gpu, model = found.resolved, found.gpu, found.model
    kv_bytes = resolved.kv_bytes_per_token
    return [
        found.name,
        f"  model  {model.family}, {found.num_weights:,} weights in {resolved.dtype}, {model.num_layers} layers, "
        f"{model.num_q_heads} query and {model.num_kv_heads} KV heads of {model.head_dim}",
        f"  card   {gpu.title}, {gpu.memory_bytes / GIB:,.1f} GiB, {gpu.bandwidth_bytes_per_s / 1e9:,.0f} GB/s, "
        f"{gpu.flops[resolved.dtype] / 1e12:,.4g} TFLOP/s in {resolved.dtype} ({gpu.source})",
        *_section("Memory", _memory(found)),
        f"KV: {kv_bytes:,} bytes per token in {resolved.kv_cache_dtype}, {kv_bytes * resolved.block_size:,} per "
        f"block of {resolved.block_size}; {found.pool_tokens:,} tokens in {resolved.num_blocks:,} blocks",
        *_section("Sequences at once", _concurrency(found)),
        f"Longest: {resolved.max_model_len:,} tokens of the model's {model.max_position:,}",
        *_section(f"Predicted prefill, one prompt in chunks of {resolved.max_num_batched_tokens:,}", _prefills(found)),
        *_section("Predicted decode, tokens/s of all sequences together (ms per token)", _decodes(found.decodes)),
        "bound by memory where nothing is said; - does not fit",
        *_section(f"Other dtypes, compared at {found.reference_context:,} tokens", _variants(found)),
        "",
        f"Predictions are rooflines of whole steps, computed from these ceilings ({gpu.source}); nothing was run.",
        "They are upper bounds: no kernel reaches a whole ceiling, and time between kernels is not counted.",
    ]


def _section(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a title and a table: the first column and those that begin with a letter to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lefts = [index == 0 or rows[-1][index][:1].isalpha() for index in range(len(widths))]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, lefts, strict=True)
        ).rstrip()
        for row in rows
    ]
    return ["", title, *(f"  {line}" for line in lines)]


def _memory(found: Plan) -> list[list[str]]:
    total = found.gpu.memory_bytes
    rows = [["", "bytes", "GiB", "", "note"]]
    for part in found.parts:
        shares = [f"{part.num_bytes / GIB:,.3f}", f"{part.num_bytes / total:.1%}"]
        rows.append([part.name, f"{part.num_bytes:,}", *shares, part.note])
    return [*rows, ["all", f"{total:,}", f"{total / GIB:,.3f}", "100.0%", "what there is"]]


def _concurrency(found: Plan) -> list[list[str]]:
    limit = found.resolved.max_num_seqs
    rows = [["context", "sequences", "limit"]]
    return rows + [
        [f"{context:,}", f"{num:,}", "max_num_seqs" if num == limit else "the pool"]
        for context, num in found.concurrency
    ]


def _prefills(found: Plan) -> list[list[str]]:
    rows = [["prompt", "ms", "tokens/s", "bound"]]
    return rows + [
        [f"{each.num_tokens:,}", f"{each.seconds * 1e3:,.1f}", f"{each.tokens_per_s:,.0f}", each.bound]
        for each in found.prefills
    ]


def _decodes(decodes: Sequence[Decode]) -> list[list[str]]:
    contexts = sorted({each.context for each in decodes})
    cells = {(each.batch_size, each.context): each for each in decodes}
    rows = [["sequences", *(f"at {context:,}" for context in contexts)]]
    for size in sorted({each.batch_size for each in decodes}):
        row = [cells[size, context] for context in contexts]
        if any(each.fits for each in row):
            rows.append([f"{size:,}", *(_speed(each) for each in row)])
    return rows


def _speed(each: Decode) -> str:
    if not each.fits:
        return "-"
    return f"{each.tokens_per_s:,.0f} ({each.step_s * 1e3:.3g})" + ("" if each.bound == "memory" else " arithmetic")


def _variants(found: Plan) -> list[list[str]]:
    rows = [["weights", "KV", "weights GiB", "KV bytes/token", "pool tokens", "sequences", "decode tokens/s", ""]]
    for each in found.variants:
        numbers = [f"{each.weight_bytes / GIB:,.2f}", f"{each.kv_bytes_per_token:,}"]
        fits = ["does not fit", "-", "-"]
        if each.pool_tokens:
            fits = [f"{each.pool_tokens:,}", f"{each.num_seqs:,}", f"{each.decode_tokens_per_s:,.0f}"]
        mark = "<- this plan" if each.is_current else ""
        rows.append([each.dtype, each.kv_cache_dtype, *numbers, *fits, mark])
    return rows
