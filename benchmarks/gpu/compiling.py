"""This module compiles what the benchmarks will launch, in parallel, into Triton's own cache. It does not know how long
a kernel takes to run.

    PYTHONPATH=.typing:benchmarks python -m gpu.compiling --arch 90 --level quick

It needs no GPU: launchers run on tensors that hold nothing, and say which variants they want.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from octavo.kernels import BackendError
from octavo.kernels.aot.driver import Launch, recording
from octavo.kernels.aot.targets import GPUS
from octavo.kernels.aot.workers import compile_in_workers

from .cases import Bench, Level, benches, make_inputs
from .kernels import our_calls
from .lines import Lines

__all__ = ["variants"]


def variants(chosen: list[Bench], target: str) -> tuple[list[Launch], dict[str, str]]:
    """Return the variants that these cases launch, and why others launch none: case -> reason."""
    refused: dict[str, str] = {}
    with recording(GPUS[target]) as seen:
        for bench in chosen:
            try:
                inputs = make_inputs(bench, torch.device("meta"))
                for call in our_calls(bench, inputs).values():
                    call()
            except (ValueError, BackendError) as error:
                refused[bench.name] = str(error)
    return list(seen), refused


def compile_variants(launches: list[Launch], workers: int) -> dict[str, Any]:
    """Compile into Triton's cache; a variant that cannot be compiled fails again in the case that launches it."""
    return {"num_variants": len(launches), "num_compiled": sum(compile_in_workers(launches, workers))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Lines.add_options(parser)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--level", choices=Level.__args__, default="normal")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    args = parser.parse_args()
    lines = Lines.from_options(args)
    target = f"sm_{args.arch}"

    def work() -> dict[str, Any]:
        if target not in GPUS:
            return {"status": "not run", "reason": f"{target} is not among {', '.join(GPUS)}: compiled on first use"}
        chosen = [bench for bench in benches(args.level) if args.case in bench.name]
        launches, refused = variants(chosen, target)
        return {"refused": refused} | compile_variants(launches, args.workers)

    cases: dict[str, Callable[[], dict[str, Any]]] = {"benchmarks": work}
    lines.run(cases)


if __name__ == "__main__":
    main()
