"""Cost models that are fitted: to steps whose cost is known, to recordings; and how they are kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from operator import ne
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
from octavo.engine.errors import ConfigError
from octavo.engine.events import RequestEvent, StepEvent
from octavo.engine.observe import recording
from octavo.engine.observe.ring import EventRing
from octavo.engine.tools.profile.history import STEP
from octavo.engine.tools.roofline import StepWork
from octavo.engine.tools.simulate.cost import (
    PARTS,
    LinearCost,
    MeasuredStep,
    _not_negative,
    fit_cost,
    measured_steps,
    read_cost,
    write_cost,
)
from octavo.engine.tools.simulate.simulation import Simulation

from .loads import draw, limits

TRUE = LinearCost((4e-3, 3e-5, 2e-4, 1e-5, 4e-8, 1e-9))


def record(file: Path) -> EventRing:
    """Write the recording of a run; return what was recorded."""
    ring = EventRing(100_000, 10_000)
    Simulation(draw(80, 6.0), limits(), TRUE, recorder=ring).run()
    file.write_bytes(recording.dumps(ring, {"num_blocks": 64, "block_size": 16}))
    return ring


def recorded(folder: Path) -> recording.Recording:
    """Return a run's recording, read back."""
    record(folder / "run.json")
    return recording.loads((folder / "run.json").read_bytes())


def told_anew(
    whole: recording.Recording, events: Iterable[RequestEvent], steps: Iterable[StepEvent]
) -> recording.Recording:
    """Return a recording with other events."""
    ring = EventRing(100_000, 10_000)
    for event in events:
        ring.on_request(event)
    for step in steps:
        ring.on_step(step)
    return whole._replace(ring=ring)


def test_a_fit_to_a_recording_finds_the_costs_that_made_it(tmp_path: Path) -> None:
    ring = record(tmp_path / "run.json")
    steps = measured_steps(recording.loads((tmp_path / "run.json").read_bytes()))
    assert len(steps) == len(ring.steps)
    for step in steps:
        assert step.seconds == pytest.approx(TRUE.step_s(step.work), abs=3e-6)  # a recording rounds to microseconds
    found = read_cost(tmp_path / "run.json")
    assert found.seconds == pytest.approx(TRUE.seconds, rel=0.03, abs=2e-7)
    assert (found.num_steps, found.error) == (len(steps), pytest.approx(0, abs=1e-3))


def test_steps_whose_beginning_is_not_in_a_recording_are_left_out(tmp_path: Path) -> None:
    whole = recorded(tmp_path)
    found = measured_steps(told_anew(whole, [*whole.ring.events][100:], whole.ring.steps))
    expected = Counter(step.work for step in measured_steps(whole))
    assert 100 < len(found) < expected.total()
    assert not Counter(step.work for step in found) - expected


def test_what_comes_after_a_step_counts_also_where_nothing_follows(tmp_path: Path) -> None:
    whole = recorded(tmp_path)
    early = [step._replace(end_s=step.end_s - 0.001) for step in whole.ring.steps]
    found, expected = measured_steps(told_anew(whole, whole.ring.events, early)), measured_steps(whole)
    assert [step.seconds for step in found] == pytest.approx([step.seconds for step in expected], abs=3e-6)


def test_steps_that_overlap_take_what_they_add(tmp_path: Path) -> None:
    """The same run, each step handed out as soon as the one before it had begun."""
    whole = recorded(tmp_path)
    steps = [*whole.ring.steps]
    overlapped = [
        step._replace(start_s=before.start_s, execute_s=before.start_s) if step.start_s == before.end_s else step
        for before, step in pairwise([steps[0], *steps])
    ]
    found, expected = measured_steps(told_anew(whole, whole.ring.events, overlapped)), measured_steps(whole)
    assert sum(map(ne, overlapped, steps)) > 100
    assert [step.seconds for step in found] == pytest.approx([step.seconds for step in expected], abs=3e-6)


def test_a_fit_is_the_least_squares_one_without_negative_parts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        columns, goal = rng.normal(size=(40, 5)), rng.normal(size=40)
        assert _not_negative(columns, goal) == pytest.approx(scipy.optimize.nnls(columns, goal)[0], abs=1e-9)
    one = MeasuredStep(StepWork(1, 1, 1, 10, 10), 0.01)
    assert fit_cost([one] * 30).step_s(one.work) == pytest.approx(0.01)
    with pytest.raises(ConfigError, match="at least 20 steps; here are 3"):
        fit_cost([one] * 3)


def test_a_recording_without_steps_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "idle.json"
    file.write_bytes(recording.dumps(EventRing(), {"num_blocks": 64, "block_size": 16}))
    with pytest.raises(ConfigError, match="here are 0"):
        read_cost(file)


def test_a_fit_to_a_profile_finds_the_costs_that_made_it(tmp_path: Path) -> None:
    rng, file = np.random.default_rng(0), tmp_path / "profile.json"
    works = [StepWork(*rng.integers(1, 1000, 5).tolist()) for _ in range(50)]
    steps = [{"kind": "mixed", **work._asdict(), "seconds": TRUE.step_s(work)} for work in works]
    file.write_text(json.dumps({"format": STEP, "steps": steps}))
    assert read_cost(file).seconds == pytest.approx(TRUE.seconds, rel=1e-6)


def test_a_cost_model_is_kept_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    write_cost(file, TRUE)
    assert read_cost(file) == TRUE
    assert str(TRUE).startswith(
        "4.00 ms per step + 30.0 µs per token + 200 µs per sampled token + 10.0 µs per sequence"
    )
    good = json.loads(file.read_text())
    assert set(good["seconds"]) == set(PARTS)
    for bad in (
        [],
        {"format": STEP, "steps": [{}]},
        {**good, "octavo_cost": 2},
        {**good, "seconds": {**good["seconds"], "step": -1}},
        {"seconds": 1},
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match="JSON of octavo profile step, or what --save-cost wrote"):
            read_cost(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="Expecting property name"):
        read_cost(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_cost(tmp_path / "nowhere.json")
