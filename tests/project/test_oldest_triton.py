"""Kernels use nothing of triton.language that the oldest Triton we allow lacks: machines with a GPU may have it."""

from __future__ import annotations

import ast
from pathlib import Path

import triton.language as tl

from .gpu_benchmarks import ROOT

NAMES_OF_3_6 = """
    abs arange atomic_add bfloat16 broadcast broadcast_to cdiv constexpr cumsum debug_barrier device_assert dot
    float16 float32 float64 fma full histogram inline_asm_elementwise int16 int32 int64 int8 join load log math
    math.div_rn math.erf math.exp2 math.log2 math.sqrt_rn max maximum min minimum multiple_of num_programs
    permute program_id range reshape split static_range store sum uint16 uint32 uint8 where zeros zeros_like
"""
"""What is used of it, and was looked up in 3.6."""


def name_of(node: ast.Attribute) -> str:
    """Return what follows `tl.`, or nothing where it is no attribute of that module."""
    parts, x = [node.attr], node.value
    while isinstance(x, ast.Attribute):
        parts.append(x.attr)
        x = x.value
    return ".".join(reversed(parts)) if isinstance(x, ast.Name) and x.id == "tl" else ""


def used_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name_of(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - {""}


def test_the_language_is_that_of_the_oldest_triton() -> None:
    paths = [path for folder in ("kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    used, known = set().union(*map(used_in, paths)), set(NAMES_OF_3_6.split())
    assert used - known == set(), "look them up in Triton 3.6, and add them here"
    assert known - used == set(), "no longer used"
    assert all(hasattr(tl, name.partition(".")[0]) for name in used)
