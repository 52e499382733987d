"""This module measures what the machine can do at best: copying, a matrix product, launching nothing. It does not know
our ops.

    PYTHONPATH=.typing:benchmarks python -m gpu.ceilings
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import triton

from .lines import Lines, NotRunError
from .timing import CudaClock, summary

SIZE = 8192
COPY_BYTES = 4 << 30
NUM_LAUNCHES = 1000
NUM_GRAPHED = 100


@triton.jit
def nothing(p_x, n):
    """Do nothing: what is left is the launch."""


def median_s(call: Any) -> float:
    """Return the median time of a call."""
    return statistics.median(CudaClock().samples({"it": call})["it"])


def copy() -> dict[str, Any]:
    """Copy device memory, bytes counted once read and once written."""
    num_bytes = COPY_BYTES
    while torch.cuda.mem_get_info()[0] < 3 * num_bytes:
        num_bytes //= 2
    source = torch.ones(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    return {"status": "measured", "copy_bytes_per_s": 2 * num_bytes / median_s(lambda: target.copy_(source))}


def read() -> dict[str, Any]:
    """Sum device memory: decode attention reads a thousand times what it writes."""
    source = torch.ones(COPY_BYTES // 8, device="cuda")
    total = torch.zeros((), device="cuda")
    seconds = median_s(lambda: torch.sum(source, dim=0, out=total))
    return {"status": "measured", "read_bytes_per_s": source.nbytes / seconds}


def matmul() -> dict[str, Any]:
    """Multiply random matrices: zeros take less power and so run faster than data will."""
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return {"status": "measured", "matmul_flops_per_s": 2 * SIZE**3 / median_s(lambda: torch.mm(a, b, out=out))}


def launch() -> dict[str, Any]:
    """Launch an empty kernel: the host's time for each of many, and the device's within one graph."""
    x = torch.zeros(16, device="cuda")

    def once() -> None:
        nothing[(1,)](x, 1)

    once()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(NUM_LAUNCHES):
        once()
    host_s = (time.perf_counter() - begin) / NUM_LAUNCHES
    torch.cuda.synchronize()
    clock = CudaClock()

    def many() -> None:
        for _ in range(NUM_GRAPHED):
            once()

    graphed = clock.samples({"many": clock.graphed(many), "one": clock.graphed(once)})
    return {
        "status": "measured",
        "host_us": round(host_s * 1e6, 2),
        "graph_us_per_kernel": round(statistics.median(graphed["many"]) * 1e6 / NUM_GRAPHED, 3),
        "graph_of_one": summary(graphed["one"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Lines.add_options(parser)
    args = parser.parse_args()

    def guarded(measure: Any) -> Any:
        def run() -> dict[str, Any]:
            if not torch.cuda.is_available():
                raise NotRunError("no GPU")
            facts: dict[str, Any] = measure()
            return facts

        return run

    Lines.from_options(args).run({f.__name__: guarded(f) for f in (copy, read, matmul, launch)})


if __name__ == "__main__":
    main()
