"""This module holds how a profile of steps is shown: a page, and a table for a terminal. It does not know how anything
was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..report import Cell, Page, bars, duration, facts, line_chart, note, number, table
from .history import Run, Trend
from .history_part import add_history
from .probes import PARTS

__all__ = ["part_table", "step_page"]

Document = Mapping[str, Any]

PHASES: Final = {
    "scheduling": ("schedule", "update"),
    "inputs": ("gather", "plan"),
    "projections": ("qkv", "o", "up", "down"),
    "attention": ("attention of prompts", "attention of decodes", "write_kv"),
    "norms, activation": ("norm", "activation"),
    "head, sampling": ("head", "sample", "log_softmax_top"),
    "text": ("text",),
    "gaps": ("between", "rest"),
}
"""What the bars are made of: as many as there are colours."""


def step_page(document: Document, trends: Sequence[Trend], runs: Sequence[Run]) -> str:
    """Return the page; `trends` and `runs` are those of its history."""
    about, load, groups = document["about"], document["about"]["load"], document["groups"]
    page = Page(f"Steps of {about['model']}", f"{document['machine']['device']}; {document['date']}")
    told: dict[str, str | int] = {
        "backend, dtype": f"{about['backend']}, {about['dtype']}",
        "prompts, answers": f"{load['input_len']:,}, {load['output_len']:,} tokens",
        "steps timed": len(document["steps"]),
    }
    page.add("", facts(told | {each["name"]: f"{number(float(each['tokens_per_s']))} tokens/s" for each in groups}))
    stacks = {f"{each['name']} ({each['num_steps']} steps)": _phases(each) for each in groups}
    gaps = "Gaps are what no part accounts for: the Python, views and embeddings between them. Own times: they add up."
    if document["device_busy"] is not None:
        gaps += f" Under the profiler the GPU was busy {document['device_busy']:.1%} of the time."
    page.add("Where a step goes", bars(stacks, parts=list(PHASES), show=duration, fill=True), note(gaps))
    cost = f"The stopwatch costs {duration(document['span_s'])} each time, {_overhead(document):.1%} of a step at most."
    page.add("By part", table(*part_table(document)), note(cost))
    series: dict[str, list[tuple[float, float]]] = {}
    for step in document["steps"]:
        if step["round"] == document["steps"][-1]["round"]:
            line = series.setdefault(f"batch of {step['batch_size']}", [])
            line.append((len(line) + 1, step["seconds"] * 1e3))
    page.add("The last round, step by step", line_chart(series, x_label="step", y_label="ms", from_zero=True))
    if len(runs) > 1:
        add_history(page, trends, runs)
    return page.html()


def part_table(document: Document) -> tuple[list[str], list[list[Cell]]]:
    """Return the columns and rows of what each part takes of a step, by kind of step."""
    groups = document["groups"]
    rows = [[Cell("a step"), *(Cell(duration(each["seconds"]), small="100.0%") for each in groups)]]
    for name in dict.fromkeys([*PARTS, *(name for each in groups for name in each["parts"])]):
        calls = max((each["parts"][name]["num_calls"] for each in groups if name in each["parts"]), default=0)
        if calls:
            small = f"{PARTS.get(name, 'an op')}; {calls:.0f} call{'s' if round(calls) != 1 else ''}"
            rows.append([Cell(name, small=small), *(_part_cell(each, name) for each in groups)])
    return ["part", *(each["name"] for each in groups)], rows


def _part_cell(group: Mapping[str, Any], name: str) -> Cell:
    if (part := group["parts"].get(name)) is None:
        return Cell(None)
    share = part["seconds"] / group["seconds"]
    on_device = f", {duration(part['device_s'])} on the device" if part["device_s"] else ""
    return Cell(duration(part["seconds"]), small=f"{share:.1%}{on_device}", share=share)


def _phases(group: Mapping[str, Any]) -> list[float]:
    """Return the seconds of each phase; an op that is in none counts as a gap."""
    seconds = {name: part["seconds"] for name, part in group["parts"].items()}
    found = [sum(seconds.pop(name, 0.0) for name in names) for names in PHASES.values()]
    found[-1] += sum(seconds.values())
    return found


def _overhead(document: Document) -> float:
    calls = ((each, sum(part["num_calls"] for part in each["parts"].values())) for each in document["groups"])
    return float(max(num_calls * document["span_s"] / each["seconds"] for each, num_calls in calls))
