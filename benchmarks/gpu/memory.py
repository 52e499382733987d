"""This module holds the memory that an engine takes beside the memory it was planned with. It does not know what for.

PYTHONPATH=.typing:benchmarks python -P -m gpu.memory --model llama-3.1-8b
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from octavo.engine import LLM, SamplingParams
from octavo.engine.config import setting_names
from octavo.engine.errors import CapacityError, ConfigError

from .lines import Lines, NotRunError
from .models import find
from .steps import add_options

__all__ = ["CudaMemory", "Memory", "measure"]

WAYS: Final[dict[str, dict[str, Any]]] = {"eager": {"graphs": False}, "graphs": {"graphs": True}}
KV_TOKENS: Final = 64 * 1024
"""The same pool for both ways, so that what differs is the graphs'."""


class Memory(Protocol):
    """What a device's memory holds; a test's may be made of numbers."""

    def allocated(self) -> int:
        """Return the bytes that tensors hold."""
        ...

    def reserved(self) -> int:
        """Return the bytes that were taken from the device."""
        ...

    def peak(self) -> int:
        """Return the most bytes that tensors have held since `reset`."""
        ...

    def reset(self) -> None:
        """Forget the peak."""
        ...


class CudaMemory:
    """As torch's allocator counts."""

    def allocated(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def reserved(self) -> int:
        return torch.cuda.memory_reserved()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def measure(model: str, way: Mapping[str, Any], memory: Memory, **settings: Any) -> dict[str, Any]:
    """Start an engine, run its largest step, and say what that held beside what was planned.

    Raises:
        NotRunError: it lacks a setting, or room.
    """
    missing = way.keys() - setting_names().keys()
    if missing:
        raise NotRunError(f"this engine has no setting {', '.join(sorted(missing))}")
    gc.collect()
    before = memory.allocated()
    with tempfile.TemporaryDirectory() as folder:
        name, found = find(Path(folder), model)
        try:
            llm = LLM(name, **({"kv_cache_tokens": KV_TOKENS} | found | settings | way))
        except (CapacityError, ConfigError) as error:
            raise NotRunError(str(error)) from error
    resolved = llm.engine.resolved
    started = memory.allocated() - before
    planned_start = resolved.weight_bytes + resolved.kv_cache_bytes
    num_seqs = resolved.max_num_seqs
    length = max(2, min(resolved.max_num_batched_tokens // num_seqs, resolved.max_model_len - 2))
    num_seqs = min(num_seqs, resolved.num_blocks // -(-(length + 2) // resolved.block_size))
    prompts = [[1 + (i * 31 + j) % 199 for j in range(length)] for i in range(num_seqs)]
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
    memory.reset()
    llm.generate(prompts, params)
    step_bytes = memory.peak() - before - started
    facts = {
        "status": "measured",
        "started_bytes": started,
        "planned_started_bytes": planned_start,
        "step_bytes": step_bytes,
        "planned_step_bytes": resolved.activation_bytes,
        "reserved_bytes": memory.reserved(),
        "step_tokens": num_seqs * length,
        "within_plan": step_bytes <= resolved.activation_bytes,
        "phases": [f"{phase.name}: {phase.seconds:.2f} s, {phase.detail}" for phase in llm.engine.phases],
    }
    del llm
    gc.collect()
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()

    def run(way: Mapping[str, Any]) -> dict[str, Any]:
        if args.device == "cpu":
            raise NotRunError("a CPU's memory is not measured")
        torch.cuda.empty_cache()
        return measure(args.model, way, CudaMemory(), device=args.device, dtype=args.dtype)

    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"{args.model}/{name}": partial(run, w) for name, w in WAYS.items()
    }
    Lines.from_options(args).run(cases)


if __name__ == "__main__":
    main()
