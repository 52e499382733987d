"""This module holds simulations as tables, for a terminal and as a page. It does not know how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report import Html, Page, Series, duration, facts, line_chart, note, number, table
from .figures import TIMES
from .sweep import Simulated

__all__ = ["point_name", "simulation_page", "sweep_lines"]

COLUMNS: Mapping[str, tuple[str, str]] = {
    "req/s": ("request_throughput", "{:,.2f}"),
    "good/s": ("request_goodput", "{:,.2f}"),
    "output tok/s": ("output_throughput", "{:,.0f}"),
    "TTFT ms": ("median_ttft_ms", "{:,.0f}"),
    "TTFT p99": ("p99_ttft_ms", "{:,.0f}"),
    "TPOT ms": ("median_tpot_ms", "{:,.1f}"),
    "ITL p99": ("p99_itl_ms", "{:,.1f}"),
    "rows": ("mean_batch", "{:,.1f}"),
    "peak KV": ("peak_kv_usage", "{:.0%}"),
    "preempted": ("num_preemptions", "{:,}"),
    "prefix hits": ("prefix_hit_rate", "{:.0%}"),
}
CHARTS = (
    ("Output tokens per second", "tokens/s", ("output_throughput",)),
    ("Requests per second", "requests/s", ("request_throughput", "request_goodput")),
    ("Time to first token", "ms", ("median_ttft_ms", "p99_ttft_ms")),
    ("Time per output token", "ms", ("median_tpot_ms", "p99_tpot_ms")),
    ("Preemptions", "", ("num_preemptions",)),
)
"""Title, unit, figures; one that is 0 or unknown everywhere is left out."""
NAMES = {
    "request_throughput": "all",
    "request_goodput": "within the objective",
    "median_ttft_ms": "median",
    "p99_ttft_ms": "99th percentile",
    "median_tpot_ms": "median",
    "p99_tpot_ms": "99th percentile",
}
MAX_RUNS = 8
"""Whose time courses are drawn."""


def point_name(point: Mapping[str, Any]) -> str:
    """Return the settings of a point in one line."""
    return ", ".join(f"{name}={_text(value)}" for name, value in point.items())


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def sweep_lines(runs: Sequence[Simulated]) -> list[str]:
    """Return a table with a line for each point, as wide as it needs to be."""
    used = {title: each for title, each in COLUMNS.items() if any(run.result[each[0]] is not None for run in runs)}
    rows = [[*runs[0].point, *used]]
    for point, result in runs:
        told = [form.format(result[key]) if result[key] is not None else "-" for key, form in used.values()]
        rows.append([*map(_text, point.values()), *told])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def simulation_page(about: Mapping[str, Any], runs: Sequence[Simulated], notes: Sequence[str]) -> Page:
    """Return the report of one simulation or a sweep.

    Args:
        about: what all of them have in common, by name.
        runs: at least one.
        notes: what is to be kept in mind.
    """
    page = Page(
        "octavo simulate", "Computed by the engine's scheduler on a model of how long steps take; not measured."
    )
    page.add("", facts(about), *map(note, notes))
    if len(runs) > 1:
        page.add("All points", _table(runs), *_sweep_charts(runs))
    else:
        page.add("Figures", _table(runs), _times_table(runs[0]))
    page.add("Over time", *_courses(runs[:MAX_RUNS]))
    page.add("Latencies", *_distributions(runs[:MAX_RUNS]))
    if len(runs) > MAX_RUNS:
        page.add("", f"The first {MAX_RUNS} of {len(runs)} points are drawn.")
    return page


def _table(runs: Sequence[Simulated]) -> Html:
    used = {title: key for title, (key, _) in COLUMNS.items() if any(run.result[key] is not None for run in runs)}
    rows = [
        [*(_text(each) for each in run.point.values()), *(_rounded(run.result[key]) for key in used.values())]
        for run in runs
    ]
    return table([*runs[0].point, *used], rows, sortable=len(runs) > 1)


def _rounded(value: float | None) -> float | int | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.4g}")


def _times_table(run: Simulated) -> Html:
    statistics = ("mean", "median", "p90", "p99")
    rows = [
        [title, *(_rounded(run.result[f"{each}_{name}_ms"]) for each in statistics)]
        for name, (_, title) in TIMES.items()
        if run.result[f"mean_{name}_ms"] is not None
    ]
    return table(["ms", *statistics], rows)


def _sweep_charts(runs: Sequence[Simulated]) -> list[Html]:
    """Return a chart of each figure over the setting with most values, a line for each choice of the others."""
    names = list(runs[0].point)
    across = max(names, key=lambda name: len({_text(run.point[name]) for run in runs}))
    values = list(dict.fromkeys(run.point[across] for run in runs))
    plain = all(isinstance(value, int | float) and not isinstance(value, bool) and value < 1e12 for value in values)
    log = plain and min(values) > 0 and max(values) > 8 * min(values)
    charts = []
    for title, unit, figures in CHARTS:
        lines: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            others = point_name({name: value for name, value in run.point.items() if name != across})
            for figure in figures:
                if run.result[figure]:
                    x = run.point[across] if plain else values.index(run.point[across])
                    name = ", ".join(filter(None, (others, NAMES.get(figure, ""))))
                    lines.setdefault(name, []).append((x, run.result[figure]))
        if lines:
            charts.append(
                line_chart(
                    {name: sorted(points) for name, points in lines.items()},
                    title=title,
                    x_label=across,
                    y_label=unit,
                    log_x=log,
                    x_names=None if plain else [_text(value) for value in values],
                )
            )
    return charts


def _courses(runs: Sequence[Simulated]) -> list[Html]:
    """Return what the engine held over time: of one run all of it in two charts, of several one chart for each."""
    parts = [("kv_usage", "KV blocks in use", "%", 100.0)]
    if len(runs) == 1:
        rows = {name: _course(runs[0], name, 1.0) for name in ("running", "waiting")}
        chart = line_chart(rows, title="Requests in the engine", x_label="s", y_label="requests")
        return [chart, *(_chart_of(runs, *each) for each in parts)]
    return [_chart_of(runs, *each) for each in (("waiting", "Requests in the queue", "requests", 1.0), *parts)]


def _chart_of(runs: Sequence[Simulated], name: str, title: str, unit: str, scale: float) -> Html:
    lines = {point_name(run.point): _course(run, name, scale) for run in runs}
    return line_chart(lines, title=title, x_label="s", y_label=unit)


def _course(run: Simulated, name: str, scale: float) -> list[tuple[float, float]]:
    timeline = run.result["timeline"]
    return [(x, scale * y) for x, y in zip(timeline["time_s"], timeline[name], strict=True)]


def _distributions(runs: Sequence[Simulated]) -> list[Html]:
    """Return how many requests, or tokens, had to wait at most so long."""
    charts = []
    for name, (_, title) in TIMES.items():
        lines = [
            Series(
                point_name(run.point), [(ms, percent) for percent, ms in enumerate(run.result["quantiles_ms"][name])]
            )
            for run in runs
            if name in run.result["quantiles_ms"]
        ]
        log = all(x > 0 for line in lines for x, _ in line.points)
        if lines and any(x for line in lines for x, _ in line.points):
            charts.append(line_chart(lines, title=title, x_label="ms", y_label="% at most", log_x=log))
    return charts


def about_run(result: Mapping[str, Any]) -> dict[str, str]:
    """Return what the engine was set to, and what it ran, in words."""
    engine = result["engine"]
    tokens = engine["num_blocks"] * engine["block_size"]
    return {
        "KV pool": f"{tokens:,} tokens in {engine['num_blocks']:,} blocks of {engine['block_size']}",
        "a step": f"at most {engine['max_num_seqs']:,} sequences and {engine['max_num_batched_tokens']:,} tokens",
        "simulated": f"{number(result['completed'])} requests in {duration(result['duration'])}",
    }
