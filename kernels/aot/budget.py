"""This module holds the ceilings that compiled kernels are held to. It does not know how a kernel is compiled.

`budget.json` holds gates, decided by people for the kernels that matter most, and ceilings, measured once: what a
variant compiled to, plus a margin. Both are about one version of Triton; under another one only spills count. No
kernel may spill but where a person has written into its ceilings how much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import triton

from .report import Row

__all__ = ["BUDGET", "broken", "updated"]

BUDGET: Final = Path(__file__).with_name("budget.json")
MARGIN: Final = 1.05
WITH_MARGIN: Final = ("regs", "shared_bytes", "instructions", "loop_instructions", "masked_loop_instructions")


def _key(row: Row) -> str:
    return f"{row['model']}/{row['target']}/{row['kernel']}/{row['variant']}"


def _narrow(row: Row) -> int:
    """Return how many loads and stores of device memory move four bytes per thread, or less."""
    accesses = (row["loads"], row["stores"], row["async_loads"])
    return sum(counts.get(width, 0) for counts in accesses for width in ("32", "narrow"))


def _ceilings(row: Row) -> dict[str, Any]:
    """Return what is measured plus the margin; no spill and no narrow access is added, no CTA lost."""
    found = {name: math.ceil(row[name] * MARGIN) for name in WITH_MARGIN if row[name] is not None}
    return found | {"narrow_accesses": _narrow(row), "min_ctas_per_sm": row["ctas_per_sm"], "mma": sorted(row["mma"])}


def _compare(row: Row, limits: dict[str, Any]) -> list[str]:
    found = []
    for name, limit in limits.items():
        least = name.startswith("min_")
        measured = _narrow(row) if name == "narrow_accesses" else row[name.removeprefix("min_")]
        if name == "mma":
            loops = [row["mma"]] + ([row["masked_mma"]] if row["masked_mma"] else [])
            if any(kind not in loop for kind in limit for loop in loops):
                found.append(f"{_key(row)}: no {' and '.join(limit)} in a main loop that has {measured or 'none'}")
        elif measured is None or (measured < limit if least else measured > limit):
            word = "at least" if least else "at most"
            found.append(f"{_key(row)}: {name.removeprefix('min_')} is {measured}, {word} {limit} allowed")
    return found


def broken(budget: str, rows: Sequence[Row], *, complete: bool = False) -> list[str]:
    """Return a line for every ceiling that a row breaks, and for every row that has none.

    Args:
        budget: the text of budget.json.
        complete: the rows are all that their models and targets have, so a ceiling without a row is out of date.
    """
    data = json.loads(budget)
    found = []
    for row in rows:
        ceilings = data["ceilings"].get(_key(row))
        limits = {"spills": 0} | (ceilings or {})
        if data["triton"] != triton.__version__:
            found += _compare(row, {"spills": limits["spills"]})
            continue
        found += _compare(row, limits)
        if ceilings is None:
            found.append(f"{_key(row)}: no ceiling is written down")
        for gate in data["gates"]:
            if all(fnmatchcase(row[name], gate[name]) for name in ("kernel", "variant", "model", "target")):
                found += _compare(row, gate["limits"])
    if complete and data["triton"] == triton.__version__:
        found += [f"{key}: a ceiling without a variant" for key in _concerned(data, rows) - {_key(row) for row in rows}]
    return found


def _concerned(data: dict[str, Any], rows: Sequence[Row]) -> set[str]:
    """Return the ceilings of the rows' models and targets."""
    places = tuple({f"{row['model']}/{row['target']}/" for row in rows})
    return {key for key in data["ceilings"] if key.startswith(places)}


def updated(budget: str, rows: Sequence[Row], *, complete: bool = False) -> str:
    """Return the budget with the rows' ceilings measured anew; the gates stay as they are."""
    data = json.loads(budget)
    ceilings = data["ceilings"]
    for row in rows:
        known = {"spills": spills} if row["spills"] and (spills := ceilings.get(_key(row), {}).get("spills")) else {}
        ceilings[_key(row)] = _ceilings(row) | known
    if complete:
        for key in _concerned(data, rows) - {_key(row) for row in rows}:
            del ceilings[key]
    gates = ",\n".join(f"  {json.dumps(gate)}" for gate in data["gates"])
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(ceilings[key])}" for key in sorted(ceilings))
    return f'{{\n "triton": "{triton.__version__}",\n "gates": [\n{gates}\n ],\n "ceilings": {{\n{lines}\n }}\n}}\n'
