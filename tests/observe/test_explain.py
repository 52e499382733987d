"""This module holds explanations against the log of a run, and their words. It does not know HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from octavo.engine.events import EventKind, Moment, RequestEvent, StepEvent, WaitReason
from octavo.engine.observe.explain import explain, summaries
from octavo.engine.observe.history import HeadWaits, StepTable, lives
from octavo.engine.observe.ring import EventRing
from octavo.engine.sampling_params import SamplingParams

from .runs import Log, Run, Told, busy_run, make_core, replay

NEWS_S = 0.05
"""The clock goes on by a millisecond whenever it is read: from an end in the update of a step to the step's own."""


@pytest.fixture(scope="module", params=[1, 2], ids=["one by one", "overlap"])
def ring_and_run(request: pytest.FixtureRequest) -> tuple[EventRing, Run]:
    ring = EventRing()
    return ring, busy_run(ring, max_steps_in_flight=request.param)


def check_phases(choice: dict[str, Any], told: Told) -> None:
    """Check that no two of a sequence's waits and chunks are at the same time, and that tokens follow them."""
    chunks, tick_s = choice["chunks"], 1e-5
    phases = [(wait["at_s"], wait["seconds"]) for wait in choice["waits"]]
    phases += zip(chunks["at_s"], chunks["seconds"], strict=True)
    for (at_s, seconds), (next_s, _) in pairwise([*sorted(phases), (choice["seconds"] + 1.0, 0.0)]):
        assert -tick_s < seconds <= next_s - at_s + tick_s, choice
    for at_s, seconds in phases:
        assert at_s + seconds <= choice["seconds"] + NEWS_S
    if told.token_times and not told.preempted:
        assert chunks["at_s"][-1] + chunks["seconds"][-1] == pytest.approx(choice["time_to_first_token_s"], abs=tick_s)
    if told.token_times and told.finished is not None and told.finished.moment == Moment.UPDATE:
        assert 0 < choice["tokens"]["at_s"][-1] - choice["seconds"] <= NEWS_S or told.finished.detail == "error"


def test_every_number_of_every_request_equals_the_log(ring_and_run: tuple[EventRing, Run]) -> None:
    ring, run = ring_and_run
    num_chunks = num_recomputed = 0
    for (request_id, index), told in replay(run.log).items():
        explanation = explain(ring, request_id)
        assert explanation is not None
        choice = explanation["choices"][index]
        start_s = told.arrived.time_s
        assert choice["choice"] == index
        assert choice["state"] == "finished"
        assert choice["is_complete"]
        assert told.finished is not None
        assert choice["finish_reason"] == told.finished.detail
        assert choice["output_tokens"] == told.finished.num_tokens
        assert choice["prompt_tokens"] == told.arrived.num_tokens
        assert choice["max_tokens"] == told.arrived.max_tokens
        assert choice["seconds"] == pytest.approx(told.finished.time_s - start_s)
        assert choice["tokens"]["step"] == told.token_steps
        assert choice["tokens"]["at_s"] == pytest.approx([time_s - start_s for time_s in told.token_times])
        assert [event.row for event in told.admitted] == choice["rows"]
        # What ran is the chunks, then a token at a time.
        num_run = sum(count for _, count in told.entries)
        chunks = choice["chunks"]
        num_decoded = len(told.entries) - len(chunks["step"])
        assert num_run == sum(chunks["num_tokens"]) + num_decoded
        assert set(zip(chunks["step"], chunks["num_tokens"], strict=True)) <= set(told.entries)
        num_chunks += len(chunks["step"])
        num_owed = sum(event.num_tokens - event.num_cached_tokens for event in told.admitted)
        if told.token_times and not told.preempted:
            assert sum(chunks["num_tokens"]) == num_owed
        assert sum(chunks["num_tokens"]) <= num_owed
        if told.admitted:
            first = told.admitted[0]
            assert choice["cached_tokens"] == first.num_cached_tokens
            assert choice["queued_s"] == pytest.approx(first.time_s - start_s)
        if told.token_times:
            assert choice["time_to_first_token_s"] == pytest.approx(told.token_times[0] - start_s)
        assert [each["lost_tokens"] for each in choice["preemptions"]] == [e.num_tokens for e in told.preempted]
        for each, lost, resumed in zip(choice["preemptions"], told.preempted, told.admitted[1:], strict=False):
            assert each["recomputed_tokens"] == max(0, lost.num_tokens - resumed.num_cached_tokens)
            assert each["queued_s"] == pytest.approx(resumed.time_s - lost.time_s)
            num_recomputed += each["recomputed_tokens"]
        for wait in choice["waits"]:
            assert sum(wait["reasons"].values()) == pytest.approx(wait["seconds"], abs=1e-5)
        check_phases(choice, told)
        json.dumps(explanation, allow_nan=False)
    assert num_chunks > 50
    assert num_recomputed > 50


def test_it_works_while_the_request_waits_and_runs() -> None:
    ring = EventRing()
    core = make_core(ring, max_num_seqs=1)
    core.add_request("first", [1] * 10, SamplingParams(max_tokens=5))
    core.add_request("second", [2] * 50, SamplingParams(max_tokens=5))
    core.step()
    core.step()
    first, second = (explain(ring, name)["choices"][0] for name in ("first", "second"))
    assert (first["state"], second["state"]) == ("running", "waiting")
    assert first["output_tokens"] == len(first["tokens"]["step"]) == 2
    assert list(second["waits"][0]["reasons"]) == ["no row free", "on its way into a step"]
    assert second["queued_s"] > 0
    assert any("Has been queued for" in sentence for sentence in second["sentences"])
    assert explain(ring, "nobody") is None
    much_later = explain(ring, "second", now_s=1000.0)["choices"][0]
    assert much_later["queued_s"] == pytest.approx(1000.0 - core.scheduler.requests["second"][0].arrival_time_s)


def test_it_says_it_in_words() -> None:
    ring = EventRing()
    core = make_core(ring, num_blocks=18, max_num_batched_tokens=24)
    core.add_request("warm", list(range(24)), SamplingParams(max_tokens=1))
    while core.has_unfinished:
        core.step()
    core.add_request("older", [7] * 4, SamplingParams(max_tokens=40))
    core.step()
    core.add_request("r", [*range(20), *[9] * 20], SamplingParams(max_tokens=20))
    core.add_request("behind", [3] * 40, SamplingParams(max_tokens=1))
    while core.has_unfinished:
        core.step()
    sentences = explain(ring, "r")["choices"][0]["sentences"]
    text = " ".join(sentences)
    assert "Arrived with 40 tokens, for at most 20 more." in sentences
    assert "Prefix hit: 20/40 tokens were in the cache." in sentences
    assert "Preempted in step" in text
    assert "computed again after" in text
    assert sentences[-1].endswith("with 20 tokens: length.")
    behind = " ".join(explain(ring, "behind")["choices"][0]["sentences"])
    assert "no blocks free" in behind, behind


def test_it_says_what_has_left_the_ring(ring_and_run: tuple[EventRing, Run]) -> None:
    _, run = ring_and_run
    small = EventRing(max_steps=70, max_requests=40)
    for event in run.log.events:
        (small.on_step if isinstance(event, StepEvent) else small.on_request)(event)  # type: ignore[arg-type]
    assert len(small.steps) == 70
    assert len(small.events) == 160
    assert not small.is_complete
    complete = []
    for request_id in small.request_ids():
        explanation = explain(small, request_id)
        assert explanation is not None
        for choice in explanation["choices"]:
            complete.append(choice["is_complete"])
            assert choice["is_complete"] == ("no longer known" not in choice["sentences"][0])
            assert choice["is_complete"] or choice["time_to_first_token_s"] is None
    assert {True, False} == set(complete)


def test_the_ring_is_bounded_and_finds_what_it_has(ring_and_run: tuple[EventRing, Run]) -> None:
    _, run = ring_and_run
    small = EventRing(max_steps=7, max_requests=3)
    for event in run.log.events:
        (small.on_step if isinstance(event, StepEvent) else small.on_request)(event)  # type: ignore[arg-type]
        by_scan = {e.request_id for e in small.events}
        assert set(small.request_ids()) == by_scan
        assert len(small.events) <= small.max_events == 12
        assert len(small.steps) <= 7
    for request_id in small.request_ids():
        assert small.events_of(request_id) == [e for e in small.events if e.request_id == request_id]
    events = [e for e in run.log.events if isinstance(e, RequestEvent)]
    steps = [e for e in run.log.events if isinstance(e, StepEvent)]
    assert small.events_after(len(events) - 5) == events[-5:]
    assert small.events_after(0) == events[-12:]
    assert small.events_after(len(events)) == []
    assert [e.step for e in small.steps_after(len(steps) - 3)] == [e.step for e in steps[-3:]]
    copy = small.copy()
    small.on_request(events[0])
    assert list(copy.events) == events[-12:]
    assert copy.events_of(events[-1].request_id) != []


def test_an_id_that_is_used_again_is_a_new_life() -> None:
    ring = EventRing()
    core = make_core(ring)
    for max_tokens in (2, 5):
        core.add_request("again", [1, 2, 3], SamplingParams(max_tokens=max_tokens))
        while core.has_unfinished:
            core.step()
    explanation = explain(ring, "again")
    assert explanation is not None
    assert [choice["output_tokens"] for choice in explanation["choices"]] == [5]
    assert len(lives(ring.events)) == 2


def test_reasons_share_the_time_of_the_queue() -> None:
    """The head's reasons follow each other without a gap as long as it is refused in every step."""
    log = Log()
    busy = busy_run(log, seed=3)
    waits = HeadWaits(e for e in busy.log.events if isinstance(e, RequestEvent)).waits
    assert len(waits) > 20
    for one, other in pairwise(waits):
        assert one.end_s is not None
        assert one.event.time_s <= one.end_s <= other.event.time_s
    whole = HeadWaits(e for e in busy.log.events if isinstance(e, RequestEvent)).between(0.0, 1e6)
    assert sum(whole.values()) == pytest.approx(1e6)


def test_reasons_by_hand() -> None:
    def event(kind: EventKind, time_s: float, request_id: str, detail: str = "") -> RequestEvent:
        return RequestEvent(kind, time_s, 0, request_id, 0, detail=detail)

    waits = HeadWaits(
        [
            event(EventKind.ARRIVED, 0.0, "a"),
            event(EventKind.WAITS, 1.0, "a", WaitReason.NO_ROW),
            event(EventKind.FINISHED, 2.0, "b"),
            event(EventKind.WAITS, 4.0, "a", WaitReason.NO_BLOCKS),
            event(EventKind.ADMITTED, 8.0, "a"),
            event(EventKind.WAITS, 16.0, "c", WaitReason.NO_BLOCKS),
            event(EventKind.FINISHED, 32.0, "c"),
            event(EventKind.WAITS, 64.0, "d", WaitReason.PREFIX),
        ]
    )
    arrived = WaitReason.NEXT_STEP
    assert waits.between(0.0, 8.0) == {WaitReason.NO_BLOCKS: 4.0, WaitReason.NO_ROW: 3.0, arrived: 1.0}
    assert list(waits.between(0.0, 8.0)) == [WaitReason.NO_BLOCKS, WaitReason.NO_ROW, arrived]
    assert waits.between(2.0, 5.0) == {WaitReason.NO_ROW: 2.0, WaitReason.NO_BLOCKS: 1.0}
    assert waits.between(7.0, 20.0) == {arrived: 8.0, WaitReason.NO_BLOCKS: 5.0}
    assert waits.between(33.0, 40.0) == {arrived: 7.0}
    assert waits.between(60.0, 70.0) == {WaitReason.PREFIX: 6.0, arrived: 4.0}
    assert waits.between(50.0, 50.0) == {arrived: 0.0}


def test_a_line_for_each_request(ring_and_run: tuple[EventRing, Run]) -> None:
    ring, run = ring_and_run
    lines = summaries(ring, 1000)
    assert [line["request_id"] for line in lines] == list(ring.request_ids())
    assert [line["request_id"] for line in summaries(ring, 3)] == [line["request_id"] for line in lines[:3]]
    told = replay(run.log)
    for line in lines:
        mine = [told_ for (request_id, _), told_ in told.items() if request_id == line["request_id"]]
        assert line["num_choices"] == len(mine)
        assert line["state"] == "finished"
        assert line["output_tokens"] == sum(told_.finished.num_tokens for told_ in mine)
        assert line["num_preemptions"] == sum(len(told_.preempted) for told_ in mine)
    json.dumps(lines, allow_nan=False)


def test_a_table_of_no_steps_is_no_error() -> None:
    def events() -> Iterator[RequestEvent]:
        core_log = Log()
        core = make_core(core_log)
        core.add_request("r", [1], SamplingParams(max_tokens=1))
        core.step()
        yield from (e for e in core_log.events if isinstance(e, RequestEvent))

    (life,) = lives(events())
    assert len(StepTable([]).runs_of(life.stays[0]).places) == 0
    ring = EventRing()
    for event in events():
        ring.on_request(event)
    explanation = explain(ring, "r")
    assert explanation is not None
    assert explanation["choices"][0]["output_tokens"] == 1
