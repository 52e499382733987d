"""This module holds what `octavo verify` says on a terminal. It does not know how it was found out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..tools.verify import Finding, Report
    from ..tools.verify.comparison import LogitDifferences

__all__ = ["finding_lines", "report_lines", "verdict"]

_COLUMNS = (
    ("condition", 13),
    ("steps", 6),
    ("tokens", 7),
    ("preempted", 10),
    ("cached", 7),
    ("compared", 9),
    ("max |Δ|", 9),
    ("mean |Δ|", 9),
    ("mean KL", 9),
    ("top-1", 8),
    ("perplexity", 11),
    ("the ref's", 10),
)
_DETECTORS = {
    "weights": "weights, read back bit by bit",
    "metadata": "positions, slots and tables recomputed from token ids",
    "op": "inputs captured and replayed in float64",
    "layer": "hidden states against the reference's",
    "logits": "logits against the reference's",
}
MAX_MORE = 5


def report_lines(report: Report) -> Iterator[str]:
    """Yield what was run and how near it came, line by line."""
    num_tokens = sum(number for _, number in report.texts)
    mode = ", invariant" if report.invariant else ""
    if report.kv_cache_dtype != report.dtype:
        mode += f", keys and values in {report.kv_cache_dtype}: hidden states are not judged, logits by their mean KL"
    yield f"{report.model}: {report.dtype} on {report.device}, {report.backend} backend{mode}"
    yield f"against {report.reference}; {len(report.texts)} texts, {num_tokens:,} tokens, {report.seconds:.0f} s"
    yield ""
    yield _row([name for name, _ in _COLUMNS])
    for each in report.conditions:
        counts = (each.num_steps, each.num_tokens, each.num_preemptions, each.num_cached_tokens, len(each.logits))
        yield _row([each.name, *(f"{count:,}" for count in counts), *_figures(each.logits)])
    if report.eager is not None:
        blanks = [""] * 4
        yield _row([f"eager {report.dtype}"[:13], *blanks, f"{len(report.eager):,}", *_figures(report.eager)])
    yield "perplexities are of the positions compared: what was run twice counts twice, what was cached not at all"
    yield ""
    yield from _near_lines(report)


def _near_lines(report: Report) -> Iterator[str]:
    """Yield how near weights, hidden states and ops came to what is allowed."""
    if report.num_weights is not None:
        wrong = len({each.place for each in report.weights})
        equal = "all equal bit by bit" if not wrong else f"{wrong} differ"
        yield f"weights        {report.num_weights:,} projections and norms: {equal}"
    worst = [max(units) for units in zip(*(each.state_units for each in report.conditions), strict=True)]
    if worst:
        ratios = [found / limit for found, limit in zip(worst, report.state_limits, strict=True)]
        at = max(range(len(ratios)), key=ratios.__getitem__)
        eager = "" if report.eager_state_units is None else f", eager {report.eager_state_units[at]:.3g} u"
        name = report.state_names[at]
        yield f"hidden states  nearest to its limit: {name}, {worst[at]:.3g} u of {report.state_limits[at]:.3g}{eager}"
    num_replays = sum(each.num_replays for each in report.ops.values())
    yield f"ops            {num_replays:,} calls replayed in float64; the worst of each, in units of roundoff:"
    for name, each in report.ops.items():
        bounds = f"eager {each.eager_units:>8.3g}   allowed {each.limit_units:>8.3g}"
        yield f"  {name:<26} {each.worst_units:>9.3g}   {bounds}"
    if report.same_replay:
        yield "NOT INDEPENDENT, the replays of norms and write_kv alone: on the torch backend they run the same code"
    for name, why in report.shared.items():
        yield f"NOT INDEPENDENT, {name}: {why}"


def verdict(report: Report) -> str:
    """Return the outcome in one line."""
    first = report.first
    if first is None:
        return "PASS"
    return f"FAIL  first divergence: {first.place}"


def finding_lines(report: Report, command: Sequence[str]) -> Iterator[str]:
    """Yield what is known of the first divergence, and how to see it again.

    Args:
        report: one that has not passed.
        command: of this run, without what it was to look at.
    """
    first = report.first
    assert first is not None, "there is a divergence"
    yield f"  found by   {_DETECTORS[first.detector]}"
    if first.condition:
        where = f"condition {first.condition!r}, step {first.step}"
        yield f"  where      {where}, text {first.text!r}, position {first.position}"
    if first.error_units is not None:
        eager = "" if first.eager_units is None else f", where eager shows {first.eager_units:.3g} u"
        yield f"  size       {first.error_units:.4g} u of {report.dtype}{eager}"
    if first.margin is not None:
        yield f"  margin     {first.margin:.3g} between the reference's two likeliest tokens there"
    if first.message:
        yield f"  detail     {first.message.rstrip('; ')}"
    yield f"  repeat     {shlex.join([*command, *report.repeat(first)])}"
    others = [each for each in report.findings if each is not first]
    for each in others[:MAX_MORE]:
        yield f"  then       {_short(each)}"
    if len(others) > MAX_MORE:
        yield f"  then       {len(others) - MAX_MORE:,} more, in --json"


def _short(finding: Finding) -> str:
    if not finding.condition:
        return f"{finding.place} ({finding.detector})"
    where = f"under {finding.condition!r}, text {finding.text!r}, position {finding.position}"
    return f"{finding.place} {where} ({finding.detector})"


def _figures(found: LogitDifferences) -> list[str]:
    from ..tools.verify.report import perplexity

    if not len(found):
        return [""] * 6
    numbers = [f"{number:.2g}" for number in (found.max_diff.max(), found.mean_diff.mean(), found.kl.mean())]
    values = [f"{perplexity(nll):.4f}".replace("nan", "") for nll in (found.nll, found.nll_reference)]
    return [*numbers, f"{found.same_top.mean():.2%}", *values]


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    widths = [width for _, width in _COLUMNS]
    return f"{first:<{widths[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
