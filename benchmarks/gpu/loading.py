"""This module times how weights get from files to the device, beside the disk and the link alone. It does not know how
they are loaded.

    PYTHONPATH=.typing:benchmarks python -P -m gpu.loading --model qwen3-0.6b
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from octavo.engine import LLM
from octavo.engine.config import ModelConfig
from octavo.engine.tools.plan import read_model
from peers.transformers_weights import tensors

from .lines import Lines, NotRunError
from .models import MODELS, write
from .steps import add_options, synchronize

__all__ = ["forget", "measure", "write_checkpoint"]

CHUNK_BYTES: Final = 64 << 20
PHASE: Final = "load the weights"


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype, device: str = "cpu") -> Path:
    """Write a checkpoint of a shape: random numbers under the names that other libraries give them."""
    from octavo.engine.footprint import weight_shapes
    from safetensors.torch import save_file

    own = write(folder, name)
    config: ModelConfig = read_model(str(own))
    # Drawn where that is quick; the host takes minutes for what a GPU draws in a second.
    shapes = weight_shapes(config)
    ours = {key: torch.randn(shape, device=device).mul_(0.02).to("cpu", dtype) for key, shape in shapes.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors(config, ours)}, own / "model.safetensors")
    return own


def forget(path: Path) -> bool:
    """Ask the system to forget what it has cached of a file; return whether it could be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def read_s(path: Path) -> float:
    """Return the seconds in which a file is read and nothing is done with it."""
    buffer, start = bytearray(CHUNK_BYTES), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def link_s(num_bytes: int, device: str) -> float:
    """Return the seconds in which so many bytes go from pinned memory to the device."""
    source = torch.empty(min(num_bytes, 1 << 30), dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.empty_like(source, device=device)
    target.copy_(source)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(5):
        target.copy_(source, non_blocking=True)
    synchronize(device)
    return (time.perf_counter() - start) / 5 * num_bytes / source.numel()


def measure(folder: Path, device: str, dtype: str) -> dict[str, Any]:
    """Load a checkpoint from the disk and once more from memory, beside what disk and link take alone."""
    path = folder / "model.safetensors"
    num_bytes = path.stat().st_size
    rates: dict[str, float | None] = {}

    def rate(seconds: float) -> float:
        return round(num_bytes / seconds / 1e9, 3)

    for name in ("from disk", "from memory"):
        if name == "from disk" and not forget(path):
            continue
        llm = LLM(str(folder), device=device, dtype=dtype, kv_cache_tokens=1024, max_model_len=1024, max_num_seqs=4)
        (seconds,) = (phase.seconds for phase in llm.engine.phases if phase.name == PHASE)
        rates[name] = rate(seconds)
        del llm
    forget(path)
    rates["disk alone"] = rate(read_s(path))
    rates["memory alone"] = rate(read_s(path))
    rates["link alone"] = rate(link_s(num_bytes, device))
    start = time.perf_counter()
    from safetensors.torch import load_file

    loaded = load_file(path, device=device)
    synchronize(device)
    rates["safetensors, from memory"] = rate(time.perf_counter() - start)
    del loaded
    return {"status": "measured", "bytes": num_bytes, "gb_per_s": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()

    def run() -> dict[str, Any]:
        if args.model not in MODELS:
            raise NotRunError(f"{args.model} is no shape; known: {', '.join(MODELS)}")
        dtype = MODELS[args.model]["torch_dtype"] if args.dtype == "auto" else args.dtype
        with tempfile.TemporaryDirectory() as folder:
            try:
                own = write_checkpoint(Path(folder), args.model, getattr(torch, dtype), args.device)
            except OSError as error:
                raise NotRunError(f"the checkpoint cannot be written: {error}") from error
            return measure(own, args.device, dtype) | {"config": json.loads((own / "config.json").read_text())}

    cases: dict[str, Callable[[], dict[str, Any]]] = {f"{args.model}/load": run}
    Lines.from_options(args).run(cases)


if __name__ == "__main__":
    main()
