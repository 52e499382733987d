"""This module holds how a profile of kernels is shown: a page, and a table for a terminal. It does not know how
anything was found out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report import (
    Ceiling,
    Cell,
    Page,
    Point,
    duration,
    facts,
    legend,
    note,
    number,
    quantity,
    roofline,
    strip,
    table,
)
from .history import Run, Trend
from .history_part import add_history

__all__ = ["call_lines", "kernel_page"]

Document = Mapping[str, Any]

MAX_REGISTERS, MAX_WARPS = 255, 64
KINDS = (
    "matrix",
    "special functions",
    "float",
    "integer and moves",
    "shared memory",
    "global memory",
    "exchange and barriers",
    "other",
)
"""Of instructions, as `octavo.kernels.aot` counts them."""
LEFT = (0, 4)
"""Columns of text among the calls'."""
WIDTHS = ("bulk", "256", "128", "64", "32", "narrow")


def kernel_page(document: Document, trends: Sequence[Trend], runs: Sequence[Run]) -> str:
    """Return the page; `trends` and `runs` are those of its history, none where there is no earlier run."""
    about, is_timed = document["about"], _is_timed(document)
    where = document["machine"]["device"] if document["machine"] else "nothing was run"
    page = Page(f"Kernels for {about['model']}", f"{', '.join(about['targets'])}; {where}; {document['date']}")
    sizes = about["sizes"]
    page.add(
        "",
        facts(
            {
                "hidden, inner size": f"{sizes['hidden_size']:,}, {sizes['intermediate_size']:,}",
                "heads": f"{sizes['num_q_heads']} query, {sizes['num_kv_heads']} KV × {sizes['head_dim']}",
                "vocabulary": sizes["vocab_size"],
                "dtype": sizes["dtype"],
                "KV cache": about["kv_cache_dtype"],
                "tokens per block": ", ".join(map(str, about["block_sizes"])),
                "timed": f"the {about['backend']} backend" if is_timed else "nothing",
                "torch, triton": f"{document['versions']['torch']}, {document['versions']['triton']}",
            }
        ),
    )
    if document["calls"]:
        _add_calls(page, document)
    if len(runs) > 1:
        add_history(page, trends, runs)
    if document["rows"]:
        _add_rows(page, document)
    return page.html()


def _is_timed(document: Document) -> bool:
    return any(call["seconds"] is not None for call in document["calls"])


def _add_calls(page: Page, document: Document) -> None:
    ceilings = [Ceiling(**each) for each in document["ceilings"]]
    points = [
        Point(call["name"], call["op"], call["flops_per_byte"], call.get("flops_per_s")) for call in document["calls"]
    ]
    if not _is_timed(document):
        text = (
            "Nothing was timed: a hollow mark is a call, at the arithmetic intensity that its shapes have, on the "
            "ceiling of the data sheet. How far below it a kernel really lies, a GPU has to say."
        )
    elif document["about"]["backend"] == "torch":
        text = (
            "The torch backend on this CPU, at small sizes and in float32: it says nothing of the kernels on a GPU. "
            "The upper slope is a copy within the processor's caches, where such small calls find most of what they "
            "read, the lower one a copy in memory."
        )
    else:
        text = "One ceiling was measured in this run, by a copy and by a matrix product; others are data sheets'."
    page.add("Where the calls lie", roofline(points, ceilings), note(text))
    page.add(
        "Calls of one layer, and of the sampler", table(*_call_table(document), sortable=True), note(_floor(document))
    )


def _floor(document: Document) -> str:
    first = document["ceilings"][0]
    return (
        f"“At best” is what the first ceiling allows, {first['name']}: bytes over "
        f"{quantity(first['bytes_per_s'], 'B/s')} or arithmetic over {quantity(first['flops_per_s'], 'FLOP/s')}, "
        "whichever takes longer. Bytes and FLOP are what a call cannot do without, each byte once."
    )


def _call_table(document: Document) -> tuple[list[str], list[list[Cell]]]:
    ceiling = Ceiling(**document["ceilings"][0])
    columns = ["call", "bytes", "FLOP", "FLOP per byte", "bound by", "at best"]
    is_timed = _is_timed(document)
    if is_timed:
        columns += ["time", "bytes/s", "FLOP/s", "part of the ceiling"]
    rows = []
    for call in document["calls"]:
        floor_s = max(call["bytes"] / ceiling.bytes_per_s, call["flops"] / ceiling.flops_per_s)
        row = [
            Cell(call["op"], small=call["case"], sort=call["name"]),
            Cell(quantity(call["bytes"], "B"), sort=call["bytes"]),
            Cell(quantity(call["flops"]), sort=call["flops"]),
            Cell(number(float(call["flops_per_byte"])), sort=call["flops_per_byte"]),
            Cell(call["bound_by"]),
            Cell(duration(floor_s), sort=floor_s),
        ]
        if is_timed and call["seconds"] is None:
            row += [Cell(None)] * 4
        elif is_timed:
            row += [
                Cell(duration(call["seconds"]), sort=call["seconds"]),
                Cell(quantity(call["bytes_per_s"], "B/s"), sort=call["bytes_per_s"]),
                Cell(quantity(call["flops_per_s"]), sort=call["flops_per_s"]),
                Cell(f"{call['fraction']:.0%}", share=call["fraction"], sort=call["fraction"]),
            ]
        rows.append(row)
    return columns, rows


def _add_rows(page: Page, document: Document) -> None:
    columns = ["kernel", "target", "registers", "spills", "warps per SM", "shared KiB", "loop", "matrix", "work per wi"]
    columns += ["main loop's instructions", "memory accesses × bits"]
    rows = document["rows"]
    page.add(
        "What the kernels compile to",
        note(
            f"{len(rows)} variants, read from machine code; no kernel was run for it. An instruction counts once per "
            "warp. “Work per wi” is what one round of the main loop does, over the instructions that a program's warps "
            "issue for it. Where a kernel has no loop, the mix is the whole kernel's."
        ),
        legend(KINDS),
        table(columns, [_row(row) for row in rows], sortable=True),
    )


def _row(row: Mapping[str, Any]) -> list[Cell]:
    warps, loop, masked = (
        row["ctas_per_sm"] * row["num_warps"],
        row["loop_instructions"],
        row["masked_loop_instructions"],
    )
    work = {"FLOP": row["flop_per_wi"], "bytes": row["bytes_per_wi"]}
    unit = next((name for name, value in work.items() if value is not None), None)
    accesses = {"load": row["loads"], "async": row["async_loads"], "store": row["stores"]}
    mix = [row["mix"].get(kind, 0) for kind in KINDS]
    return [
        Cell(row["kernel"], small=row["variant"], sort=f"{row['kernel']} {row['variant']}"),
        Cell(row["target"]),
        Cell(str(row["regs"]), share=row["regs"] / MAX_REGISTERS, sort=row["regs"]),
        Cell(row["spills"], "bad" if row["spills"] else ""),
        Cell(str(warps), small=f"{row['ctas_per_sm']} × {row['num_warps']}", share=warps / MAX_WARPS, sort=warps),
        Cell(f"{row['shared_bytes'] / 1024:.1f}", sort=row["shared_bytes"]),
        Cell(
            f"{loop if loop is not None else row['instructions']:,}",
            small="no loop" if loop is None else f"masked {masked:,}" if masked else "",
            sort=loop or row["instructions"],
        ),
        Cell(", ".join(f"{count} {name}" for name, count in row["mma"].items())),
        Cell(None if unit is None else f"{work[unit]:,}", small=unit or "", sort=None if unit is None else work[unit]),
        Cell(strip(mix, KINDS), sort=sum(mix)),
        Cell("; ".join(f"{name} {_widths(counts)}" for name, counts in accesses.items() if counts)),
    ]


def _widths(counts: Mapping[str, int]) -> str:
    return " ".join(f"{counts[width]}×{width}" for width in WIDTHS if width in counts)


def call_lines(document: Document) -> list[str]:
    """Return the calls as a table of text."""
    columns, rows = _call_table(document)
    lines = [columns]
    lines += [[f"{row[0].value}, {row[0].small}", *(str(each.value or "") for each in row[1:])] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    aligned = [str.ljust if i in LEFT else str.rjust for i in range(len(columns))]
    return ["  ".join(map(lambda put, *each: put(*each), aligned, line, widths)).rstrip() for line in lines]
