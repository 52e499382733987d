"""This module times every op on a GPU, cold cache, beside what other libraries offer for the same inputs. It does not
know any kernel.

    PYTHONPATH=.typing:benchmarks python -m gpu.kernels --group decode

A case is timed only after it was compared with the reference on the same inputs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import octavo.kernels
import peers
import torch
from octavo.kernels import plan_paged_attention, use_backend
from octavo.kernels.aot.compile import hash_kernels

from .cases import (
    ATTENTION,
    GROUPS,
    STEP,
    Bench,
    Level,
    benches,
    decode_plan,
    input_bytes,
    make_inputs,
    plan_arguments,
)
from .checking import check, check_attention
from .lines import Lines, NotRunError
from .timing import Clock, CudaClock, roofline, summary

__all__ = ["measure", "our_calls"]

HEADROOM_BYTES = 3 << 30
"""For the flush buffer, scratch and what the comparison gathers."""
SMALL_S = 500e-6
"""Runs below this are also timed as a CUDA graph's replay: beside them the host's launching counts."""

Call = Callable[[], object]


def our_calls(bench: Bench, inputs: dict[str, Any]) -> dict[str, Call]:
    """Return the ways in which our op can be called, the default first; plans are made before, as for all layers."""
    name = bench.spec.name
    op = getattr(octavo.kernels, name)
    if name not in ATTENTION:
        return {"octavo": partial(op, **inputs)}
    arguments = plan_arguments(bench)
    out = torch.full_like(inputs["q"], float("nan"))
    plan = plan_paged_attention(**{name: inputs[name] for name in STEP}, **arguments)
    planned = {"worklist" if arguments["op"] == "prefill" else "plan": plan}
    calls: dict[str, Call] = {
        "octavo": partial(op, **inputs, **planned, out=out),
        "octavo, planning in the call": partial(op, **inputs, out=out),
    }
    if (
        arguments["op"] == "decode"
        and max(seq_len for _, seq_len in bench.case["seqs"]) > octavo.kernels.attention.SPLIT_TOKENS
    ):
        bounds = {key: arguments[key] for key in ("max_query_len", "max_splits")}
        fused = decode_plan(inputs, fused=True, **bounds)
        calls["octavo, fused combine"] = partial(op, **inputs, plan=fused, out=out)
    return calls


def _check_ways(bench: Bench, inputs: dict[str, Any], calls: Mapping[str, Call]) -> float:
    """Assert that every way of calling our op is right, in the state in which it will be timed: twice over."""
    if bench.spec.name not in ATTENTION:
        return check(bench, inputs)
    worst = 0.0
    for call in calls.values():
        call()
        out = call()
        assert isinstance(out, torch.Tensor)
        worst = max(worst, check_attention(bench, inputs, out))
        out.fill_(float("nan"))
    return worst


def measure(
    bench: Bench, inputs: dict[str, Any], clock: Clock, ceilings: Mapping[str, float], *, with_peers: bool
) -> dict[str, Any]:
    """Check and time one case.

    Returns:
        Facts of our default way, and per name of the other ways and of peers what they took or why they did not.
    """
    try:
        calls = our_calls(bench, inputs)
        error_u = _check_ways(bench, inputs, calls)
    except (ValueError, octavo.kernels.BackendError) as error:
        raise NotRunError(f"refused: {error}") from error
    others: dict[str, dict[str, Any]] = {}
    if with_peers and bench.spec.name in ATTENTION:
        expected = calls["octavo"]()
        assert isinstance(expected, torch.Tensor)
        expected = expected.clone()
        for name, peer in peers.find(bench.group):
            others[name], call = peers.prepare(peer, bench.case, inputs, expected)
            if call is not None:
                calls[name] = call
    eager = clock.samples(calls)
    replays: dict[str, Call] = {}
    for name in [name for name, seconds in eager.items() if statistics.median(seconds) < SMALL_S]:
        try:
            replays[name] = clock.graphed(calls[name])
        except Exception as error:  # not everything can be captured, and what cannot is timed as it is
            others.setdefault(name, {})["no_graph"] = str(error)[:200]
    graphed = clock.samples(replays) if replays else {}
    for name, seconds in eager.items():
        best = graphed.get(name, seconds)
        facts = {**summary(best), "graph": name in graphed, "eager_us": summary(seconds)["us"]}
        facts |= roofline(statistics.median(best), bench.spec.bytes(bench.case), bench.spec.flops(bench.case), ceilings)
        others[name] = others.get(name, {}) | facts
    ours = others.pop("octavo")
    return {"status": "measured", "error_u": round(error_u, 3), **ours, "beside": others}


def run_case(bench: Bench, clock: CudaClock, args: argparse.Namespace, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Measure one case on the GPU if it fits."""
    gc.collect()
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], input_bytes(bench) + HEADROOM_BYTES
    if needed > free:
        raise NotRunError(f"needs {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} GiB are free")
    inputs = make_inputs(bench, torch.device("cuda"))
    return measure(bench, inputs, clock, ceilings, with_peers=not args.no_peers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Lines.add_options(parser)
    parser.add_argument("--group", choices=GROUPS, help="only these (default: all)")
    parser.add_argument("--level", choices=Level.__args__, default="normal")
    parser.add_argument("--no-peers", action="store_true", help="our kernels alone")
    parser.add_argument("--ceilings", type=Path, help="JSON of gpu.ceilings' rates, for the fraction reached")
    args = parser.parse_args()
    chosen = {bench.name: bench for bench in benches(args.level, args.group)}
    lines = Lines.from_options(args)
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is visible: nothing can be timed here")
    ceilings = json.loads(args.ceilings.read_text(encoding="utf-8")) if args.ceilings else {}
    clock = CudaClock()
    use_backend("triton")
    hash_kernels()  # as did the processes that have compiled what follows
    lines.run({name: partial(run_case, bench, clock, args, ceilings) for name, bench in chosen.items()})


if __name__ == "__main__":
    main()
