"""This module holds how runs beside earlier ones are shown. It does not know what makes a figure worse."""

from __future__ import annotations

from collections.abc import Sequence

from ..report import Cell, Html, Page, Series, details, duration, line_chart, note, number, table
from ..report.markup import Value
from .history import Finding, Run, Trend, machine_note

__all__ = ["add_history", "finding_lines"]

RULE = (
    "Marked: a time whose change since the run before, with 95 % confidence, is more than 5 %, and more than the "
    "machine itself has slowed down by (copies and a matrix product are timed in every run); the last run is compared "
    "with the first, too. Bands reach from the fastest to the slowest round."
)


def finding_lines(trends: Sequence[Trend], runs: Sequence[Run]) -> list[str]:
    """Return a line for each figure that has become worse in the last run."""
    return [
        f"worse: {finding.metric}: {_show(finding.old, trend)} in {finding.before}, {_show(finding.new, trend)} now"
        f"{_interval(finding)}"
        for trend in trends
        for finding in trend.findings
        if finding.at == len(runs) - 1
    ]


def add_history(page: Page, trends: Sequence[Trend], runs: Sequence[Run]) -> None:
    """Add the section on earlier runs: what is worse, then the trend of what is timed or has changed."""
    names = [run.name for run in runs]
    rows: list[list[Value | Cell]] = [
        [
            Cell(finding.metric, "bad"),
            names[finding.at],
            finding.before,
            _show(finding.old, trend),
            _show(finding.new, trend),
            f"{finding.new / finding.old - 1:+.1%}" if finding.old else "",
            _interval(finding).removeprefix(", "),
        ]
        for trend in trends
        for finding in trend.findings
    ]
    told = table(["figure", "worse in", "than in", "was", "is", "change", "95 % interval"], rows) if rows else None
    parts: list[Html] = [told or note("Nothing has become worse."), note(RULE)]
    if text := machine_note(runs):
        parts.append(note(text))
    parts += [_chart(trend, names) for trend in trends if trend.findings]
    others = [trend for trend in trends if not trend.findings and trend.moves]
    if others:
        parts.append(details(f"{len(others)} more figures", *(_chart(trend, names) for trend in others)))
    page.add("Beside earlier runs", *parts)


def _chart(trend: Trend, names: Sequence[str]) -> Html:
    factor = 1e6 if trend.unit == "s" else 1
    line = Series(
        trend.metric,
        [(at, factor * value) for at, value in trend.points],
        [(factor * low, factor * high) for low, high in trend.spread],
        trend.bad,
    )
    label = "µs" if trend.unit == "s" else trend.unit
    return line_chart([line], title=trend.metric, x_label="", y_label=label, x_names=names, from_zero=True)


def _show(value: float, trend: Trend) -> str:
    return duration(value) if trend.unit == "s" else number(value)


def _interval(finding: Finding) -> str:
    return "" if finding.low is None or finding.high is None else f", {finding.low:+.1%} to {finding.high:+.1%}"
