"""This module holds a run's results as a page of its own and as a table for a terminal. It does not know how they came
about.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, Final

from .page_engine import engine_parts, steps_table, verdict_lines
from .store import BAD

__all__ = ["group_by_file", "make_page", "make_table"]

Data = Mapping[str, Any]
Cases = Mapping[str, Mapping[str, Any]]

TESTS: Final = ("tests", "invariance", "engine")
COLOURS: Final = {"decode": "#4269d0", "prefill": "#ff725c"}
OTHER_COLOUR: Final = "#3ca951"
WIDTH, HEIGHT, MARGIN = 640, 400, 60

STYLE: Final = """
  :root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee4; --back: #fff; --card: #f6f8fa;
    --bar: #9fb3e6; --ours: #4269d0; --bad: #c62828; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa5b1; --line: #333b44; --back: #14171b;
    --card: #1b2026; --bar: #47547a; --ours: #7c9cf0; --bad: #ff7a70; } }
  body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: var(--back);
    font: 15px/1.45 system-ui, sans-serif; }
  h1 { font-size: 1.35rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
  h3 { font-size: .95rem; margin: 1rem 0 .25rem; }
  p { margin: .25rem 0; color: var(--soft); } code, pre { font: 12.5px/1.4 ui-monospace, monospace; }
  .scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
  th { font-size: .8rem; color: var(--soft); } .n { text-align: right; white-space: nowrap; }
  .bad { color: var(--bad); font-weight: 700; } svg { max-width: 100%; height: auto; display: block; }
  svg text { fill: var(--soft); font-size: 11px; } svg .axis { stroke: var(--line); } svg .roof { stroke: var(--ink);
    stroke-width: 1.5; fill: none; }
  .bars { display: grid; grid-template-columns: minmax(8rem, 14rem) 6rem 1fr; gap: .15rem .6rem; font-size: .85rem;
    align-items: center; } .bars i { display: block; height: .7rem; background: var(--bar); border-radius: 2px; }
  .bars i.ours { background: var(--ours); }
  @media (max-width: 40rem) { .bars { grid-template-columns: 1fr 6rem; } .bars i { grid-column: 1 / -1; }
    svg text { font-size: 19px; } }
  summary { overflow-wrap: anywhere; }
  details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .4rem .8rem;
    margin: .4rem 0; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def group_by_file(cases: Cases) -> dict[str, Counter[str]]:
    """Return how many tests of each file had which outcome, and under "seconds" their time."""
    files: dict[str, Counter[str]] = {}
    for name, facts in cases.items():
        count = files.setdefault(name.partition("::")[0], Counter())
        count[facts["status"]] += 1
        count["seconds"] += facts.get("seconds", 0.0)
    return files


def make_table(data: Data) -> str:
    """Return one screen: a line per section, then what went wrong."""
    lines = []
    for name, part in data["sections"].items():
        counts = Counter(facts["status"] for facts in part["cases"].values())
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        reason = f"({part['reason']})" if part["reason"] else ""
        lines.append(f"{name:<12}{part['status']:<9}{part['seconds']:>7.1f} s  {text} {reason}".rstrip())
    lines += [f"  {_rate_line(name, facts)}" for name, facts in _measured(data)[:24]]
    for case, us, floor_us, share, rate in steps_table(_cases(data, "step")):
        floor = f"{share} of it is the floor, {floor_us:.0f} us" if share else ""
        lines.append(f"  {case:<44}{us:>10.1f} us {rate:>9.0f} tokens/s {floor}".rstrip())
    bad = list(_bad(data))
    for section, case, facts in bad[:12]:
        reason = str(facts.get("reason", "")).strip().splitlines() or [""]
        lines.append(f"{facts['status']}: {section}: {case}: {reason[-1][:140]}")
    if len(bad) > 12:
        lines.append(f"and {len(bad) - 12} more")
    lines += verdict_lines(data)
    return "\n".join(lines)


def _rate_line(name: str, facts: Mapping[str, Any]) -> str:
    share = f"{facts['fraction']:>5.0%} of {facts['bound_by']}" if "fraction" in facts else ""
    return (
        f"{name:<38}{facts['us']:>10.1f} us {facts['gb_per_s']:>8.0f} GB/s {facts['tflop_per_s']:>7.1f} TFLOP/s {share}"
    )


def _bad(data: Data) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    for section, part in data["sections"].items():
        for case, facts in part["cases"].items():
            if facts["status"] in BAD:
                yield section, case, facts


def _cases(data: Data, section: str) -> Cases:
    cases: Cases = data["sections"].get(section, {}).get("cases", {})
    return cases


def _measured(data: Data) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, facts) for name, facts in _cases(data, "bench").items() if facts["status"] == "measured"]


def _text(tag: str, text: object, kind: str = "") -> str:
    return f"<{tag}{f' class={kind!r}' if kind else ''}>{escape(str(text))}</{tag}>"


def _rows(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = "".join(_text("th", name) for name in header)

    def cell(value: object) -> str:
        if value is None:
            return "<td></td>"
        bad = " bad" if value in BAD else ""
        return _text("td", value, ("n" if isinstance(value, int | float) else "") + bad)

    body = "".join("<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def roofline_svg(data: Data) -> str:
    """Return achieved TFLOP/s over FLOP per byte, both logarithmic, under the ceilings measured in the same run."""
    rates = {name: rate for facts in _cases(data, "ceilings").values() for name, rate in facts.items()}
    points = [(facts["flops"] / facts["bytes"], facts["tflop_per_s"], name) for name, facts in _measured(data)]
    points = [point for point in points if point[0] > 0 and point[1] > 0]
    if not points or not {"copy_bytes_per_s", "matmul_flops_per_s"} <= set(rates):
        return "<p>Nothing was timed beside measured ceilings.</p>"
    bandwidth, peak = rates["copy_bytes_per_s"] / 1e12, rates["matmul_flops_per_s"] / 1e12
    left = math.floor(math.log10(min(x for x, _, _ in points)))
    right = math.ceil(math.log10(max(*(x for x, _, _ in points), 2 * peak / bandwidth)))
    low, high = math.floor(math.log10(min(y for _, y, _ in points))), math.ceil(math.log10(peak))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - left) / (right - left)
        up = (math.log10(y) - low) / (high - low)
        return round(MARGIN + across * (WIDTH - 2 * MARGIN), 1), round(HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="roofline">']
    for power in range(left, right + 1):
        x, bottom = at(10.0**power, 10.0**low)
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{MARGIN}" y2="{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(low, high + 1):
        start, y = at(10.0**left, 10.0**power)
        parts.append(f'<line class="axis" x1="{start}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{start - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    knee = peak / bandwidth
    first = max(10.0**left, 10.0**low / bandwidth)
    corners = [at(first, first * bandwidth), at(knee, peak), at(10.0**right, peak)]
    parts.append(f'<polyline class="roof" points="{" ".join(f"{x},{y}" for x, y in corners)}"/>')
    for x, y, name in points:
        colour = COLOURS.get(name.partition("/")[0], OTHER_COLOUR)
        across, up = at(x, y)
        title = escape(f"{name}: {y:g} TFLOP/s at {x:.3g} FLOP/byte")
        parts.append(f'<circle cx="{across}" cy="{up}" r="4.5" fill="{colour}"><title>{title}</title></circle>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">FLOP per byte</text>')
    parts.append(f'<text x="{MARGIN}" y="{MARGIN - 14}" text-anchor="middle">TFLOP/s</text></svg>')
    legend = {**COLOURS, "other ops": OTHER_COLOUR}
    keys = " ".join(f'<span style="color:{colour}">●</span> {name}' for name, colour in legend.items())
    return "".join(parts) + f"<p>{keys}. The lines are the copy rate and the matrix rate of this run.</p>"


def bars(data: Data) -> str:
    """Return, per case, how long ours and others took, as bars of one scale per case."""
    parts: list[str] = []
    missing: dict[str, str] = {}
    for name, facts in _measured(data):
        ways = {"octavo": facts, **facts.get("beside", {})}
        timed = {way: one["us"] for way, one in ways.items() if "us" in one}
        longest = max(timed.values())
        share = f", {facts['fraction']:.0%} of {facts['bound_by']}" if "fraction" in facts else ""
        parts.append(_text("h3", f"{name} ({facts['gb_per_s']:.0f} GB/s, {facts['tflop_per_s']:.1f} TFLOP/s{share})"))
        parts.append('<div class="bars">')
        for way, us in timed.items():
            ours = ' class="ours"' if way.startswith("octavo") else ""
            parts.append(f'<span>{escape(way)}</span><span class="n">{us:.1f} µs</span>')
            parts.append(f"<i{ours} style='width:{100 * us / longest:.1f}%'></i>")
        parts.append("</div>")
        untimed = {way: one["reason"] for way, one in ways.items() if "us" not in one and "reason" in one}
        missing |= {way: reason for way, reason in untimed.items() if reason.startswith("not here")}
        said = {way: reason.strip().splitlines()[-1] for way, reason in untimed.items() if way not in missing}
        if said:
            parts.append(_text("p", "Not timed: " + "; ".join(f"{way}: {reason}" for way, reason in said.items())))
    about = "; ".join(f"{way} is {reason}" for way, reason in missing.items())
    return (_text("p", about) if about else "") + "".join(parts) or "<p>Nothing was timed.</p>"


def _bits(cases: Cases) -> str:
    rows = [
        (
            case,
            facts.get("of"),
            what,
            "equal" if one["equal"] else f"{one['num_differing']} differ",
        )
        for case, facts in cases.items()
        for what, one in facts.items()
        if isinstance(one, dict) and "equal" in one
    ]
    return _rows(("question", "compared with", "what", "bits"), rows) if rows else "<p>Nothing was asked.</p>"


def _static(cases: Cases) -> str:
    names = (
        "target",
        "regs",
        "spills",
        "shared_bytes",
        "ctas_per_sm",
        "loop_instructions",
        "flop_per_wi",
        "bytes_per_wi",
    )
    rows = [(name, *(facts.get(key) for key in names)) for name, facts in cases.items() if "regs" in facts]
    return _rows(("kernel: variant", *names), rows) if rows else "<p>Nothing was compiled.</p>"


def make_page(data: Data) -> str:
    """Return the page: nothing in it is loaded from elsewhere."""
    run = data["run"]
    gpu = run["machine"]["gpu"]
    about = f"{gpu['name'] if gpu else 'no GPU'}, torch {run['identity']['torch']}, triton {run['identity']['triton']}"
    sections = (
        (name, part["status"], part["reason"], len(part["cases"]), part["seconds"])
        for name, part in data["sections"].items()
    )
    tests = [
        (
            file,
            count["passed"],
            count["failed"] + count["crashed"] + count["timed out"],
            count["not run"],
            round(count["seconds"], 1),
        )
        for name in TESTS
        for file, count in group_by_file(_cases(data, name)).items()
    ]
    failures = "".join(
        f"<details><summary class='bad'>{escape(': '.join((facts['status'], section, case)))}</summary>"
        f"<pre>{escape(str(facts.get('reason', '')))}\n{escape(str(facts.get('output', '')))}</pre></details>"
        for section, case, facts in _bad(data)
    )
    rates = [
        (name, key, f"{value:.4g}")
        for name, facts in _cases(data, "ceilings").items()
        for key, value in facts.items()
        if isinstance(value, int | float)
    ]
    body = [
        _text("h1", "octavo on a GPU"),
        _text("p", f"{about}; {run['started']}; sources {run['identity']['source']}"),
        _rows(("section", "status", "reason", "cases", "seconds"), sections),
        f"<h2>What went wrong</h2>{failures}" if failures else "",
        *engine_parts(data),
        "<h2>Roofline</h2>",
        roofline_svg(data),
        _rows(("ceiling", "rate", "value"), rates) if rates else "",
        "<h2>Times</h2>",
        bars(data),
        "<h2>Tests</h2>",
        _rows(("file", "passed", "failed", "not run", "seconds"), tests) if tests else "<p>None were run.</p>",
        "<h2>Bits</h2>",
        _bits({**_cases(data, "bits")}),
        "<h2>Compiled kernels</h2>",
        _static(_cases(data, "static")),
    ]
    title = "<title>octavo on a GPU</title>"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{title}'
    return f'<!doctype html><html lang="en">{head}<style>{STYLE}</style>{"".join(body)}</html>\n'
