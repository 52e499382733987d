"""This module holds whether Python and the packages are there that octavo needs, in versions that it takes. It does not
import them.
"""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from .finding import Finding, Status

__all__ = ["Need", "look_at_packages", "needs"]

SECTION = "Packages"
LARGE = ("torch", "triton", "numpy")
"""Told one by one: what goes wrong, goes wrong with these."""
MIN_PYTHON = (3, 11)
EXTRAS = {"serve": "octavo serve, bench and structured outputs", "verify": "octavo verify against transformers"}


class Need(NamedTuple):
    """A package that octavo asks for."""

    package: str
    at_least: str
    extra: str = ""


def look_at_packages() -> Iterator[Finding]:
    """Compare what is installed with what octavo's own metadata asks for."""
    version, least = sys.version.split()[0], ".".join(map(str, MIN_PYTHON))
    good = sys.version_info[:2] >= MIN_PYTHON
    fix = "" if good else f"uv venv --python 3.12, or another way to get Python {least} or newer"
    yield Finding(SECTION, "python", Status.OK if good else Status.FAIL, f"{version} on {platform.platform()}", fix)
    found = list(needs())
    if not found:
        yield Finding(SECTION, "octavo", Status.WARN, "not installed as a package: versions cannot be compared")
        return
    core = [need for need in found if not need.extra]
    for need in core:
        if need.package in LARGE:
            yield _one(need)
    yield _several("others", [need for need in core if need.package not in LARGE], "", Status.FAIL)
    for extra, purpose in EXTRAS.items():
        several = [need for need in found if need.extra == extra]
        yield _several(f"extra [{extra}]", several, f"; without it: no {purpose}", Status.WARN)


def needs() -> Iterator[Need]:
    """Yield what octavo asks for here: by its installed metadata, or where it runs from its tree by pyproject.toml."""
    try:
        lines = metadata.requires("octavo") or []
    except metadata.PackageNotFoundError:
        lines = _from_tree()
    for line in lines:
        match = re.match(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?", line)
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", line)
        is_elsewhere = "platform_system" in line and platform.system() != "Linux"
        if match is not None and not is_elsewhere and match[1].lower() != "octavo":
            yield Need(match[1], match[2] or "0", extra[1] if extra else "")


def _from_tree() -> list[str]:
    path = Path(__file__).resolve().parents[3] / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return []
    extras = project.get("optional-dependencies", {})
    more = [f"{line}; extra == '{extra}'" for extra, lines in extras.items() for line in lines]
    return [*project["dependencies"], *more]


def _one(need: Need) -> Finding:
    wrong = _wrong(need)
    if wrong:
        return Finding(SECTION, need.package, Status.FAIL, wrong, f"pip install '{need.package}>={need.at_least}'")
    text = f"{metadata.version(need.package)}, needs {need.at_least} or newer"
    return Finding(SECTION, need.package, Status.OK, text)


def _several(name: str, several: list[Need], effect: str, status: Status) -> Finding:
    wrong = {need: words for need in several if (words := _wrong(need))}
    if not wrong:
        text = ", ".join(f"{need.package} {metadata.version(need.package)}" for need in several)
        return Finding(SECTION, name, Status.OK, text)
    text = ", ".join(f"{need.package} {words}" for need, words in wrong.items()) + effect
    extra = several[0].extra
    wanted = [f"octavo[{extra}]"] if extra else [f"{need.package}>={need.at_least}" for need in wrong]
    return Finding(SECTION, name, status, text, "pip install " + " ".join(f"'{each}'" for each in wanted))


def _wrong(need: Need) -> str:
    """Say what is wrong with a package, or nothing."""
    try:
        version = metadata.version(need.package)
    except metadata.PackageNotFoundError:
        return "is missing"
    if _numbers(version) < _numbers(need.at_least):
        return f"is {version}, needs {need.at_least} or newer"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
