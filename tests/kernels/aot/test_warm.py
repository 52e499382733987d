"""This module checks that a warm-up compiles in other processes, once, and loads in this one. It does not know an
engine, whose own warm-up `tests/engine/test_warmup.py` checks.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from .programs import output_of


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        output_of("warm_twice.py", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))
    )
    return report


def test_what_other_processes_compile_is_loaded_here_and_not_compiled_again(told: dict[str, Any]) -> None:
    first, second = told["runs"]
    assert first["warmed"] == [3, 3]
    assert first["compiled_here"] == 1  # by which it is seen that the others are to be compiled, too
    assert second["warmed"] == [3, 0]
    assert second["compiled_here"] == 0
    for run in (first, second):
        assert run["progress"] == [[1, 3], [2, 3], [3, 3]]
        assert run["num_loaded"] == 3
        assert run["num_late"] == 0
        assert run["num_children"] == 0


def test_what_a_process_cannot_compile_does_not_stop_the_others(told: dict[str, Any]) -> None:
    assert told["answers"] == [False, False, True]
    assert told["dead"] == [False] * 4
    assert told["num_children"] == 0
