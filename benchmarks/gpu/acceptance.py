"""This module holds which figures the project wants to reach on a GPU, and whether a run's results do. It does not know
how anything is measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

__all__ = ["MET", "NOT_MEASURED", "NOT_MET", "Verdict", "judge"]

MET: Final = "met"
NOT_MET: Final = "NOT MET"
NOT_MEASURED: Final = "not measured"

MIN_KV_BYTES: Final = 200e6
"""Below, decode attention is bound by its launch."""
COPY_FRACTION: Final = 0.85
PREFILL: Final = (("prefill/8192", 350.0), ("prefill/2048-over-30720", 430.0))
"""TFLOP/s, causal: a whole prompt, and a chunk behind a long prefix."""
STEP_MODEL: Final = "llama-3.1-8b"
STEP_BATCHES: Final = (1, 64, 256)
STEP_FRACTION: Final = 0.8
SPEEDUP: Final = 1.5
OURS: Final = "octavo"
PLAIN: Final = re.compile(r"(\d+x)?\d+(-over-\d+)?")
"""Cases of attention that are sequences alone: 64x4096, or 2048-over-30720, a chunk behind a prefix."""
TOLERANCE: Final = 1.02
"""Times within two percent of each other are equal: so far apart are the medians of the same kernel twice."""

Cases = Mapping[str, Mapping[str, Any]]


class Verdict(NamedTuple):
    """One figure."""

    figure: str
    wanted: str
    found: str
    status: str
    where: str = ""
    """The case that decides."""


def judge(data: Mapping[str, Any]) -> list[Verdict]:
    """Return every figure with what a run found: the worst of the cases it is wanted of decides."""
    sections: dict[str, Cases] = {
        name: {case: facts for case, facts in part["cases"].items() if facts.get("status") in ("measured", "failed")}
        for name, part in data["sections"].items()
    }
    bench, steps = sections.get("bench", {}), sections.get("step", {})
    return [
        _decode(bench),
        *(_prefill(bench, case, wanted) for case, wanted in PREFILL),
        *(_peers(bench, kind) for kind in ("decode", "prefill")),
        *(_step(steps, batch_size) for batch_size in STEP_BATCHES),
        _throughput(sections.get("engines", {})),
    ]


def _lowest(figure: str, wanted: str, found: Iterable[tuple[float, str]], least: float, text: str) -> Verdict:
    """Return the verdict on the lowest of some values, each with its case."""
    value, where = min(found, default=(None, ""))
    if value is None:
        return Verdict(figure, wanted, "", NOT_MEASURED)
    return Verdict(figure, wanted, text.format(value), MET if value >= least else NOT_MET, where)


def _is_plain(case: str) -> bool:
    """Whether a case of attention has our default shape: no window, other block size or head."""
    return PLAIN.fullmatch(case.partition("/")[2]) is not None


def _decode(bench: Cases) -> Verdict:
    found = [
        (facts["fraction"], case)
        for case, facts in bench.items()
        if case.startswith("decode/")
        and _is_plain(case)
        and facts.get("bytes", 0) >= MIN_KV_BYTES
        and "fraction" in facts
    ]
    wanted = f"at least {COPY_FRACTION:.0%} of the copy bandwidth, from {MIN_KV_BYTES / 1e6:.0f} MB of KV"
    return _lowest("decode attention", wanted, found, COPY_FRACTION, "{:.1%}")


def _prefill(bench: Cases, case: str, wanted: float) -> Verdict:
    found = [(bench[case]["tflop_per_s"], case)] if "tflop_per_s" in bench.get(case, {}) else []
    figure = f"prefill attention, {case.partition('/')[2]}"
    return _lowest(figure, f"at least {wanted:.0f} TFLOP/s", found, wanted, "{:.0f} TFLOP/s")


def _peers(bench: Cases, kind: str) -> Verdict:
    """Return how the cases of attention compare with the quickest library beside each."""
    found: list[tuple[float, str]] = []
    for case, facts in bench.items():
        others = {name: one["us"] for name, one in facts.get("beside", {}).items() if "us" in one and OURS not in name}
        if case.startswith(f"{kind}/") and _is_plain(case) and others:
            quickest = min(others, key=others.__getitem__)
            found.append((others[quickest] / facts["us"], f"{case}, {quickest}"))
    wanted = "no slower than the quickest library beside it"
    return _lowest(f"{kind} attention, peers", wanted, found, 1 / TOLERANCE, "{:.2f} times its speed")


def _step(steps: Cases, batch_size: int) -> Verdict:
    """Return the worst context of the best way to run the engine at each."""
    best: dict[str, tuple[float, str]] = {}
    for case, facts in steps.items():
        model, size, *_ = case.split("/")
        if model == STEP_MODEL and size.startswith(f"{batch_size}x") and "fraction" in facts:
            best[size] = max(best.get(size, (0.0, "")), (facts["fraction"], case))
    figure = f"decode step, {STEP_MODEL}, batch {batch_size}"
    return _lowest(figure, f"at least {STEP_FRACTION:.0%} of its floor", best.values(), STEP_FRACTION, "{:.1%}")


def _ratios(engines: Cases) -> Iterator[tuple[float, str]]:
    for case, facts in engines.items():
        peer = facts.get("beside", {}).get("transformers_batching", {})
        if case.endswith("/offline") and "ratio" in peer:
            yield peer["ratio"], f"{case}, its attention: {peer.get('about', {}).get('attention', '?')}"


def _throughput(engines: Cases) -> Verdict:
    wanted = f"at least {SPEEDUP} times transformers' continuous batching"
    return _lowest("throughput", wanted, _ratios(engines), SPEEDUP, "{:.2f} times")
