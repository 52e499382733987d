"""This script reports how large the tree is and what wants a second look. It does not know what the code does.

The exit status is 1 only where the engine with its kernels, its faces, or its tools exceed their line budget.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("engine", "kernels", "tests", "benchmarks", "scripts")
FACES = ("async_llm.py", "cli", "observe", "process", "server", "structured")
"""In engine/: what surrounds the engine. Its core and the kernels can be read, and run, without them, or the tools."""
BUDGETS = {"engine and kernels": 16_000, "faces": 9_500, "tools": 8_000}
"""Lines of code: octavo is meant to be read in full."""
MAX_FILE_LINES = 400
MAX_KERNEL_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_KERNEL_BODY_LINES = 120
NUM_LARGEST = 5
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Source(NamedTuple):
    """One Python file: its path below the root, its text, its lines and those of them that hold code."""

    path: Path
    text: str
    num_lines: int
    num_code_lines: int


def code_lines(text: str) -> int:
    """Count the lines that are neither blank nor a comment nor a docstring; all, where the text does not parse."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return len(text.splitlines())
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def sources(folder: str) -> list[Source]:
    """Return the Python files below one top folder, sorted by path."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Source(path.relative_to(ROOT), text, len(text.splitlines()), code_lines(text)))
    return found


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether a function runs on the device: `@triton.jit`, with or without arguments or other decorators."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def long_functions(source: Source) -> Iterator[str]:
    """Yield a line of text for every function that is longer than its kind should be, signature included."""
    try:
        tree = ast.parse(source.text)
    except SyntaxError as error:
        yield f"{source.path}:{error.lineno}: does not parse"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            limit = MAX_KERNEL_BODY_LINES if is_kernel(node) else MAX_FUNCTION_LINES
            if num_lines > limit:
                yield f"{source.path}:{node.lineno}: {node.name} has {num_lines} lines (over {limit})"


def second_looks(files: list[Source]) -> Iterator[str]:
    """Yield what is large enough to ask whether it should be two things; an answer of no is fine."""
    for source in files:
        limit = MAX_KERNEL_FILE_LINES if source.path.name.endswith("_triton.py") else MAX_FILE_LINES
        if source.num_lines > limit:
            yield f"{source.path}: {source.num_lines} lines (over {limit})"
        yield from long_functions(source)


def part_of(path: Path) -> str:
    """Return which budget a file of the product counts for."""
    folder, inside = path.parts[:2]
    if folder == "engine" and inside in FACES:
        return "faces"
    return "tools" if (folder, inside) == ("engine", "tools") else "engine and kernels"


def main() -> int:
    """Print the report."""
    by_folder = {folder: sources(folder) for folder in FOLDERS}
    files = [source for group in by_folder.values() for source in group]
    for folder, group in by_folder.items():
        num_lines, num_code_lines = (sum(getattr(s, name) for s in group) for name in ("num_lines", "num_code_lines"))
        print(f"  {folder:<11}{num_lines:>7,} lines, {num_code_lines:>6,} of code, in {len(group)} files")
    product = [source for source in files if source.path.parts[0] in ("engine", "kernels")]
    totals = dict.fromkeys(BUDGETS, 0)
    for source in product:
        totals[part_of(source.path)] += source.num_code_lines
    for part, budget in BUDGETS.items():
        print(f"  {part}: {totals[part]:,} lines of code, of {budget:,}")
    largest = sorted(product, key=lambda source: -source.num_lines)[:NUM_LARGEST]
    print("  largest: " + ", ".join(f"{source.path} {source.num_lines}" for source in largest))
    looks = list(second_looks(files))
    if looks:
        print("  worth a second look:")
        print("\n".join(f"    {look}" for look in looks))
    over = {part: totals[part] - budget for part, budget in BUDGETS.items() if totals[part] > budget}
    for part, excess in over.items():
        print(f"  {part}: over the budget by {excess:,} lines")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
