"""This module is a pytest plugin that tells of every test as it starts and ends, and runs a part of them. It does not
know the tests.

    pytest -p gpu.pytest_lines --lines FILE --skip FILE --shard 1/4
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .lines import Lines, missing_package

CPU_BACKENDS = ("torch",)
"""Tests on these say nothing about a GPU."""
MAX_REASON = 3000


class Teller:
    """Writes each test's outcome once, after its teardown."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._found: dict[str, dict[str, Any]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._lines.plan(item.nodeid for item in session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._found[nodeid] = {"status": "passed", "seconds": 0.0}
        self._lines.write(case=nodeid, status="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        facts = self._found[report.nodeid]
        facts["seconds"] = round(facts["seconds"] + report.duration, 3)
        missing = missing_package(report.longreprtext) if report.failed else None
        if missing:
            facts |= {"status": "not run", "reason": f"needs the package {missing}"}
        elif report.failed and facts["status"] != "failed":
            facts |= {"status": "failed", "reason": report.longreprtext[-MAX_REASON:]}
        elif report.skipped:
            where = report.longrepr
            facts |= {"status": "not run", "reason": where[2] if isinstance(where, tuple) else str(where)}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._lines.write(case=nodeid, **self._found.pop(nodeid))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, help="append a line of JSON per test there")
    parser.addoption("--skip", type=Path, help="a JSON list of tests to leave out")
    parser.addoption("--shard", default="1/1", help="which part of the tests, of how many")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--lines"):
        config.pluginmanager.register(Teller(Lines(config.getoption("--lines"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this part's tests: neighbours, as they share compiled kernels."""
    part, of = map(int, config.getoption("--shard").split("/"))
    path = config.getoption("--skip")
    skipped = set(json.loads(path.read_text(encoding="utf-8"))) if path else set()
    chosen = [item for item in items if not _is_for_cpu(item)]
    chosen = chosen[len(chosen) * (part - 1) // of : len(chosen) * part // of]
    items[:] = [item for item in chosen if item.nodeid not in skipped]


def _is_for_cpu(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return parameters.get("backend") in CPU_BACKENDS
