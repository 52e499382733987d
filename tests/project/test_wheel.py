"""This module checks that the wheel holds the whole tree and runs without it. It does not know what octavo computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("engine", "kernels")
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that knows nothing of this interpreter's settings, and return what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def files_of(folder: Path) -> set[str]:
    """Return the files below a folder as posix paths, without caches and hidden files."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        path.as_posix()
        for path in paths
        if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: setuptools would otherwise leave a build folder here, and pack what an older one left."""
    copy = tmp_path_factory.mktemp("tree")
    for name in BUILD_INPUTS:
        shutil.copy(ROOT / name, copy / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ".", cwd=tree)
    (built,) = out.glob("octavo-*.whl")
    return built


def test_packages_are_the_folders_with_python_files() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    expected = sorted("octavo." + ".".join(folder.parts) for folder in folders)
    assert settings["tool"]["setuptools"]["packages"] == expected


def test_packages_have_an_init() -> None:
    folders = {path.parent for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert missing == []


def test_wheel_holds_exactly_the_tree(tree: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"octavo/{folder}/{name}" for folder in FOLDERS for name in files_of(tree / folder)}
    assert len(expected) > 10
    assert packed == expected


def test_wheel_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are lent by a .pth file, read after the wheel's own folder; an editable octavo is not lent."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "lent.pth").write_text("\n".join(lent), encoding="utf-8")

    assert "generate" in run(home / "bin" / "octavo", "--help", cwd=tmp_path)
    origin = run(python, "-c", "import octavo.engine as e; print(e.__file__)", cwd=tmp_path).strip()
    assert Path(origin).is_relative_to(site_packages)
    assert run(python, "-c", "import octavo.engine.core, octavo.kernels", cwd=tmp_path) == ""
