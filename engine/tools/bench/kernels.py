"""This module times ops on the backend in force, the cases taking turns. It does not know any kernel, nor argv."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

import octavo.kernels
import torch
from octavo.kernels.attention import SPLIT_TOKENS, AttentionOp
from octavo.kernels.spec import Case, generator, load_specs
from torch import Tensor

from ...errors import ConfigError
from .checking import ATTENTION, KernelCase, check
from .comparison import Difference, of_repeats

__all__ = [
    "Clock",
    "CpuClock",
    "CudaClock",
    "Timed",
    "best_clock",
    "kernel_cases",
    "kernel_differences",
    "kernel_lines",
    "kernel_result",
    "prepare",
]

STEP: Final = ("cu_seqlens_q", "seq_lens", "block_table")
MAX_RUNS: Final = 25
ROUND_S: Final = 0.2
"""A case runs once in a round, and again until so much time is over, at most `MAX_RUNS` times."""
FLUSH_BYTES: Final = 1 << 30
"""Far beyond a GPU's second-level cache, and long enough to read that the host has queued the next call meanwhile."""
SMALL_S: Final = 500e-6
"""Below this a GPU waits for its host: such calls are timed as the replay of a CUDA graph, as engines run them."""
_COPY: Final = {"num_kv_heads": 8, "head_dim": 128, "block_size": 64, "num_blocks": 256, "num_copies": 64}

Call = Callable[[], object]


class Clock(Protocol):
    """Times calls on one device."""

    device: torch.device
    caches: str
    """What is in the caches when a call begins, in words."""

    def ready(self, call: Call) -> Call:
        """Run a call until it is compiled and warm; return what to time in its place."""
        ...

    def samples(self, call: Call) -> list[float]:
        """Return the seconds that one round's runs took."""
        ...


class CpuClock:
    """Wall time around each call."""

    device = torch.device("cpu")
    caches = "as the run before left them"

    def ready(self, call: Call) -> Call:
        """Run the call once."""
        call()
        return call

    def samples(self, call: Call) -> list[float]:
        """Run the call some times."""
        found: list[float] = []
        while not found or (len(found) < MAX_RUNS and sum(found) < ROUND_S):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found


class CudaClock:
    """CUDA events around each call, its second-level cache cold."""

    device = torch.device("cuda")
    caches = "cold"

    def __init__(self) -> None:
        self._buffer = torch.ones(FLUSH_BYTES // 4, device="cuda")
        self._sum = torch.zeros((), device="cuda")

    def ready(self, call: Call) -> Call:
        """Run the call until it is compiled; where it is short, return the replay of what it launches."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        if statistics.median(self.samples(call)) >= SMALL_S:
            return call
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # what asks the device midway cannot be captured, and is timed as it is
            return call
        replay: Call = graph.replay
        return replay

    def samples(self, call: Call) -> list[float]:
        """Run the call some times, emptying the cache in between."""
        pairs = []
        for _ in range(MAX_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # By reading: lines that a fill leaves dirty would be written back during the run that is timed.
            torch.sum(self._buffer, dim=0, out=self._sum)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def best_clock() -> Clock:
    """Return a clock of the device that ops run on here."""
    return CudaClock() if torch.cuda.is_available() and not octavo.kernels.interpreted() else CpuClock()


def kernel_cases(ops: Sequence[str] | None = None, dtype: str | None = None) -> list[KernelCase]:
    """Return the bench cases of some ops (None: of all), in a dtype of their own or in another.

    Raises:
        ConfigError: there is no such op.
    """
    specs = load_specs()
    unknown = [op for op in ops or () if op not in specs]
    if unknown:
        raise ConfigError(f"--op is {unknown[0]!a}; allowed: {', '.join(specs)}")
    cases = [(spec, case) for spec in specs.values() for case in spec.cases if case.tier == "bench"]
    # What tests and compilation run of it needs no case of a real model's size.
    cases.append((specs["copy_blocks"], Case("llama-8b", _COPY, "bfloat16", "bench")))
    return [
        KernelCase(spec, case if dtype is None else dataclasses.replace(case, dtype=dtype))
        for spec, case in cases
        if ops is None or spec.name in ops
    ]


@dataclasses.dataclass(slots=True)
class Timed:
    """A case that was found right and is timed round by round."""

    one: KernelCase
    error_u: float
    call: Call
    rounds: list[list[float]] = dataclasses.field(default_factory=list)
    """Seconds of each run, by round."""


def prepare(one: KernelCase, clock: Clock) -> Timed:
    """Draw a case's inputs, check what comes of them, and make it ready to be timed.

    Raises:
        WrongResultError: it computes something else than the reference.
    """
    drawn = one.spec.make_inputs(one.case, generator("bench", one.case.name))
    inputs = {name: _moved(value, clock.device) for name, value in drawn.items()}
    error_u = check(one, inputs)
    return Timed(one, error_u, clock.ready(_planned(one, inputs)))


def kernel_result(timed: Timed) -> dict[str, Any]:
    """Return the figures of one case: the median of its rounds' medians, and what follows from the spec's counts."""
    medians = [statistics.median(seconds) for seconds in timed.rounds]
    ordered = sorted(second for seconds in timed.rounds for second in seconds)
    seconds, (spec, case) = statistics.median(medians), timed.one
    num_bytes, num_flops = spec.bytes(case), spec.flops(case)
    return {
        "op": spec.name,
        "case": case.name,
        "dtype": case.dtype,
        "us": seconds * 1e6,
        "us_p10": ordered[len(ordered) // 10] * 1e6,
        "us_p90": ordered[-1 - len(ordered) // 10] * 1e6,
        "bytes": num_bytes,
        "flops": num_flops,
        "gb_per_s": num_bytes / seconds / 1e9,
        "tflop_per_s": num_flops / seconds / 1e12,
        "error_u": timed.error_u,
        "num_runs": len(ordered),
        "round_us": [median * 1e6 for median in medians],
    }


def kernel_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of all cases."""
    width = max(len(_label(each)) for each in results) + 2
    lines = [f"{'op/case, dtype':<{width}}{'µs':>12}{'p10':>12}{'p90':>12}{'GB/s':>10}{'GFLOP/s':>11}{'error (u)':>11}"]
    for each in results:
        times = "".join(f"{each[key]:>12,.1f}" for key in ("us", "us_p10", "us_p90"))
        rates = f"{each['gb_per_s']:>10,.2f}{each['tflop_per_s'] * 1e3:>11,.1f}{each['error_u']:>11.2f}"
        lines.append(f"{_label(each):<{width}}{times}{rates}")
    return lines


def kernel_differences(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> tuple[list[Difference], list[str]]:
    """Compare the medians of rounds of every case; return the differences, and the cases that only the new run has."""
    before = {_label(each): each["round_us"] for each in old}
    found = {_label(each): each["round_us"] for each in new}
    shared = [of_repeats(f"{name}, µs", before[name], values) for name, values in found.items() if name in before]
    return shared, [name for name in found if name not in before]


def _label(result: Mapping[str, Any]) -> str:
    return f"{result['op']}/{result['case']}, {result['dtype']}"


def _moved(x: Any, device: torch.device) -> Any:
    """Return x with every tensor in it on the device, in dataclasses too."""
    if isinstance(x, Tensor):
        return x.to(device)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return type(x)(**{each.name: _moved(getattr(x, each.name), device) for each in dataclasses.fields(x)})
    return x


def _planned(one: KernelCase, inputs: dict[str, Any]) -> Call:
    """Return the call with its plan made, as a step makes one for all its layers."""
    op = getattr(octavo.kernels, one.spec.name)
    if one.spec.name == "write_kv":
        plan = octavo.kernels.plan_write_kv(
            inputs["slot_mapping"],
            positions=inputs["positions"],
            cos_sin=inputs.get("cos_sin"),
            rope_style=inputs["rope_style"],
            block_size=inputs["k_cache"].shape[2],
            num_kv_heads=inputs["k"].shape[1],
            dtype=inputs["q"].dtype,
        )
        return partial(op, **inputs, plan=plan)
    if one.spec.name not in ATTENTION:
        return partial(op, **inputs)
    seqs, (num_tokens, num_q_heads, head_dim) = one.case["seqs"], inputs["q"].shape
    kind: AttentionOp = "prefill" if one.spec.name == "paged_attention_prefill" else "decode"
    plan = octavo.kernels.plan_paged_attention(
        **{name: inputs[name] for name in STEP},
        op=kind,
        num_tokens=num_tokens,
        max_query_len=max(query_len for query_len, _ in seqs),
        num_q_heads=num_q_heads,
        num_kv_heads=inputs["k_cache"].shape[1],
        head_dim=head_dim,
        block_size=inputs["k_cache"].shape[2],
        max_splits=sum(-(-seq_len // SPLIT_TOKENS) for _, seq_len in seqs),
    )
    planned = {"worklist" if kind == "prefill" else "plan": plan}
    return partial(op, **inputs, **planned, out=torch.empty_like(inputs["q"]))
