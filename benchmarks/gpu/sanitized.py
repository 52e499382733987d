"""This module runs one op once on small inputs, for compute-sanitizer to watch. It does not know what is watched for.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m gpu.sanitized decode

Without torch's cache of freed memory, as within it every address looks allocated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import octavo.kernels
import torch
from octavo.kernels import use_backend
from octavo.kernels.spec import Case, load_specs

from .cases import Bench, attention_inputs, decode_plan, make_inputs

DEVICE: Final = torch.device("cuda")
SMALL: Final = {"num_kv_heads": 2, "group_size": 4, "head_dim": 128, "block_size": 16}


def _attend(op: str, *, fused: bool = False) -> None:
    lengths = (1, 17, 511, 513, 1100)
    seqs = tuple((1 if op == "decode" else min(n, 70), n) for n in lengths)
    inputs: dict[str, Any] = attention_inputs(Case("small", {**SMALL, "seqs": seqs}, "bfloat16"), DEVICE)
    if fused:
        inputs["plan"] = decode_plan(inputs, fused=True)
    for _ in range(2):
        getattr(octavo.kernels, f"paged_attention_{op}")(**inputs)


def _spec_case(op: str, name: str) -> None:
    spec = load_specs()[op]
    bench = Bench(spec, spec.case(name))
    inputs = make_inputs(bench, DEVICE)
    getattr(octavo.kernels, op)(**inputs)


RUNS: Final[dict[str, Callable[[], None]]] = {
    "decode": partial(_attend, "decode"),
    "decode-fused": partial(_attend, "decode", fused=True),
    "prefill": partial(_attend, "prefill"),
    "write_kv": partial(_spec_case, "write_kv", "llama-8b"),
    "rms_norm": partial(_spec_case, "rms_norm", "bfloat16-residual"),
    "gated_activation": partial(_spec_case, "gated_activation", "silu-bfloat16"),
    "sample": partial(_spec_case, "sample", "chat-bfloat16"),
    "log_softmax_top": partial(_spec_case, "log_softmax_top", "top-5-bfloat16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    args = parser.parse_args()
    use_backend("triton")
    RUNS[args.run]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
