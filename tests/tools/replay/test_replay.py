"""This module holds replays of simulated runs: equal ones, changed ones, small ones. It does not know servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo.engine.core import EngineCore
from octavo.engine.errors import ConfigError
from octavo.engine.events import OWES_LOGPROBS
from octavo.engine.observe import recording
from octavo.engine.observe.crash import write_bundle
from octavo.engine.observe.ring import EventRing
from octavo.engine.request import Request
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler, block_owners
from octavo.engine.scheduler.block_owners import SPARE, BlockOwners
from octavo.engine.scheduler.block_pool import CachedBlock
from octavo.engine.tools.replay import Script, read_bundle, replay, shrink

from ...observe.runs import make_core
from ...simulation.planted import PLANTED
from ...simulation.scenario import Scenario
from .recorded import facts_of_limits, script_of, simulated

UNSEEN = {"hash without parent", "hash without salt", "wrong slot at block edge", "output lost at the end"}
"""Bugs in what is in a block, or where, or what is said: none of it is in a recording."""


def ran_out(core: EngineCore) -> EngineCore:
    while core.has_unfinished:
        core.step()
    return core


def test_simulated_runs_replay_to_the_same_schedule(count: Callable[[int, int], int], seed: int) -> None:
    different = []
    for i in range(count(20, 300)):
        _, data = simulated(Scenario.from_seed(seed + i).replace(overlap=i % 2 == 1))
        script = script_of(data)
        found = replay(script).difference
        if found is not None:
            different.append(f"seed {seed + i}: {found.lines(script)}")
    assert not different, "\n".join(different)


def test_blocks_have_one_name_where_their_contents_are_equal(count: Callable[[int, int], int]) -> None:
    num_shared = 0
    for seed in range(count(5, 60)):
        simulation, data = simulated(Scenario.from_seed(seed).with_settings(["prefix_caching=True"]))
        script, size = script_of(data), simulation.limits.block_size
        by_content: dict[tuple[str, tuple[int, ...]], set[tuple[int, int]]] = {}
        by_name: dict[tuple[int, int], set[tuple[str, tuple[int, ...]]]] = {}
        for event in script.arrivals.values():
            sequence = simulation.sequences[event.request_id, event.choice]
            tokens = sequence.prompt + sequence.tokens
            was_admitted = any(entry[0] == event.serial for step in script.steps for entry in step.facts["admitted"])
            for block in range((len(tokens) - 1) // size if was_admitted else 0):
                content = sequence.salt, tuple(tokens[: (block + 1) * size])
                by_content.setdefault(content, set()).add(script.node(event.serial, block))
                by_name.setdefault(script.node(event.serial, block), set()).add(content)
        num_shared += sum(owner != serial for serial, runs in script.kin.items() for owner, _, _ in runs)
        assert [names for names in by_content.values() if len(names) > 1] == [], f"seed {seed}"
        assert [contents for contents in by_name.values() if len(contents) > 1] == [], f"seed {seed}"
    assert num_shared > 50


def test_a_later_turn_finds_the_answers_of_earlier_ones() -> None:
    ring = EventRing()
    core = make_core(ring, num_blocks=200)
    tokens = [7] * 9
    for turn in range(4):
        core.add_request(f"turn-{turn}", tokens, SamplingParams(max_tokens=11, seed=1, ignore_eos=True))
        (said,) = [output for _ in range(12) for output in core.step()]
        tokens = [*tokens, *said.new_token_ids, 3, 4]
    script = script_of(recording.dumps(ring, facts_of_limits(core.scheduler.limits)))
    hits = [entry[2] for step in script.steps for entry in step.facts["admitted"]]
    assert hits == [0, 16, 32, 44]
    assert replay(script).difference is None


def test_a_recording_says_nothing_of_the_words() -> None:
    """Other tokens in the same places make the same recording, to the last byte."""
    shared = list(range(1, 21))
    prompts = [[*shared, *range(30 + 7 * i, 37 + 7 * i)] for i in range(6)] + [shared[:9], shared]

    def record(table: list[int]) -> bytes:
        ring = EventRing()
        core = make_core(ring, num_blocks=24)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=10, seed=i, ignore_eos=True)
            core.add_request(f"r{i}", [table[token] for token in prompt], params)
        return recording.dumps(ring, facts_of_limits(ran_out(core).scheduler.limits))

    data = record(list(range(100)))
    assert record([(57 * i + 11) % 499 for i in range(100)]) == data
    assert b'"kin"' in data
    assert any(script_of(data).kin.values())


@pytest.mark.parametrize("name", sorted(PLANTED.keys() - UNSEEN))
def test_a_planted_bug_shows_and_shrinks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = PLANTED[name]
    scenarios = [Scenario.from_seed(i).with_settings(bug.settings) for i in (1, 3, 4)]
    scripts = [script_of(simulated(scenario)[1]) for scenario in scenarios]
    with monkeypatch.context() as patch:
        bug.plant(patch)
        found = [(script, difference) for script in scripts if (difference := replay(script).difference) is not None]
        assert found, "the schedule is the same"
        script, difference = found[0]
        minimal = shrink(script, difference)
        assert minimal.script.num_requests <= min(12, script.num_requests - 1)
        small = script_of(json.dumps(minimal.recording).encode())
        again = replay(small)
        assert again.difference is not None
        assert again.difference.place == len(small.steps) - 1
        assert again.difference.matches(difference)
        assert small.num_requests == minimal.script.num_requests
    assert replay(small).difference is None, "the small one differs without the bug"


def test_who_had_the_blocks_that_are_found_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """And who else was there: what a changed scheduler does without them says nothing of the old one."""
    ring = EventRing()
    core = make_core(ring, num_blocks=60)
    prompts = [list(range(20)), list(range(40, 60)), [*range(18), 90, 91], list(range(70, 90))]
    for name, prompt in zip(("owner", "other", "late", "beside"), prompts, strict=True):
        core.add_request(name, prompt, SamplingParams(max_tokens=2, seed=1, ignore_eos=True))
        if name != "late":
            ran_out(core)
    script = script_of(recording.dumps(ring, facts_of_limits(core.scheduler.limits)))
    admit = Scheduler._admit

    def refuse_late(self: Scheduler, counts: Any, blocks: Any) -> Any:
        head = self.waiting.head()
        return (counts, []) if head is not None and head.request_id == "late" else admit(self, counts, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "_admit", refuse_late)
        difference = replay(script).difference
        assert difference is not None
        small = script_of(json.dumps(shrink(script, difference).recording).encode())
    assert {event.request_id for event in small.arrivals.values()} == {"owner", "late", "beside"}
    assert replay(small).difference is None


def test_what_differs_is_the_first_thing() -> None:
    _, data = simulated(Scenario.from_seed(3))
    script = script_of(data)
    place = next(i for i, step in enumerate(script.steps) if i > 20 and step.facts["admitted"])
    serial, num_tokens, num_cached = script.steps[place].facts["admitted"][0]
    script.steps[place].facts["admitted"][0] = serial, num_tokens, num_cached + 4
    script.steps[place + 1].facts["num_free_blocks"] += 1
    outcome = replay(script)
    assert outcome.num_steps == place
    assert outcome.difference is not None
    title, recorded, here = outcome.difference.lines(script)
    assert title == "who is admitted"
    name = script.name(serial)
    assert recorded.split() == f"recorded {name} ({num_cached + 4} of {num_tokens} tokens cached)".split()
    assert here.split() == f"here {name} ({num_cached} of {num_tokens} tokens cached)".split()


def test_a_scheduler_that_raises_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    script = script_of(simulated(Scenario.from_seed(4).with_settings(PLANTED["oldest preempted"].settings))[1])
    preempt = Scheduler._preempt

    def broken(self: Scheduler, row: int) -> None:
        preempt(self, row)
        raise AssertionError("a row is lost")

    monkeypatch.setattr(Scheduler, "_preempt", broken)
    difference = replay(script).difference
    assert difference is not None
    assert difference.lines(script) == ["the scheduler raised an error: AssertionError('a row is lost')"]
    assert script.steps[difference.place].facts["preempted"]


def test_a_run_whose_beginning_is_lost_replays_from_a_quiet_moment() -> None:
    starts = []
    for seed in range(10):
        _, data = simulated(Scenario.from_seed(seed).with_settings(["num_blocks=128"]), max_steps=60)
        document = json.loads(data)
        if document["is_complete"]:
            continue
        try:
            script = script_of(data)
        except ConfigError:
            starts.append(0)
            continue
        outcome = replay(script)
        assert outcome.difference is None, f"seed {seed}: {outcome.difference.lines(script)}"
        assert script.previous is not None
        assert script.previous.step + 1 == script.steps[0].event.step > document["steps"][0][0]
        starts.append(script.steps[0].event.step)
    assert starts.count(0) >= 1
    assert sum(start > 0 for start in starts) >= 3


def test_what_was_cached_before_a_quiet_moment_is_found_after_it() -> None:
    ring = EventRing(max_steps=8)
    core = make_core(ring, num_blocks=60)
    prompts = [list(range(20)), [*range(12), 90, 91], list(range(40, 60)), [*range(12), 90, 91, 92, 93, 94, 95]]
    for i in (0, 1, 2, 3, 2, 3, 0):
        core.add_request(f"r{ring.num_steps}", prompts[i], SamplingParams(max_tokens=2, seed=i, ignore_eos=True))
        ran_out(core)
    script = script_of(recording.dumps(ring, facts_of_limits(core.scheduler.limits)))
    assert [entry[2] for step in script.steps for entry in step.facts["admitted"]] == [16, 16, 16]
    assert replay(script).difference is None


def test_a_reset_of_the_cache_is_replayed() -> None:
    ring = EventRing()
    core = make_core(ring)
    for i in range(4):
        core.add_request(f"r{i}", list(range(20)), SamplingParams(max_tokens=2, ignore_eos=True))
        if i == 2:
            core.scheduler.reset_prefix_cache()
        ran_out(core)
    assert [event.num_cache_resets for event in ring.steps if event.num_cache_resets] == [1]
    script = script_of(recording.dumps(ring, facts_of_limits(core.scheduler.limits)))
    assert [entry[2] for step in script.steps for entry in step.facts["admitted"]] == [0, 16, 0, 16]
    assert replay(script).difference is None


def test_who_owes_log_probabilities_finds_nothing() -> None:
    ring = EventRing()
    core = make_core(ring)
    for prompt_logprobs in (None, 0, None):
        params = SamplingParams(max_tokens=2, prompt_logprobs=prompt_logprobs, ignore_eos=True)
        core.add_request(f"r{ring.num_steps}", list(range(20)), params)
        ran_out(core)
    script = script_of(recording.dumps(ring, facts_of_limits(core.scheduler.limits)))
    assert [event.detail for event in script.arrivals.values()] == ["", OWES_LOGPROBS, ""]
    assert [entry[2] for step in script.steps for entry in step.facts["admitted"]] == [0, 0, 16]
    assert replay(script).difference is None


def test_a_crash_bundle_replays(tmp_path: Path) -> None:
    ring = EventRing()
    core = make_core(ring)
    for i in range(5):
        core.add_request(f"r{i}", list(range(i, 30)), SamplingParams(max_tokens=4, seed=i))
    for _ in range(6):
        core.step()
    path = write_bundle(tmp_path, ring, facts_of_limits(core.scheduler.limits), "the device is lost")
    assert path is not None
    script = Script.of(read_bundle(path))
    assert replay(script).num_steps == 6


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    document = json.loads(simulated(Scenario.from_seed(0))[1])
    old = document | {
        "octavo_recording": 1,
        "step_fields": document["step_fields"][:12],
        "event_fields": document["event_fields"][:10],
        "steps": [row[:12] for row in document["steps"]],
        "events": [row[:10] for row in document["events"] if row[9] != OWES_LOGPROBS],
    }
    assert recording.loads(json.dumps(old)).version == 1
    facts = document["facts"]
    for changed, words in (
        (old, "version 1"),
        (document | {"steps": [], "events": []}, "no steps"),
        (document | {"steps": document["steps"][5:9], "is_complete": False}, "requests were under way all the time"),
        (document | {"facts": {}}, "max_model_len is None"),
        (document | {"facts": facts | {"policy": "lifo"}}, "policy is 'lifo'"),
        (document | {"facts": facts | {"num_blocks": 1 << 30}}, "blocks"),
        (document | {"facts": facts | {"block_size": (1 << 31) - 1}}, "tokens in rows or blocks"),
        (document | {"facts": facts | {"num_blocks": 0}}, "num_blocks is 0"),
        (document | {"facts": facts | {"prefix_caching": 1}}, "prefix_caching is 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            script_of(json.dumps(changed).encode())
    (tmp_path / "x.json").write_text("[")
    for path in (tmp_path / "x.json", tmp_path / "gone.json"):
        with pytest.raises(ConfigError, match=path.name):
            read_bundle(path)


def test_a_damaged_recording_is_refused_with_the_step() -> None:
    document = json.loads(simulated(Scenario.from_seed(0))[1])
    fields, events = document["event_fields"], document["events"]
    kind, request_id, step = (fields.index(name) for name in ("kind", "request_id", "step"))
    place = next(i for i, row in enumerate(events) if row[kind] == "admitted")
    number = events[place][step]
    somebody = [*events[place]]
    somebody[request_id] = "somebody"
    for damaged, words in (
        ([*events[:place], somebody, *events[place + 1 :]], f"in step {number} 'somebody' never arrived"),
        ([*events[:place], *events[place + 1 :]], f"in step {number} a row runs that nobody was admitted to"),
    ):
        with pytest.raises(ConfigError, match=words):
            script_of(json.dumps(document | {"events": damaged}).encode())


def test_many_resets_of_the_cache_take_no_longer_than_one() -> None:
    document = json.loads(simulated(Scenario.from_seed(0))[1])
    document["steps"][0][document["step_fields"].index("num_cache_resets")] = (1 << 31) - 1
    assert replay(script_of(json.dumps(document).encode())).difference is None


def test_names_of_lost_blocks_are_dropped() -> None:
    kv = make_core(None).scheduler.kv
    owners = BlockOwners(kv)

    def come_and_go(*names: bytes) -> tuple[int, ...]:
        request = Request("r", 0, np.empty(0, dtype=np.int32), 0, 1, SamplingParams(), 0, digests=[b"root", *names])
        owners.enter(request)
        kin = owners.kin(request)
        owners.leave(request)
        return kin

    kv.pool.cache(kv.pool.take(), CachedBlock(b"found", b"root", b""))
    assert come_and_go(b"found", b"lost") == ()
    assert come_and_go(b"found", b"lost", b"own") == (0, 0, 2)
    for i in range(3 * SPARE):
        assert come_and_go(b"%d" % i) == ()
    assert len(owners._owners) == SPARE + kv.pool.num_blocks
    assert not owners._known
    assert come_and_go(b"found", b"lost") == (0, 0, 1)


@pytest.mark.parametrize("max_kin", [1, 2])
def test_a_conversation_of_many_turns_is_told_in_few_numbers(max_kin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out of one turn is found through those before it."""
    monkeypatch.setattr(block_owners, "MAX_KIN", max_kin)
    ring = EventRing()
    core = make_core(ring, num_blocks=200)
    turns: list[list[int]] = [[7] * 9, [7] * 9]
    for _ in range(6):
        for i, tokens in enumerate(turns):
            params = SamplingParams(max_tokens=11, seed=i, ignore_eos=True)
            core.add_request(f"r{ring.num_events}", tokens, params)
            (said,) = [output for _ in range(12) for output in core.step()]
            turns[i] = [*tokens, *said.new_token_ids, 3, 4]
    assert max(len(event.kin) for event in ring.events) == 3 * max_kin
    script = script_of(recording.dumps(ring, facts_of_limits(core.scheduler.limits)))
    assert max(len({owner for owner, _, _ in runs}) for runs in script.kin.values()) == 6
    assert replay(script).difference is None


def test_a_search_that_is_stopped_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    bug = PLANTED["oldest preempted"]
    script = script_of(simulated(Scenario.from_seed(4).with_settings(bug.settings))[1])
    bug.plant(monkeypatch)
    difference = replay(script).difference
    assert difference is not None
    tries: list[int] = []
    minimal = shrink(
        script, difference, on_try=lambda num, left: tries.append(left), should_stop=lambda: len(tries) > 1
    )
    assert len(tries) == 2
    assert minimal.script.num_requests <= script.num_requests
    again = replay(script_of(json.dumps(minimal.recording).encode())).difference
    assert again is not None
    assert again.matches(difference)


@pytest.mark.parametrize("name", ["oldest preempted", "preempted to the back"])
def test_a_planted_bug_shows_where_steps_overlap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = PLANTED[name]
    scripts = [
        script_of(simulated(Scenario.from_seed(i).with_settings([*bug.settings, "overlap=True"]))[1]) for i in (1, 3, 4)
    ]
    assert [replay(script).difference for script in scripts] == [None, None, None]
    bug.plant(monkeypatch)
    assert any(replay(script).difference is not None for script in scripts), "the schedule is the same"


def test_a_run_with_overlap_is_not_that_without() -> None:
    """A replay that took its steps one by one would see another schedule."""
    script = script_of(simulated(Scenario.from_seed(3).replace(overlap=True))[1])
    assert replay(script).difference is None
    one_by_one = replace(script, limits=replace(script.limits, max_steps_in_flight=1))
    assert replay(one_by_one).difference is not None
