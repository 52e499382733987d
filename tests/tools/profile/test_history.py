"""This module checks what counts as worse: neither noise nor a slow machine, but a change of the code. It does not know
where figures come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo.engine.errors import ConfigError
from octavo.engine.tools.profile.history import Finding, machine_note, read_runs, trends
from octavo.engine.tools.profile.history_part import add_history, finding_lines
from octavo.engine.tools.report import Page

NUM_ROUNDS = 7


def document(
    seconds: float, rng: np.random.Generator, *, noise: float = 0.02, slowness: float = 1.0, **changes: Any
) -> dict[str, Any]:
    """Return a run of one timed figure, its rounds scattered, and one that is read."""
    values = (seconds * slowness * rng.lognormal(0, noise, NUM_ROUNDS)).tolist()
    return {
        "format": "octavo profile step 1",
        "about": {"model": "m"},
        "machine": {"device": "cpu", "num_threads": 1},
        "yardsticks_s": {"copy": [slowness] * 3, "matmul": [slowness] * 3},
        "metrics": {
            "a step": {"unit": "s", "kind": "timed", "values": values},
            "spills": {"unit": "", "kind": "exact", "values": [0]},
        },
    } | changes


def findings(tmp_path: Path, *documents: dict[str, Any]) -> list[Finding]:
    """Return what is worse in runs one after the other."""
    files = []
    for index, each in enumerate(documents[:-1]):
        files.append(tmp_path / f"run{index}.json")
        files[-1].write_text(json.dumps(each))
    return [finding for trend in trends(read_runs(files, documents[-1])) for finding in trend.findings]


@pytest.mark.parametrize("change", [1.15, 1.5, 3.0])
def test_a_change_beyond_the_noise_is_found(tmp_path: Path, change: float) -> None:
    rng = np.random.default_rng(0)
    (found,) = findings(tmp_path, document(1e-3, rng), document(change * 1e-3, rng))
    assert (found.metric, found.at, found.before) == ("a step", 1, "run0")
    assert found.low is not None
    assert found.high is not None
    assert found.low < change - 1 < found.high


def test_runs_of_the_same_code_are_not_worse(tmp_path: Path) -> None:
    num_wrong = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        assert findings(tmp_path, *(document(1e-3, rng, noise=0.02) for _ in range(3))) == []
        num_wrong += len(findings(tmp_path, *(document(1e-3, rng, noise=0.2) for _ in range(2))))
    # One in forty at 95 % on one side, and fewer as a change must be 5 % at least; six would be rare by chance (4 %).
    assert num_wrong <= 5


def test_what_is_faster_or_a_little_slower_is_not_worse(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    assert findings(tmp_path, document(1e-3, rng), document(0.5e-3, rng)) == []
    assert findings(tmp_path, document(1e-3, rng, noise=1e-4), document(1.04e-3, rng, noise=1e-4)) == []


def test_a_machine_that_has_slowed_down_excuses_as_much(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    assert findings(tmp_path, document(1e-3, rng), document(1e-3, rng, slowness=1.5)) == []
    assert len(findings(tmp_path, document(1e-3, rng), document(1.5e-3, rng, slowness=1.5))) == 1


def test_small_steps_that_add_up_are_found_against_the_first_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps = [document(1e-3 * 1.04**i, rng, noise=0.002) for i in range(5)]
    (found,) = findings(tmp_path, *steps)
    assert (found.at, found.before) == (4, "run0")


def test_another_machine_is_drawn_and_not_compared(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = document(1e-3, rng, machine={"device": "other", "num_threads": 1}), document(9e-3, rng)
    assert findings(tmp_path, old, new) == []
    runs = read_runs([tmp_path / "run0.json"], new)
    assert "run0" in machine_note(runs)
    assert [len(trend.points) for trend in trends(runs)] == [2, 2]


def test_a_figure_that_is_read_counts_from_the_first_unit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = document(1e-3, rng), document(1e-3, rng)
    new["metrics"]["spills"]["values"] = [1]
    (found,) = findings(tmp_path, old, new)
    assert (found.metric, found.old, found.new, found.low) == ("spills", 0, 1, None)
    assert findings(tmp_path, new, old) == []


def test_a_single_round_is_not_enough_to_tell(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = document(1e-3, rng), document(9e-3, rng)
    new["metrics"]["a step"]["values"] = [9e-3]
    assert findings(tmp_path, old, new) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("{", "is no JSON"),
        ("[1]", "is no JSON of octavo profile step 1"),
        ('{"format": "octavo profile step 1", "metrics": {}}', "is no JSON of octavo profile step 1"),
        ('{"format": "octavo profile step 1", "metrics": {}, "about": 5}', "is no JSON of octavo profile step 1"),
        ('{"format": "octavo profile kernels 1", "metrics": {}}', "is no JSON of octavo profile step 1"),
        (
            '{"format": "octavo profile step 1", "metrics": {}, "about": {"model": "x"}}',
            "its model is x, of this run m",
        ),
    ],
)
def test_files_that_do_not_compare_are_refused(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "old.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_runs([file], document(1e-3, np.random.default_rng(0)))


def test_the_page_and_the_lines_name_what_is_worse(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "old.json").write_text(json.dumps(document(1e-3, rng)))
    runs = read_runs([tmp_path / "old.json"], document(2e-3, rng))
    page = Page("title")
    add_history(page, trends(runs), runs)
    assert "mark" in page.html().partition("</style>")[2]
    (line,) = finding_lines(trends(runs), runs)
    assert line.startswith("worse: a step: ")
    assert "in old" in line
