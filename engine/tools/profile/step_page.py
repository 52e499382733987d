"""This module holds how a profile of steps is shown: a page, and a table for a terminal. It does not know how anything
was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report import Cell, Page, Point, bars, duration, facts, note, number, quantity, scatter, table
from .history import Run, Trend
from .history_part import add_history
from .probes import PARTS

__all__ = ["step_lines", "step_page"]

Document = Mapping[str, Any]

PHASES = {
    "scheduling": ("schedule", "update"),
    "inputs": ("gather", "plan"),
    "projections": ("qkv", "o", "up", "down"),
    "attention": ("attention of prompts", "attention of decodes", "write_kv"),
    "norms, activation": ("norm", "activation"),
    "head, sampling": ("head", "sample", "log_softmax_top"),
    "text": ("text",),
    "gaps": ("between", "rest"),
}
"""What the bars are made of: at most as many as there are colours."""


def step_page(document: Document, trends: Sequence[Trend], runs: Sequence[Run]) -> str:
    """Return the page; `trends` and `runs` are those of its history."""
    about, load, machine = document["about"], document["about"]["load"], document["machine"]
    page = Page(f"Steps of {about['model']}", f"{machine['device']}; {document['date']}")
    told = {
        "backend, dtype": f"{about['backend']}, {about['dtype']}",
        "prompts": f"{load['input_len']:,} tokens",
        "answers": f"{load['output_len']:,} tokens",
        "batches": ", ".join(map(str, load["batch_sizes"])),
        "steps timed": len(document["steps"]),
        "threads": machine["num_threads"],
    }
    told |= {each["name"]: f"{number(float(each['tokens_per_s']))} tokens/s" for each in document["groups"]}
    page.add("", facts(told))
    groups, on_device = document["groups"], about["device"] != "cpu"
    stacks = {f"{each['name']} ({each['num_steps']} steps)": _phases(each) for each in groups}
    page.add("Where a step goes", bars(stacks, parts=list(PHASES), show=duration, fill=True), note(_gaps(document)))
    page.add("By part", table(*_table(groups, on_device=on_device)), note(_cost(document)))
    points = [
        Point(f"{each['kind']}, {each['num_seqs']} sequences", each["kind"], each["num_tokens"], each["seconds"] * 1e3)
        for each in document["steps"]
    ]
    page.add("Every step", scatter(points, x_label="tokens in the step", y_label="ms", log_x=True, log_y=True))
    if document["torch_ops"]:
        rows = [
            [each["name"], each["calls"], Cell(duration(each["seconds"]), sort=each["seconds"])]
            for each in document["torch_ops"]
        ]
        text = "One more round under torch's profiler, which slows every operation down: own time on the host."
        page.add("What torch did meanwhile", note(text), table(["operation", "calls", "own time"], rows, sortable=True))
    if len(runs) > 1:
        add_history(page, trends, runs)
    return page.html()


def _phases(group: Mapping[str, Any]) -> list[float]:
    """Return the seconds of each phase; an op that is in none counts as a gap."""
    seconds = {name: part["seconds"] for name, part in group["parts"].items()}
    found = [sum(seconds.pop(name, 0.0) for name in names) for names in PHASES.values()]
    found[-1] += sum(seconds.values())
    return found


def _gaps(document: Document) -> str:
    text = "Gaps are what no part accounts for: the Python, views and embeddings between them. Own times: they add up."
    if document["device_busy"] is not None:
        text += f" Under the profiler the GPU was busy {document['device_busy']:.1%} of the time."
    return text


def _cost(document: Document) -> str:
    worst = max(
        sum(part["num_calls"] for part in each["parts"].values()) * document["span_s"] / each["seconds"]
        for each in document["groups"]
    )
    return f"The stopwatch costs {duration(document['span_s'])} each time, {worst:.1%} of a step at most."


def _table(groups: Sequence[Mapping[str, Any]], *, on_device: bool) -> tuple[list[str], list[list[Cell]]]:
    names = dict.fromkeys([*PARTS, *(name for each in groups for name in each["parts"])])
    rows = [
        [Cell(name, small=PARTS.get(name, "op")), *(_part_cell(each, name, on_device=on_device) for each in groups)]
        for name in names
        if any(name in each["parts"] for each in groups)
    ]
    return ["part", *(each["name"] for each in groups)], rows


def _part_cell(group: Mapping[str, Any], name: str, *, on_device: bool) -> Cell:
    part = group["parts"].get(name)
    if part is None:
        return Cell(None)
    share, calls = part["seconds"] / group["seconds"], part["num_calls"]
    small = f"{share:.1%}, {calls:.0f} call{'s' if round(calls) != 1 else ''}"
    if on_device:
        small += f", {duration(part['device_s'])} on the device"
    return Cell(duration(part["seconds"]), small=small, share=share)


def step_lines(document: Document) -> list[str]:
    """Return where each kind of step goes, as a table of text."""
    groups = document["groups"]
    width = max([len(name) for each in groups for name in each["parts"]], default=0) + 2
    columns = [max(len(each["name"]), 19) + 2 for each in groups]
    lines = ["".ljust(width) + "".join(each["name"].rjust(room) for each, room in zip(groups, columns, strict=True))]
    totals = ((duration(each["seconds"]), room) for each, room in zip(groups, columns, strict=True))
    lines.append("a step".ljust(width) + "".join(f"{text} 100.0%".rjust(room) for text, room in totals))
    for name in dict.fromkeys([*PARTS, *(name for each in groups for name in each["parts"])]):
        cells = []
        for each, room in zip(groups, columns, strict=True):
            part = each["parts"].get(name)
            text = f"{duration(part['seconds'])} {part['seconds'] / each['seconds']:>6.1%}" if part else ""
            cells.append(text.rjust(room))
        if any(cell.strip() for cell in cells):
            lines.append(name.ljust(width) + "".join(cells))
    rates = ((f"{quantity(each['tokens_per_s'])} tokens/s", room) for each, room in zip(groups, columns, strict=True))
    return [*lines, "".ljust(width) + "".join(text.rjust(room) for text, room in rates)]
