"""This module shows whole engines on a run's page: verdicts, steps beside their floors, engines beside others. It does
not know how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from .acceptance import MET, judge

__all__ = ["engine_parts", "steps_table", "verdict_lines"]

Data = Mapping[str, Any]
Cases = Mapping[str, Mapping[str, Any]]


def _cases(data: Data, section: str) -> Cases:
    cases: Cases = data["sections"].get(section, {}).get("cases", {})
    return cases


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def cell(value: object) -> str:
        kind = " class='n'" if isinstance(value, int | float) else ""
        return f"<td{kind}>{'' if value is None else escape(str(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def verdict_lines(data: Data) -> list[str]:
    """Return a line for each figure that is wanted, for a terminal."""
    return [
        f"{verdict.status:<13}{verdict.figure}: {verdict.wanted}"
        + (f"; found {verdict.found} ({verdict.where})" if verdict.found else "")
        for verdict in judge(data)
    ]


def _verdicts(data: Data) -> str:
    rows = "".join(
        f"<tr><td class='{'bad' if verdict.found and verdict.status != MET else ''}'>{escape(verdict.status)}</td>"
        + "".join(f"<td>{escape(text)}</td>" for text in (verdict.figure, verdict.wanted, verdict.found, verdict.where))
        + "</tr>"
        for verdict in judge(data)
    )
    head = "".join(f"<th>{name}</th>" for name in ("", "figure", "wanted", "found", "decided by"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def steps_table(cases: Cases) -> list[tuple[object, ...]]:
    """Return (case, microseconds, floor, part of it that is floor, new tokens per second) of the steps timed."""
    return [
        (case, facts["us"], facts.get("floor_us"), f"{facts['fraction']:.0%}" if "fraction" in facts else None, rate)
        for case, facts in cases.items()
        if (rate := facts.get("tokens_per_s")) is not None
    ]


def _bars(case: str, facts: Mapping[str, Any]) -> str:
    """Return a step's parts as bars, the floor of each within what it took; the largest loss first."""
    parts = [part for part in facts["parts"] if part["us"] > 0]
    longest = max((part["us"] for part in parts), default=1.0)
    rows = []
    for part in parts:
        share = min(1.0, part["floor_us"] / part["us"])
        width = 100 * part["us"] / longest
        rows.append(f"<span>{escape(part['part'])}</span>")
        rows.append(f'<span class="n">{part["us"]:.1f} µs</span>')
        title = f"floor {part['floor_us']:.1f} µs of {part['us']:.1f} µs"
        rows.append(
            f"<i title='{title}' style='width:{width:.1f}%;background:linear-gradient(to right,"
            f"var(--ours) {100 * share:.1f}%,var(--bar) {100 * share:.1f}%)'></i>"
        )
    by = "moments on the device" if facts.get("by") == "device" else "the host's clock"
    about = f"{escape(case)}: {facts['us']:.0f} µs, by {by}; dark is the floor, light is lost"
    return f'<h3>{about}</h3><div class="bars">{"".join(rows)}</div>'


def _engines(cases: Cases) -> str:
    rows: list[tuple[object, ...]] = []
    for case, facts in cases.items():
        if "beside" not in facts:
            rows.append((case, "", facts["status"], *[None] * 7, str(facts.get("reason", ""))[:200]))
            continue
        for name, each in {"octavo": facts, **facts["beside"]}.items():
            numbers = (each.get(key) for key in ("tokens_per_s", "ratio", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50"))
            equal = (
                f"{each['num_equal']} of {each['num_answers']}" if "num_equal" in each and name != "octavo" else None
            )
            ties = (each.get("num_near_ties"), each.get("worst_gap"))
            about = each.get("about", {})
            words = each.get("reason", "").strip().splitlines()[-1:] if name != "octavo" else []
            said = words or [", ".join(f"{key} {about[key]}" for key in ("version", "attention") if key in about)]
            rows.append((case, name, *numbers, equal, *ties, said[0][:200]))
    header = (
        "case",
        "engine",
        "tokens/s",
        "octavo's over its",
        "first token, ms",
        "99 %",
        "each further, ms",
        "answers equal",
        "near-ties",
        "largest, nats",
        "",
    )
    return _table(header, rows) if rows else "<p>No engines were compared.</p>"


def _facts(title: str, cases: Cases, names: Mapping[str, str]) -> str:
    """Return a table of single facts of the cases of a section, or nothing where there are none."""

    def shown(name: str, value: Any) -> Any:
        return f"{value / 2**30:.2f} GiB" if name.endswith("_bytes") and value is not None else value

    rows = [
        (case, *(shown(name, facts.get(name)) for name in names))
        for case, facts in cases.items()
        if facts["status"] == "measured"
    ]
    return f"<h2>{title}</h2>" + _table(("case", *names.values()), rows) if rows else ""


def _predictions(cases: Cases) -> str:
    names = ("batch_size", "context", "floor_us", "tokens_per_s", "most")
    rows = [
        (facts["gpu"], facts["model"], *(step[name] for name in names), "" if step["fits"] else "does not fit")
        for facts in cases.values()
        if facts["status"] == "predicted"
        for step in facts["steps"]
    ]
    if not rows:
        return ""
    header = ("GPU", "model", "batch", "context", "floor, µs", "tokens/s at most", "longest part", "")
    about = "From the cards' data sheets: what no step can beat, and of which nothing was measured."
    return f"<h2>Predictions</h2><p>{about}</p>" + _table(header, rows)


def engine_parts(data: Data) -> list[str]:
    """Return what a page shows of whole engines, verdicts first."""
    steps = _cases(data, "step")
    found = [_bars(case, facts) for case, facts in steps.items() if "parts" in facts]
    rows = steps_table(steps)
    header = ("case", "µs", "floor, µs", "floor is", "tokens/s")
    loads = [
        (case, what, rate)
        for case, facts in _cases(data, "loading").items()
        for what, rate in facts.get("gb_per_s", {}).items()
    ]
    return [
        "<h2>What is wanted</h2>",
        _verdicts(data),
        "<h2>Decode steps</h2>",
        _table(header, rows) if rows else "<p>No steps were timed.</p>",
        *found,
        "<h2>Engines side by side</h2>",
        _engines(_cases(data, "engines")),
        _facts(
            "Keys and values in other dtypes",
            _cases(data, "kv"),
            {
                "us": "decode step, µs",
                "floor_us": "floor, µs",
                "tokens_per_s": "tokens/s, decoding",
                "end_to_end_tokens_per_s": "tokens/s, from the prompt on",
                "kv_bytes_per_token": "bytes per token",
            },
        ),
        _facts(
            "Memory",
            _cases(data, "memory"),
            {
                "started_bytes": "held after start-up",
                "planned_started_bytes": "planned",
                "step_bytes": "largest step",
                "planned_step_bytes": "planned ",
                "reserved_bytes": "taken from the GPU",
            },
        ),
        "<h2>Loading</h2>" + _table(("case", "what", "GB/s"), loads) if loads else "",
        _predictions(_cases(data, "predictions")),
    ]
