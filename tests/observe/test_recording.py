"""This module holds recordings, the live feed, Chrome traces and crash bundles of runs. It does not know HTTP."""

from __future__ import annotations

import json
import logging
import resource
import stat
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.core import MAX_FAILED_STEPS
from octavo.engine.errors import ConfigError, EngineDeadError
from octavo.engine.events import BlockState, KVSnapshot, RequestEvent, StepEvent
from octavo.engine.observe import recording
from octavo.engine.observe.crash import write_bundle
from octavo.engine.observe.explain import explain
from octavo.engine.observe.live import LiveFeed
from octavo.engine.observe.metrics import Metrics
from octavo.engine.observe.ring import EventRing
from octavo.engine.observe.trace import chrome_trace
from octavo.engine.runner.fake_runner import FakeRunner
from octavo.engine.sampling_params import SamplingParams

from .runs import MAX_MODEL_LEN, NUM_BLOCKS, Run, busy_run, make_core

FACTS = {"model": "fake", "num_blocks": NUM_BLOCKS, "block_size": 4, "ratio": 0.5, "flag": True, "none": None}


@pytest.fixture(scope="module")
def ring_and_run() -> tuple[EventRing, Run]:
    ring = EventRing()
    run = busy_run(ring)
    ring.on_snapshot(run.core.snapshot())
    return ring, run


def same_step(one: StepEvent, other: StepEvent) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_recording_is_read_back_as_it_was(ring_and_run: tuple[EventRing, Run]) -> None:
    ring, _ = ring_and_run
    data = recording.dumps(ring, FACTS | {"left out": [1]})
    back = recording.loads(data)
    assert back.facts == FACTS
    assert back.is_complete
    assert list(back.ring.events) == list(ring.events)
    assert all(same_step(one, other) for one, other in zip(back.ring.steps, ring.steps, strict=True))
    assert np.array_equal(back.ring.block_maps[0].blocks, ring.block_maps[0].blocks)
    assert recording.dumps(back.ring, back.facts) == data
    for request_id in ring.request_ids():
        assert explain(back.ring, request_id) == explain(ring, request_id)
    assert chrome_trace(back.ring) == chrome_trace(ring)


def test_a_steady_step_is_short() -> None:
    ring = EventRing()
    core = make_core(ring, num_blocks=60)
    for i in range(6):
        core.add_request(f"r{i}", [i], SamplingParams(max_tokens=25))
    while core.has_unfinished:
        core.step()
    rows = [dict(zip(recording.STEP_FIELDS, row, strict=True)) for row in recording.step_rows(ring.steps)]
    assert len(rows) == 25
    for name, short in (("rows", None), ("num_scheduled_tokens", 1), ("sampled", None)):
        assert {row[name] for row in rows[1:]} == {short}, name


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON document, its containers included."""
    found = [path]
    if isinstance(document, dict):
        items: Any = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    else:
        items = ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


@pytest.fixture(scope="module")
def small_recording() -> bytes:
    ring = EventRing()
    core = make_core(ring, max_num_batched_tokens=8)
    core.add_request("r", [1, 2, 3] * 5, SamplingParams(max_tokens=3))
    core.add_request("s", [1, 2, 3] * 5, SamplingParams(max_tokens=3))
    while core.has_unfinished:
        core.step()
    ring.on_snapshot(core.snapshot())
    return recording.dumps(ring, {"model": "fake"})


@given(data=st.data())
def test_a_damaged_recording_is_refused_or_harmless(small_recording: bytes, data: st.DataObject) -> None:
    document = json.loads(small_recording)
    path = data.draw(st.sampled_from(places(document)[1:]))
    value = data.draw(st.sampled_from([None, -1, -2, 1 << 31, 1 << 70, 1.5, 1e300, "", "x", True, [], [[]], {}, [-1]]))
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    try:
        back = recording.loads(json.dumps(document))
    except ConfigError:
        return
    # What is accepted must be as good as any.
    for request_id in list(back.ring.request_ids()):
        explain(back.ring, request_id)
    chrome_trace(back.ring, num_blocks=NUM_BLOCKS)
    recording.dumps(back.ring, back.facts)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "a list of 0"),
        (b'{"octavo_recording":1,"octavo_recording":1}', "given twice"),
        (b'{"steps": NaN}', "NaN"),
        (b"[" * 100_000, "nested"),
    ],
)
def test_what_is_no_recording(text: bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        recording.loads(text)


def test_an_unknown_version_and_a_gap_are_named(small_recording: bytes) -> None:
    document = json.loads(small_recording)
    with pytest.raises(ConfigError, match=r"octavo_recording is 4; allowed: 1, 2, 3"):
        recording.loads(json.dumps(document | {"octavo_recording": 4}))
    del document["steps"][1]
    with pytest.raises(ConfigError, match=r"steps\[1\].step is 2; allowed: 1"):
        recording.loads(json.dumps(document))


@given(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), max_size=60))
def test_runs_of_blocks_are_the_blocks(states: list[int]) -> None:
    runs = recording.block_runs(np.array(states, dtype=np.uint8))
    assert [state for count, state in zip(runs[::2], runs[1::2], strict=True) for _ in range(count)] == states
    assert all(one != other for one, other in zip(runs[1::2], runs[3::2], strict=False))


def test_a_feed_tells_everything_once(ring_and_run: tuple[EventRing, Run]) -> None:
    _, run = ring_and_run
    ring = EventRing()
    metrics = Metrics(model_name="fake", num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN)
    feed = LiveFeed(ring, metrics)
    snapshot = run.core.snapshot()
    steps: list[Any] = []
    events: list[Any] = []
    for i, event in enumerate(run.log.events):
        for recorder in (ring, metrics):
            (recorder.on_step if isinstance(event, StepEvent) else recorder.on_request)(event)  # type: ignore[arg-type]
        if i % 7 == 0 or event is run.log.events[-1]:
            message = json.loads(json.dumps(feed.next(snapshot), allow_nan=False))
            steps += message["steps"]
            events += message["requests"]
    assert [row[0] for row in steps] == [event.step for event in ring.steps]
    assert events == json.loads(json.dumps(recording.event_rows(ring.events)))
    assert message["step_fields"] == list(StepEvent._fields)
    assert message["event_fields"] == list(RequestEvent._fields)
    assert len(ring.block_maps) == 1, "a picture that does not change is kept once"
    late = LiveFeed(ring, metrics).next(snapshot)
    assert len(late["steps"]) == min(256, len(ring.steps))


def test_a_snapshot_says_who_holds_what() -> None:
    core = make_core(None, max_num_seqs=3, num_blocks=12)
    prompt = list(range(8))
    core.add_request("a", prompt, SamplingParams(max_tokens=30))
    core.step()
    core.add_request("b", [*prompt, 1], SamplingParams(max_tokens=1))
    core.step()
    for name in ("c", "d", "e"):
        core.add_request(name, list(range(50, 90)), SamplingParams(max_tokens=4), stream=True)
    core.step()
    snapshot = core.snapshot()
    states = [BlockState(state) for state in snapshot.blocks]
    pool = core.scheduler.kv.pool
    for block, state in enumerate(states, 1):
        cached = pool.cached_entry(block) is not None
        references = min(2, pool.ref_counts[block])
        free = BlockState.CACHED if cached else BlockState.FREE
        assert state == (free, BlockState.PRIVATE, BlockState.SHARED)[references]
    assert [sequence.request_id for sequence in snapshot.running] == ["a"]
    (running,) = snapshot.running
    assert running.num_tokens == running.num_computed_tokens + 1
    assert [(sequence.request_id, sequence.reason.value) for sequence in snapshot.waiting] == [
        ("c", "no blocks free"),
        ("d", "behind others in the queue"),
        ("e", "behind others in the queue"),
    ]
    assert snapshot.num_waiting == 3
    assert all(sequence.waited_s > 0 for sequence in snapshot.waiting)
    assert len(core.scheduler.snapshot(max_waiting=2).waiting) == 2
    message = json.loads(json.dumps(recording.snapshot_json(snapshot)))
    assert sum(message["counts"].values()) == 12
    assert message["counts"]["free"] == states.count(BlockState.FREE)


def test_shared_blocks_are_seen() -> None:
    core = make_core(None)
    core.add_request("r", list(range(20)), SamplingParams(max_tokens=5, n=3))
    for _ in range(3):
        core.step()
    states = core.snapshot().blocks.tolist()
    assert states.count(BlockState.SHARED) == 4
    while core.has_unfinished:
        core.step()
    assert set(core.snapshot().blocks.tolist()) == {BlockState.FREE, BlockState.CACHED}
    core.scheduler.reset_prefix_cache()
    assert set(core.snapshot().blocks.tolist()) == {BlockState.FREE}


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
def test_a_chrome_trace_is_well_formed(max_steps_in_flight: int) -> None:
    ring = EventRing()
    run = busy_run(ring, max_steps_in_flight=max_steps_in_flight)
    trace = json.loads(json.dumps(chrome_trace(ring, num_blocks=NUM_BLOCKS), allow_nan=False))
    tracks: dict[tuple[int, int], list[tuple[float, float, str]]] = defaultdict(list)
    named: set[tuple[int, int]] = set()
    waits: dict[str, list[str]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["dur"], event["name"]))
        elif event["ph"] == "M" and event["name"] == "thread_name":
            assert event["tid"] not in {tid for _, tid in named} | {0}
            named.add((event["pid"], event["tid"]))
        elif event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        elif event["ph"] in "be":
            waits[event["id2"]["local"]].append(event["ph"])
    assert tracks.keys() <= named
    assert all(phases == ["b", "e"] for phases in waits.values())
    for (pid, tid), slices in tracks.items():
        # A viewer draws what is inside something else below it: halves that stick out would be lost.
        open_until: list[float] = []
        for start, duration, name in sorted(slices, key=lambda each: (each[0], -each[1])):
            while open_until and open_until[-1] <= start + 1e-6:
                open_until.pop()
            end = start + duration
            assert not open_until or end <= open_until[-1] + 1e-6, f"{name} sticks out on {pid}/{tid}"
            open_until.append(end)
    steps = [each for each in tracks[1, 1] + tracks[1, 4] if each[2].startswith("step")]
    assert (len(tracks[1, 4]) > 0) == (max_steps_in_flight == 2)
    assert len(steps) == len(ring.steps)
    decoded = [name for (pid, _), slices in tracks.items() if pid == 2 for _, _, name in slices]
    num_decoded = sum(int(name.split()[1]) for name in decoded if name.startswith("decode "))
    num_prefilled = sum(int(name.split()[1]) for name in decoded if name.startswith("prefill "))
    num_run = sum(int(event.num_scheduled_tokens.sum()) for event in ring.steps)
    num_wasted = run.core.scheduler.stats.num_wasted_tokens
    assert num_wasted == sum(event.num_wasted_tokens for event in ring.steps)
    assert num_prefilled <= num_run <= num_prefilled + num_decoded + num_wasted + 40
    assert num_decoded <= sum(run.num_heard.values())


def test_a_trace_of_nothing() -> None:
    assert chrome_trace(EventRing())["otherData"] == {"is_complete": True}


def test_a_crash_bundle_has_no_contents_and_only_its_owner_reads_it(
    ring_and_run: tuple[EventRing, Run], tmp_path: Path
) -> None:
    ring, run = ring_and_run
    snapshot = run.core.snapshot()
    try:
        raise RuntimeError("the device is lost")
    except RuntimeError as error:
        path = write_bundle(tmp_path, ring, FACTS | {"secret": ["sk-123"]}, error, snapshot=snapshot)
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    text = path.read_text()
    assert "sk-123" not in text
    bundle = json.loads(text)
    assert bundle["error"]["type"] == "RuntimeError"
    assert bundle["error"]["message"] == "the device is lost"
    assert any("test_a_crash_bundle" in place for place in bundle["error"]["traceback"])
    assert {"python", "numpy", "torch"} <= bundle["versions"].keys()
    assert bundle["snapshot"]["num_waiting"] == 0
    back = recording.loads(json.dumps(bundle["recording"]))
    assert list(back.ring.events) == list(ring.events)
    assert not {"token_ids", "prompt", "text"} & {str(place[-1]) for place in places(bundle)[1:]}


def test_a_full_disk_is_no_second_crash(
    ring_and_run: tuple[EventRing, Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring, _ = ring_and_run
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with caplog.at_level(logging.ERROR):
            assert write_bundle(tmp_path, ring, FACTS, "gone") is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    assert len(caplog.records) == 1
    assert write_bundle(tmp_path / "not there", ring, FACTS, "gone") is None
    assert write_bundle(tmp_path, ring, FACTS, "gone") is not None


def test_the_last_step_of_an_engine_is_told() -> None:
    ring = EventRing()
    core = make_core(ring)
    assert isinstance(core.runner, FakeRunner)
    for i in range(MAX_FAILED_STEPS):
        core.add_request(f"r{i}", [1, 2], SamplingParams(max_tokens=3))
        core.runner.fail_next = "before"
        if i < MAX_FAILED_STEPS - 1:
            core.step()
    with pytest.raises(EngineDeadError):
        core.step()
    assert [bool(event.failed) for event in ring.steps] == [True] * MAX_FAILED_STEPS
    assert [len(event.sampled) for event in ring.steps] == [0] * MAX_FAILED_STEPS
    explanation = explain(ring, f"r{MAX_FAILED_STEPS - 1}")
    assert explanation is not None
    assert explanation["choices"][0]["finish_reason"] == "error"


def test_many_pictures_are_bounded() -> None:
    ring = EventRing(max_block_maps=3)
    for i in range(9):
        ring.on_snapshot(KVSnapshot(float(i), np.array([i % 2], dtype=np.uint8), 0, [], []))
    assert [each.time_s for each in ring.block_maps] == [6.0, 7.0, 8.0]
