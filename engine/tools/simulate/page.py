"""This module holds simulations as tables, for a terminal and as a page. It does not know how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report import Html, Page, duration, facts, line_chart, note, number, table
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
    ("Output tokens per second", "tokens/s", "output_throughput"),
    ("Requests per second within the objective", "requests/s", "request_goodput"),
    ("Time to first token, median", "ms", "median_ttft_ms"),
    ("Time to first token, 99th percentile", "ms", "p99_ttft_ms"),
    ("Time per output token, median", "ms", "median_tpot_ms"),
    ("Time between tokens, 99th percentile", "ms", "p99_itl_ms"),
    ("Preemptions", "", "num_preemptions"),
)
"""Title, unit, figure; one that is 0 or unknown everywhere is left out."""
MAX_RUNS = 6
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
        page.add("", *_sweep_charts(runs))
        page.add("All points", _table(runs))
    else:
        page.add("Figures", _table(runs), _times_table(runs[0]))
    last, places = len(runs) - 1, min(MAX_RUNS, len(runs)) - 1
    drawn = [runs[i * last // max(places, 1)] for i in range(places + 1)]
    page.add(
        "Over time", *([f"{len(drawn)} of {len(runs)} points."] if len(drawn) < len(runs) else []), *_courses(drawn)
    )
    page.add("Latencies", *_distributions(drawn))
    return page


def _table(runs: Sequence[Simulated]) -> Html:
    used = {title: each for title, each in COLUMNS.items() if any(run.result[each[0]] is not None for run in runs)}
    percent = [form.endswith("%}") for _, form in used.values()]
    titles = [f"{title} %" if is_part else title for title, is_part in zip(used, percent, strict=True)]
    rows = [
        [
            *([point_name(run.point)] if run.point else []),
            *(
                _rounded(run.result[key], 100.0 if is_part else 1.0)
                for (key, _), is_part in zip(used.values(), percent, strict=True)
            ),
        ]
        for run in runs
    ]
    return table([*(["settings"] if runs[0].point else []), *titles], rows, sortable=len(runs) > 1)


def _rounded(value: float | None, scale: float = 1.0) -> float | int | None:
    return value if value is None or isinstance(value, int) else float(f"{scale * value:.4g}")


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
    for title, unit, figure in CHARTS:
        lines: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            others = point_name({name: value for name, value in run.point.items() if name != across})
            x = run.point[across] if plain else values.index(run.point[across])
            lines.setdefault(others, []).append((x, run.result[figure] or 0))
        if any(y for points in lines.values() for _, y in points):
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
    """Return what part of requests, or tokens, took at most so long: of one run two times to a chart."""
    if len(runs) == 1:
        groups = [("Requests", ("ttft", "e2el")), ("Tokens", ("tpot", "itl"))]
        charts = [(title, {TIMES[name][1]: _quantiles(runs[0], name) for name in names}) for title, names in groups]
    else:
        charts = [
            (TIMES[name][1], {point_name(run.point): _quantiles(run, name) for run in runs})
            for name in ("ttft", "itl", "e2el")
        ]
    return [
        line_chart(
            {name: points for name, points in lines.items() if points},
            title=title,
            x_label="ms",
            y_label="% at most",
            log_x=all(x > 0 for points in lines.values() for x, _ in points),
        )
        for title, lines in charts
        if any(lines.values())
    ]


def _quantiles(run: Simulated, name: str) -> list[tuple[float, float]]:
    return [(ms, percent) for percent, ms in enumerate(run.result["quantiles_ms"].get(name, ()))]


def about_run(result: Mapping[str, Any]) -> dict[str, str]:
    """Return what the engine was set to, and what it ran, in words."""
    engine = result["engine"]
    tokens = engine["num_blocks"] * engine["block_size"]
    return {
        "KV pool": f"{tokens:,} tokens in {engine['num_blocks']:,} blocks of {engine['block_size']}",
        "a step": f"at most {engine['max_num_seqs']:,} sequences and {engine['max_num_batched_tokens']:,} tokens",
        "simulated": f"{number(result['completed'])} requests in {duration(result['duration'])}",
    }
