"""This module checks what sources may not contain and start-up may not import. It does not know what they compute."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("engine", "kernels") for path in (ROOT / folder).rglob("*.py"))

FORBIDDEN_MODULES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_BUILTINS = {"__import__", "eval", "exec"}
FORBIDDEN_CALLS = {
    "builtins.eval",
    "builtins.exec",
    "torch.load",
    "torch.serialization.load",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
}
FORBIDDEN_NAMES = {"allow_pickle", "trust_remote_code", "weights_only"}


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for a chain of plain names, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def aliases(tree: ast.Module) -> dict[str, str]:
    """Return what every imported name stands for: `import torch as t` gives t -> torch."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return found


def findings(source: str) -> Iterator[str]:
    """Yield `line: what` for every forbidden thing in one source text."""
    tree = ast.parse(source)
    stands_for = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            outside = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            for module in outside:
                if module.split(".")[0] in FORBIDDEN_MODULES and not getattr(node, "level", 0):
                    yield f"{node.lineno}: import {module}"
        # A reference is as bad as a call: `load = torch.load` calls later, under another name.
        if isinstance(node, ast.Name | ast.Attribute):
            name = dotted(node)
            head, dot, rest = name.partition(".")
            full = stands_for.get(head, head) + dot + rest
            if full in FORBIDDEN_CALLS or (isinstance(node, ast.Name) and name in FORBIDDEN_BUILTINS):
                yield f"{node.lineno}: {full}"
        if isinstance(node, ast.keyword | ast.arg) and node.arg in FORBIDDEN_NAMES:
            yield f"{node.lineno}: {node.arg}"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_source_is_free_of_code_from_data(path: Path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import marshal",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "from torch import load as g\ng('x')",
        "import torch\nload = torch.load",
        "import yaml\nyaml.load('x')",
        "eval('1')",
        "f = exec",
        "__import__('x')",
        "f(trust_remote_code=False)",
        "def f(trust_remote_code=False): pass",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_forbidden_source_is_found(source: str) -> None:
    assert list(findings(source)) != []


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "import re\nre.compile('x')", "loader.load('x')", "import triton\ntriton.compile(x)", "'pickle'"],
)
def test_harmless_source_is_not_found(source: str) -> None:
    assert list(findings(source)) == []


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has imported after running `code`."""
    report = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_import_engine_is_light() -> None:
    loaded = modules_after("import octavo.engine")
    assert "octavo" in loaded
    assert loaded & {"fastapi", "msgspec", "numpy", "ray", "torch", "transformers", "triton"} == set()


def test_help_does_not_import_torch() -> None:
    loaded = modules_after("sys.argv = ['octavo', '--help']; import octavo.engine.cli as cli; cli.main()")
    assert "typer" in loaded
    assert loaded & {"fastapi", "torch", "transformers", "triton"} == set()


# Spelt in two parts so that this file does not match itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.~-])/(?:" + "|".join(["wo" + "rk", "tmp/pr" + "obe", "ro" + "ot", "ho" + "me/"]) + r")\b"
)


def text_files() -> list[Path]:
    """Return the tracked files, or every visible file where this is an unpacked archive."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    hidden = re.compile(r"/(\.|__pycache__)")
    return [path for path in ROOT.rglob("*") if path.is_file() and not hidden.search(f"/{path.relative_to(ROOT)}")]


def test_no_file_names_a_path_of_one_machine() -> None:
    files = text_files()
    assert len(files) > 10
    found = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert found == []


@pytest.mark.parametrize("line", ["see /wo" + "rk/x", "'/tmp/pr" + "obe/a'", "(/ho" + "me/ann/m)", "cd /wo" + "rk"])
def test_machine_path_is_found(line: str) -> None:
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize(
    "line", ["framework/x", "https://host/wo" + "rk/x", "/works", "~/ho" + "me/x", "a/ro" + "ot/b"]
)
def test_other_path_is_not_found(line: str) -> None:
    assert not MACHINE_PATH.search(line)
