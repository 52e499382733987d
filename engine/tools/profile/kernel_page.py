"""This module holds how a profile of kernels is shown: a page, and a table for a terminal. It does not know how
anything was found out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..report import Ceiling, Cell, Page, Point, duration, facts, legend, note, number, quantity, roofline, strip, table
from .history import Run, Trend
from .history_part import add_history

__all__ = ["call_table", "kernel_page"]

Document = Mapping[str, Any]
Show = Callable[[Any], str]

MAX_REGISTERS, MAX_WARPS = 255, 64
MIX: Final = "matrix,special functions,float,integer and moves,shared memory,global memory,exchange and barriers,other"
KINDS: Final = MIX.split(",")
"""Of instructions, as `octavo.kernels.aot` counts them."""
WIDTHS: Final = ("bulk", "256", "128", "64", "32", "narrow")
WORK: Final = {"flop_per_wi": "FLOP", "bytes_per_wi": "bytes"}
CALLS: Final[Mapping[str, tuple[str, Show]]] = {
    "bytes": ("bytes", lambda value: quantity(value, "B")),
    "FLOP": ("flops", quantity),
    "FLOP per byte": ("flops_per_byte", number),
    "bound by": ("bound_by", str),
    "at best": ("at_best_s", duration),
}
"""Column -> what it shows of a call, and how."""
TIMES: Final[Mapping[str, tuple[str, Show]]] = {
    "time": ("seconds", duration),
    "bytes/s": ("bytes_per_s", lambda value: quantity(value, "B/s")),
    "FLOP/s": ("flops_per_s", quantity),
    "part of the ceiling": ("fraction", lambda value: f"{value:.0%}"),
}


def kernel_page(document: Document, trends: Sequence[Trend], runs: Sequence[Run]) -> str:
    """Return the page; `trends` and `runs` are those of its history, none where there is no earlier run."""
    about, versions, sizes = document["about"], document["versions"], document["about"]["sizes"]
    where = document["machine"]["device"] if document["machine"] else "nothing was run"
    page = Page(f"Kernels for {about['model']}", f"{', '.join(about['targets'])}; {where}; {document['date']}")
    told = {
        "hidden, inner size": f"{sizes['hidden_size']:,}, {sizes['intermediate_size']:,}",
        "heads": f"{sizes['num_q_heads']} query, {sizes['num_kv_heads']} KV × {sizes['head_dim']}",
        "vocabulary": sizes["vocab_size"],
        "dtype, KV cache": f"{sizes['dtype']}, {about['kv_cache_dtype']}",
        "tokens per block": ", ".join(map(str, about["block_sizes"])),
        "timed": f"the {about['backend']} backend" if about["backend"] else "nothing",
        "torch, triton": f"{versions['torch']}, {versions['triton']}",
    }
    page.add("", facts(told))
    if document["calls"]:
        ceilings = [Ceiling(**each) for each in document["ceilings"]]
        points = [
            Point(each["name"], each["op"], each["flops_per_byte"], each["flops_per_s"]) for each in document["calls"]
        ]
        page.add("Where the calls lie", roofline(points, ceilings), note(_about_ceilings(document)))
        columns, rows = call_table(document)
        page.add(
            "Calls of one layer, and of the sampler", table(columns, rows, sortable=True), note(_floor(ceilings[0]))
        )
    if len(runs) > 1:
        add_history(page, trends, runs)
    if document["rows"]:
        text = (
            f"{len(document['rows'])} variants, read from machine code; no kernel was run for it. An instruction "
            "counts once per warp. “Work per wi” is what one round of the main loop does, over the instructions that a "
            "program's warps issue for it. Where a kernel has no loop, the mix is the whole kernel's."
        )
        compiled = [_compiled(row) for row in document["rows"]]
        shown = table(list(compiled[0]), [list(row.values()) for row in compiled], sortable=True)
        page.add("What the kernels compile to", note(text), legend(KINDS), shown)
    return page.html()


def call_table(document: Document) -> tuple[list[str], list[list[Cell]]]:
    """Return the columns and rows of what is known of the calls."""
    columns = {**CALLS, **TIMES} if document["about"]["backend"] else CALLS
    rows = [
        [Cell(call["name"])]
        + [
            Cell(
                None if call[key] is None else show(call[key]),
                share=call[key] if key == "fraction" else None,
                sort=call[key],
            )
            for key, show in columns.values()
        ]
        for call in document["calls"]
    ]
    return ["call", *columns], rows


def _about_ceilings(document: Document) -> str:
    backend = document["about"]["backend"]
    if backend is None:
        return (
            "Nothing was timed: a hollow mark is a call, at the arithmetic intensity that its shapes have, on the "
            "ceiling of the data sheet. How far below it a kernel really lies, a GPU has to say."
        )
    if backend == "torch":
        return (
            "The torch backend on this CPU, at small sizes and in float32: it says nothing of the kernels on a GPU. "
            "The upper slope is a copy within the processor's caches, where such small calls find most of what they "
            "read, the lower one a copy in memory."
        )
    return "One ceiling was measured in this run, by a copy and by a matrix product; others are data sheets'."


def _floor(ceiling: Ceiling) -> str:
    return (
        f"“At best” is what the first ceiling allows, {ceiling.name}: bytes over "
        f"{quantity(ceiling.bytes_per_s, 'B/s')} or arithmetic over {quantity(ceiling.flops_per_s, 'FLOP/s')}, "
        "whichever takes longer. Bytes and FLOP are what a call cannot do without, each byte once."
    )


def _compiled(row: Mapping[str, Any]) -> dict[str, Cell]:
    """Return column -> cell of one variant."""
    warps, loop, masked = (
        row["ctas_per_sm"] * row["num_warps"],
        row["loop_instructions"],
        row["masked_loop_instructions"],
    )
    size, beside = (row["instructions"], "no loop") if loop is None else (loop, f"masked {masked:,}" if masked else "")
    work = next((name for name in WORK if row[name] is not None), None)
    mix = [row["mix"].get(kind, 0) for kind in KINDS]
    accesses = {"load": row["loads"], "async": row["async_loads"], "store": row["stores"]}
    return {
        "kernel": Cell(row["kernel"], small=row["variant"], sort=f"{row['kernel']} {row['variant']}"),
        "target": Cell(row["target"]),
        "registers": Cell(str(row["regs"]), share=row["regs"] / MAX_REGISTERS, sort=row["regs"]),
        "spills": Cell(row["spills"], "bad" if row["spills"] else ""),
        "warps per SM": Cell(str(warps), "", f"{row['ctas_per_sm']} × {row['num_warps']}", warps / MAX_WARPS, warps),
        "shared KiB": Cell(f"{row['shared_bytes'] / 1024:.1f}", sort=row["shared_bytes"]),
        "loop": Cell(size, small=beside),
        "matrix": Cell(", ".join(f"{count} {name}" for name, count in row["mma"].items())),
        "work per wi": Cell(None) if work is None else Cell(f"{row[work]:,}", small=WORK[work], sort=row[work]),
        "main loop's instructions": Cell(strip(mix, KINDS), sort=sum(mix)),
        "accesses × bits": Cell("; ".join(f"{name} {_widths(counts)}" for name, counts in accesses.items() if counts)),
    }


def _widths(counts: Mapping[str, int]) -> str:
    return " ".join(f"{counts[width]}×{width}" for width in WIDTHS if width in counts)
