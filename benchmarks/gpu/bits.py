"""This module asks a GPU which results are equal to the last bit. It does not know how fast anything is.

    PYTHONPATH=.typing:benchmarks python -m gpu.bits --group questions

`promises` are what our kernels promise, at a real model's shapes: a difference is a failure. `questions` are what only
hardware can answer, and what invariant modes are built on: a difference is a result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import octavo.kernels
import torch
import triton
import triton.language as tl
from octavo.kernels import use_backend
from octavo.kernels.spec import Case
from torch import Tensor

from .cases import LLAMA, attention_inputs, decode_plan
from .lines import Lines, NotRunError

GROUPS: Final = ("promises", "questions")
DEVICE: Final = torch.device("cuda")
DEPTH: Final = 4096
LENGTHS: Final = (1, 64, 511, 512, 513, 3000)


@triton.jit
def multiply(p_a, p_b, p_out, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # noqa: N803
    """out = a · b for one tile; a [BLOCK_M, depth], b [depth, BLOCK_N], out [BLOCK_M, BLOCK_N] float32."""
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(0, depth, BLOCK_K):
        b_a = tl.load(p_a + o_m[:, None] * depth + (i_k + o_k)[None, :])  # [BLOCK_M, BLOCK_K]
        b_b = tl.load(p_b + (i_k + o_k)[:, None] * BLOCK_N + o_n[None, :])  # [BLOCK_K, BLOCK_N]
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision="ieee")
    tl.store(p_out + o_m[:, None] * BLOCK_N + o_n[None, :], b_acc)


def differing(a: Tensor, b: Tensor) -> dict[str, Any]:
    """Return how many elements differ in some bit, and by how much at most."""
    integer = {2: torch.int16, 4: torch.int32}[a.itemsize]
    unequal = int((a.contiguous().view(integer) != b.contiguous().view(integer)).sum())
    apart = float((a.double() - b.double()).abs().max()) if unequal else 0.0
    return {"equal": unequal == 0, "num_differing": unequal, "num_compared": a.numel(), "max_abs_diff": apart}


def tiles() -> dict[str, Any]:
    """Sixteen rows by tiles of 16 (HMMA), 64 and 128 rows (HGMMA on Hopper), with two widths and depths of a tile."""
    torch.manual_seed(0)
    a = torch.randn(128, DEPTH, device="cuda").to(torch.bfloat16)
    b = torch.randn(DEPTH, 64, device="cuda").to(torch.bfloat16)
    results: dict[str, Tensor] = {}
    for block_m, block_k, num_warps in (
        (16, 64, 4),
        (64, 64, 4),
        (64, 32, 4),
        (64, 128, 4),
        (128, 64, 4),
        (128, 64, 8),
    ):
        out = torch.empty(block_m, 64, device="cuda")
        kernel = multiply[(1,)](
            a, b, out, DEPTH, BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=block_k, num_warps=num_warps, enable_fp_fusion=True
        )
        kinds = [kind for kind in ("wgmma.mma_async", "mma.sync", "tcgen05.mma") if kind in kernel.asm["ptx"]]
        results[f"{block_m} rows, depth {block_k}, {num_warps} warps ({' '.join(kinds)})"] = out[:16]
    first, *others = results
    return {"status": "measured", "of": first, **{name: differing(results[name], results[first]) for name in others}}


def cublas() -> dict[str, Any]:
    """One row of a bf16 product among 1 to 4096 rows; the environment says whether split-K is possible."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.preferred_blas_library("cublaslt")
    a = torch.randn(4096, DEPTH, device="cuda").to(torch.bfloat16)
    b = torch.randn(6144, DEPTH, device="cuda").to(torch.bfloat16)
    rows = (1, 2, 8, 16, 17, 64, 128, 256, 1024, 4096)
    one = torch.nn.functional.linear(a[:1], b)
    found = {f"{m} rows": differing(torch.nn.functional.linear(a[:m], b)[:1], one) for m in rows[1:]}
    return {"status": "measured", "of": "1 row", **found}


def _attend(op: str, seqs: list[tuple[int, int]], inputs: dict[str, Any]) -> Tensor:
    out: Tensor = getattr(octavo.kernels, f"paged_attention_{op}")(**inputs)
    assert len(out) == sum(query_len for query_len, _ in seqs)
    return out


def _case(seqs: list[tuple[int, int]]) -> Case:
    return Case("bits", {**LLAMA, "seqs": tuple(seqs)}, "bfloat16", "bench")


def _take(inputs: dict[str, Any], s: int, rows: slice, seq_len: int) -> dict[str, Any]:
    """Return the call of one sequence alone, on the same pool."""
    num_rows = rows.stop - rows.start
    device = inputs["q"].device
    return inputs | {
        "q": inputs["q"][rows],
        "cu_seqlens_q": torch.tensor([0, num_rows], dtype=torch.int32, device=device),
        "seq_lens": torch.tensor([seq_len], dtype=torch.int32, device=device),
        "block_table": inputs["block_table"][s : s + 1],
    }


def decode_against_prefill() -> dict[str, Any]:
    """The same position by both ops: what a token recomputed after preemption meets."""
    seqs = [(1, length) for length in LENGTHS]
    inputs = attention_inputs(_case(seqs), DEVICE)
    one, other = _attend("decode", seqs, inputs), _attend("prefill", seqs, inputs)
    return {"status": "measured", **{str(n): differing(one[i], other[i]) for i, n in enumerate(LENGTHS)}}


def chunks() -> dict[str, Any]:
    """A prompt's last rows, computed with it and in chunks that begin elsewhere."""
    length = 3000
    inputs = attention_inputs(_case([(length, length)]), DEVICE)
    whole = _attend("prefill", [(length, length)], inputs)
    found = {}
    for size in (1, 17, 64, 100, 1000):
        rows = slice(length - size, length)
        part = _attend("prefill", [(size, length)], _take(inputs, 0, rows, length))
        found[f"chunk of {size}"] = differing(part, whole[rows])
    return {"status": "measured", **found}


def neighbours(op: str) -> dict[str, Any]:
    """Every sequence of a ragged batch, alone and in it."""
    seqs = [(1 if op == "decode" else min(length, 100), length) for length in LENGTHS]
    inputs = attention_inputs(_case(seqs), DEVICE)
    together, start = _attend(op, seqs, inputs), 0
    for s, (query_len, seq_len) in enumerate(seqs):
        rows = slice(start, start := start + query_len)
        facts = differing(_attend(op, [seqs[s]], _take(inputs, s, rows, seq_len)), together[rows])
        assert facts["equal"], f"{query_len} of {seq_len} tokens: {facts}"
    return {}


def repeats(op: str) -> dict[str, Any]:
    """The same call a hundred times: an order of sums that depends on timing would show."""
    seqs = [(1, 3000)] * 32 if op == "decode" else [(200, 3000)] * 8
    inputs = attention_inputs(_case(seqs), DEVICE)
    first = _attend(op, seqs, inputs)
    for i in range(100):
        facts = differing(_attend(op, seqs, inputs), first)
        assert facts["equal"], f"run {i}: {facts}"
    return {}


def fused_combine() -> dict[str, Any]:
    """Both forms of decode's merge, on batches whose splits finish in any order."""
    seqs = [(1, length) for length in LENGTHS] * 8
    inputs = attention_inputs(_case(seqs), DEVICE)
    separate = octavo.kernels.paged_attention_decode(**inputs, plan=decode_plan(inputs, fused=False))
    fused = decode_plan(inputs, fused=True)
    for i in range(100):  # one plan for all, as for layers: its counters must be back at zero
        facts = differing(octavo.kernels.paged_attention_decode(**inputs, plan=fused), separate)
        assert facts["equal"], f"run {i}: {facts}"
    return {}


CASES: Final[dict[str, dict[str, Callable[[], dict[str, Any]]]]] = {
    "promises": {
        **{f"{op}: neighbours": partial(neighbours, op) for op in ("decode", "prefill")},
        **{f"{op}: repeats": partial(repeats, op) for op in ("decode", "prefill")},
        "decode: both forms of combine": fused_combine,
    },
    "questions": {
        "matrix instructions and tiles": tiles,
        "cuBLASLt and the number of rows": cublas,
        "decode and prefill": decode_against_prefill,
        "prefill and chunks": chunks,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Lines.add_options(parser)
    parser.add_argument("--group", choices=GROUPS, required=True)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--suffix", default="", help="added to the cases' names")
    args = parser.parse_args()
    if torch.cuda.is_available():
        use_backend("triton")

    def guarded(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not torch.cuda.is_available():
            raise NotRunError("no GPU")
        return ask()

    chosen = {name: ask for name, ask in CASES[args.group].items() if args.case in name}
    Lines.from_options(args).run({name + args.suffix: partial(guarded, ask) for name, ask in chosen.items()})


if __name__ == "__main__":
    main()
