"""This module holds the static report: a row of facts per variant, as a table, JSON or a page. It does not know where
the variants come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import triton
from rich.table import Table

from .compile import compile_all
from .keys import Variant
from .work import work

__all__ = ["Row", "compiler_version", "make_page", "make_rows", "make_table", "write_json"]

Row = dict[str, Any]


def compiler_version() -> str:
    """Return the version of Triton that compiles here."""
    return str(triton.__version__)


def make_rows(
    model: str, variants: Sequence[Variant], *, cache: Path, num_workers: int, advance: Callable[[], object]
) -> list[Row]:
    """Compile variants and return a row of each, in their order.

    Args:
        advance: called whenever one is ready.
    """
    facts = {}
    for launch, found in compile_all([v.launch for v in variants], cache=cache, num_workers=num_workers):
        facts[launch] = found
        advance()
    return [_row(model, variant, facts[variant.launch]) for variant in variants]


def _row(model: str, variant: Variant, facts: dict[str, Any]) -> Row:
    """Return what is known of one variant. Of a kernel without a loop the whole program is the loop."""
    launch, loops = variant.launch, facts["loops"]
    main = loops[0] if loops else facts
    round_ = work(launch)
    num_wi = main["instructions"] * facts["num_warps"]
    has_masked_loop = len(loops) > 1 and loops[1]["mma"] == main["mma"] != {}
    return {
        "op": variant.op,
        "kernel": launch.kernel,
        "variant": variant.name,
        "model": model,
        "target": launch.target,
        **{name: facts[name] for name in ("regs", "spills", "stack_bytes", "shared_bytes", "ctas_per_sm")},
        **{name: facts[name] for name in ("num_warps", "num_stages", "instructions", "loads", "stores", "async_loads")},
        "mma": main["mma"],
        "loop_instructions": main["instructions"] if loops else None,
        "masked_loop_instructions": loops[1]["instructions"] if has_masked_loop else None,
        "masked_mma": loops[1]["mma"] if has_masked_loop else {},
        "loop_loads": main["loads"],
        "loop_async_loads": main["async_loads"],
        "mix": main["mix"],
        "flop_per_wi": None if round_.flop is None else round(round_.flop / num_wi, 1),
        "bytes_per_wi": None if round_.bytes is None else round(round_.bytes / num_wi, 2),
        "constants": launch.constants,
        "signature": launch.signature,
    }


def widths(counts: dict[str, int]) -> str:
    """Return how many accesses have which width, the widest first: 4x128 1x32."""
    order = ("bulk", "256", "128", "64", "32", "narrow")
    return " ".join(f"{counts[width]}x{width}" for width in order if width in counts)


def make_table(rows: Sequence[Row]) -> Table:
    """Return the report for a terminal."""
    table = Table(header_style="bold", pad_edge=False, box=None)
    for name in ("kernel", "variant", "target"):
        table.add_column(name, no_wrap=True)
    for name in ("regs", "spills", "shared", "CTA/SM", "mma", "loop", "masked", "FLOP/wi", "B/wi"):
        table.add_column(name, justify="right")
    for name in ("loads", "async", "stores"):
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = [row["regs"], row["spills"], row["shared_bytes"], row["ctas_per_sm"]]
        cells += [" ".join(f"{count} {name}" for name, count in row["mma"].items())]
        cells += [
            row[name] for name in ("loop_instructions", "masked_loop_instructions", "flop_per_wi", "bytes_per_wi")
        ]
        cells += [widths(row[name]) for name in ("loads", "async_loads", "stores")]
        text = ["" if cell is None else str(cell) for cell in cells]
        table.add_row(row["kernel"], row["variant"], row["target"], *text, style="red" if row["spills"] else None)
    return table


def _document(rows: Sequence[Row]) -> dict[str, Any]:
    return {"triton": triton.__version__, "rows": list(rows)}


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the report as JSON, one object per variant."""
    path.write_text(json.dumps(_document(rows), indent=1) + "\n", encoding="utf-8")


def make_page(rows: Sequence[Row]) -> str:
    """Return the report as a page that needs nothing else."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("__REPORT__", json.dumps(_document(rows)).replace("<", "\\u003c"))
