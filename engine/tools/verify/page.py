"""This module holds the page of a verification: the verdict, each position and each layer. It does not know how it was
found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..report import Cell, Html, Page, Series, details, facts, line_chart, note, table
from ..report.markup import Value, tag
from .comparison import LogitDifferences
from .report import Finding, Report, perplexity

__all__ = ["verify_page"]

FloatArray = npt.NDArray[np.float64]
Number = Callable[[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]], npt.NDArray[np.integer[Any]]]
"""(texts, positions) -> where they are among all that were compared."""
_SMALLEST = 1e-18
"""Nothing at all is drawn here, where an axis is logarithmic."""
MAX_FINDINGS = 8
_GUIDE = (
    "Each text runs through the engine's own scheduler and runner under every condition, and every token is forced to "
    "be the text's own, so that all positions can be compared. The reference runs each text whole. |Δ| is the "
    "difference of a logit, KL the Kullback-Leibler divergence of the engine's distribution from the reference's, in "
    "nats.",
    "Eager is the reference's plain code in the engine's dtype: what rounding alone does. An error of a hidden state "
    "or of an op is the largest difference of a row over the row's largest number, in units of roundoff u of that "
    "dtype.",
    "Three detectors say where two sides part. Metadata: positions, slots and block tables recomputed from token ids. "
    "Layer: hidden states against the reference's. Op: inputs captured and replayed in float64, with the reference's "
    "parameters; the first step of each kind, and, where something differs, every step up to there.",
)


def verify_page(report: Report) -> str:
    """Return the page: one file with nothing from elsewhere."""
    page = Page(f"octavo verify {report.model}", f"{report.dtype} on {report.device}, {report.backend} backend")
    verdict = tag("p", "PASS: nothing diverges", "good")
    if report.first is not None:
        verdict = tag("p", f"FAIL: {report.first.place} diverges first", "bad")
    page.add("", verdict, facts(_facts(report)), *_independence(report))
    if report.findings:
        more = len(report.findings) - MAX_FINDINGS
        page.add("Divergences", _findings(report.findings), *([note(f"{more:,} more follow.")] if more > 0 else []))
    page.add("Under each condition", _conditions(report))
    numbers, starts = _numbers(report)
    page.add(
        "Position by position",
        _by_position(report, numbers, "max_diff", "largest |Δ| of a logit"),
        _by_position(report, numbers, "kl", "KL, nats"),
        note(f"Positions of all texts, one after the other: {_spans(starts)}."),
    )
    page.add("Layer by layer", _by_layer(report))
    page.add("Ops, replayed in float64", _ops(report))
    page.add("Text by text", _texts(report), details("How to read it", *_GUIDE))
    return page.html()


def _facts(report: Report) -> dict[str, str]:
    weights = "not compared: the same loader" if report.num_weights is None else f"{report.num_weights:,} compared"
    return {
        "reference": report.reference,
        "texts": f"{len(report.texts)}, {sum(number for _, number in report.texts):,} tokens",
        "conditions": str(len(report.conditions)),
        "positions compared": f"{sum(len(each.logits) for each in report.conditions):,}",
        "projections and norms": weights,
        "time": f"{report.seconds:.0f} s",
    }


def _independence(report: Report) -> list[Html]:
    lines = [f"NOT INDEPENDENT, {name}: {why}." for name, why in report.shared.items()]
    if report.same_replay:
        lines.append(
            "NOT INDEPENDENT, the replays of norms and write_kv alone: on the torch backend they run the same code."
        )
    return [note(line) for line in lines]


def _findings(findings: Sequence[Finding]) -> Html:
    rows = [
        (
            Cell(each.place, "bad" if at == 0 else "", each.message.rstrip("; ")),
            each.detector,
            each.condition,
            each.step,
            each.text,
            each.position,
            each.error_units,
            each.eager_units,
            each.margin,
        )
        for at, each in enumerate(findings[:MAX_FINDINGS])
    ]
    names = ("what", "detector", "condition", "step", "text", "position", "error, u", "eager, u", "margin")
    return table(names, rows)


def _conditions(report: Report) -> Html:
    rows: list[Sequence[Value | Cell]] = [
        (
            Cell(each.name, "bad" if each.findings else "", each.meaning),
            each.num_steps,
            each.num_tokens,
            each.num_preemptions,
            each.num_cached_tokens,
            *_figures(each.logits),
        )
        for each in report.conditions
    ]
    if report.eager is not None:
        small = "the reference's code in the engine's dtype, each text whole"
        rows.append((Cell(f"eager {report.dtype}", "soft", small), *[None] * 4, *_figures(report.eager)))
    names = ("condition", "steps", "tokens", "preempted", "from cache", "positions", "largest |Δ|", "mean |Δ|")
    return table((*names, "mean KL", "top-1", "perplexity", "the reference's"), rows)


def _figures(found: LogitDifferences) -> tuple[Value | Cell, ...]:
    if not len(found):
        return (0, *[None] * 6)
    numbers = (float(found.max_diff.max()), float(found.mean_diff.mean()), float(found.kl.mean()))
    return (len(found), *numbers, f"{found.same_top.mean():.2%}", *_perplexities(found.nll, found.nll_reference))


def _perplexities(*nlls: FloatArray) -> list[Cell | None]:
    known = [perplexity(nll) for nll in nlls]
    return [Cell(f"{value:.4f}", sort=value) if np.isfinite(value) else None for value in known]


def _numbers(report: Report) -> tuple[Number, dict[str, int]]:
    """Return how the positions of all compared texts are numbered through, and where each text begins."""
    compared = sorted({int(text) for each in report.conditions for text in np.unique(each.texts)})
    starts, at = np.zeros(len(report.texts), dtype=np.int64), 0
    for text in compared:
        starts[text], at = at, at + report.texts[text][1]
    return lambda texts, positions: starts[texts] + positions, {report.texts[i][0]: int(starts[i]) for i in compared}


def _spans(starts: dict[str, int]) -> str:
    return ", ".join(f"{name} from {start}" for name, start in starts.items())


def _by_position(report: Report, number: Number, column: str, label: str) -> Html:
    """Return the worst of all conditions at each position, and eager."""
    worst: dict[int, float] = {}
    for each in report.conditions:
        values = np.nan_to_num(getattr(each.logits, column), nan=np.inf)
        for at, value in zip(number(each.texts, each.positions), values.tolist(), strict=True):
            worst[int(at)] = max(worst.get(int(at), 0.0), value)
    series = [Series(f"octavo, {report.dtype}: the worst condition", list(_points(sorted(worst.items()))))]
    if report.eager is not None:
        series.append(
            Series(f"eager, {report.dtype}", list(_points(enumerate(getattr(report.eager, column).tolist()))))
        )
    return line_chart(series, title=label, x_label="position", y_label=label, log_y=True)


def _points(values: Iterable[tuple[int, float]]) -> Iterator[tuple[float, float]]:
    for at, value in values:
        if np.isfinite(value):
            yield float(at), max(value, _SMALLEST)


def _by_layer(report: Report) -> Html:
    """Return the worst error of each hidden state."""
    known: dict[str, FloatArray] = {}
    if report.conditions:
        known[f"octavo, {report.dtype}"] = np.max([each.state_units for each in report.conditions], axis=0)
    if report.eager_state_units is not None:
        known[f"eager, {report.dtype}"] = report.eager_state_units
    known["allowed"] = report.state_limits
    series = [
        Series(name, [(float(i), value) for i, value in enumerate(values.tolist()) if 0 < value < np.inf])
        for name, values in known.items()
    ]
    return line_chart(
        series,
        title="Hidden states: the worst row, in units of roundoff",
        x_label="after",
        y_label="u",
        log_y=True,
        x_names=[name.removeprefix("layer ") for name in report.state_names],
    )


def _ops(report: Report) -> Html:
    rows = [
        (
            name,
            each.num_replays,
            Cell(each.worst_units, share=min(1.0, each.worst_units / max(each.limit_units, 1e-9))),
            each.eager_units,
            each.limit_units,
        )
        for name, each in report.ops.items()
    ]
    return table(("op", "replays", "worst error, u", "eager there, u", "allowed there, u"), rows)


def _texts(report: Report) -> Html:
    rows: list[Sequence[Value | Cell]] = []
    for index, (name, num_tokens) in enumerate(report.texts):
        parts = [(each.logits, each.texts == index) for each in report.conditions]
        chosen = [(found, rows_) for found, rows_ in parts if rows_.any()]
        if not chosen:
            rows.append((name, num_tokens, *[None] * 4))
            continue
        largest = max(float(found.max_diff[at].max()) for found, at in chosen)
        kl = max(float(found.kl[at].max()) for found, at in chosen)
        found, at = chosen[0]
        rows.append((name, num_tokens, largest, kl, *_perplexities(found.nll[at], found.nll_reference[at])))
    return table(("text", "tokens", "largest |Δ|", "largest KL", "perplexity", "the reference's"), rows)
