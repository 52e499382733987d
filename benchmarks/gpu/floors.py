"""This module holds how fast a step could be, part by part, on a machine whose ceilings are known. It does not know how
anything is measured.

The arithmetic is `octavo.engine.tools.roofline`'s; here its parts are divided into what a profile tells apart. A floor
on ceilings measured in the same run is what a measured time is held against; one on a data sheet is a prediction.

    PYTHONPATH=.typing:benchmarks python -P -m gpu.floors
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from octavo.engine.config import ModelConfig
from octavo.engine.footprint import DTYPE_BYTES, num_weights
from octavo.engine.tools.gpus import Gpu, find_gpu
from octavo.engine.tools.plan import read_model
from octavo.engine.tools.roofline import Roofline, StepWork

from .lines import Lines
from .models import write

__all__ = ["Floor", "decode_work", "measured_gpu", "step_floors"]

PREDICTED: Final = (("h100", "llama-3.1-8b"), ("h200", "llama-3.1-8b"), ("h100", "qwen3-0.6b"), ("h100", "qwen3-8b"))
BATCHES: Final = ((1, 4096), (64, 4096), (256, 1024))


class Floor(NamedTuple):
    """The least that one part of a step has to do, over all layers."""

    num_bytes: float
    flops: float
    seconds: float


def measured_gpu(ceilings: Mapping[str, float], dtype: str) -> Gpu:
    """Return the machine as this run has measured it; capacities are not asked for."""
    rates = {dtype: ceilings["matmul_flops_per_s"]}
    return Gpu("here", "this machine", "", 0, ceilings["copy_bytes_per_s"], rates, 0, "measured in the same run")


def decode_work(batch_size: int, context: float) -> StepWork:
    """Return a step of so many sequences of a length that generate a token each."""
    tokens = round(batch_size * context)
    return StepWork(batch_size, batch_size, batch_size, tokens, tokens)


def step_floors(
    model: ModelConfig, gpu: Gpu, work: StepWork, *, dtype: Any, kv_cache_dtype: Any = None
) -> dict[str, Floor]:
    """Return the floor of each part, by the names of `octavo.engine.tools.profile`; they add up to the step's.

    What runs as several kernels is counted as the one it could be: every byte in and out once.
    """
    roofline = Roofline(model, gpu, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    parts = {part.name: part for part in roofline.parts(work)}
    element, tokens, layers = DTYPE_BYTES[dtype], work.num_tokens, model.num_layers
    bandwidth, rate = gpu.bandwidth_bytes_per_s, gpu.flops[dtype]
    heads, hidden, inner = model.num_q_heads * model.head_dim, model.hidden_size, model.intermediate_size
    up = inner * (2 if model.gated_mlp else 1)
    found: dict[str, Floor] = {}
    for name, columns, rows in (
        ("qkv", hidden, model.qkv_size),
        ("o", heads, hidden),
        ("up", hidden, up),
        ("down", inner, hidden),
    ):
        num_bytes = layers * element * (rows * columns + tokens * (rows + columns))
        flops = 2.0 * layers * tokens * rows * columns
        found[name] = Floor(num_bytes, flops, max(num_bytes / bandwidth, flops / rate))
    attention = parts["attention"]
    found["attention"] = Floor(attention.num_bytes, attention.flops, attention.seconds)
    pointwise = {
        "norm": layers * 8 * hidden + 4 * hidden,
        "write_kv": layers * 2 * (model.qkv_size - model.num_kv_heads * model.head_dim),
        "activation": layers * (up + inner),
        "between": hidden,
    }
    for name, elements in pointwise.items():
        num_bytes = tokens * elements * element
        found[name] = Floor(num_bytes, 0.0, num_bytes / bandwidth)
    if "head and sampling" in parts:
        head = parts["head and sampling"]
        found["head and sampling"] = Floor(head.num_bytes, head.flops, head.seconds)
    return found


def predict(card: str, name: str) -> dict[str, Any]:
    """Return floors of decode steps on a card's data sheet: predictions, of which nothing was measured."""
    gpu = find_gpu(card)
    with tempfile.TemporaryDirectory() as folder:
        model = read_model(str(write(Path(folder), name)))
    rows = []
    for batch_size, context in BATCHES:
        floors = step_floors(model, gpu, decode_work(batch_size, context), dtype=model.dtype)
        seconds = sum(floor.seconds for floor in floors.values())
        longest = max(floors, key=lambda part: floors[part].seconds)
        fits = num_weights(model) * DTYPE_BYTES[model.dtype] + floors["attention"].num_bytes < gpu.memory_bytes
        row = {"batch_size": batch_size, "context": context, "floor_us": round(seconds * 1e6, 1), "most": longest}
        rows.append(row | {"tokens_per_s": round(batch_size / seconds), "fits": fits})
    return {"status": "predicted", "gpu": gpu.title, "source": gpu.source, "model": name, "steps": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Lines.add_options(parser)
    lines = Lines.from_options(parser.parse_args())
    lines.run({f"{name} on {card}": lambda card=card, name=name: predict(card, name) for card, name in PREDICTED})


if __name__ == "__main__":
    main()
