"""This module holds the loop from end to end over the fake runner: what goes in, what comes out, what fails alone."""

from __future__ import annotations

from typing import Any

import pytest
from octavo.engine.config import FaultConfig
from octavo.engine.core import MAX_FAILED_STEPS, EngineCore
from octavo.engine.errors import EngineDeadError, RequestError
from octavo.engine.runner.fake_runner import FakeRunner, InjectedError, reference_tokens
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler, SchedulerLimits
from octavo.engine.step import FinishReason, ModelOutput, SchedulerOutput, StepHandle

ALPHABET = 40
EOS = 3


def make_core(**changes: Any) -> EngineCore:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "max_model_len": 96,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "num_blocks": 64,
        "block_size": 4,
        "eos_token_ids": frozenset({EOS}),
    }
    limits = SchedulerLimits(**(sizes | changes))
    runner = FakeRunner(
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        alphabet=ALPHABET,
    )
    return EngineCore(Scheduler(limits, lambda: 0.0), runner, seed=5)


def run_out(core: EngineCore) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    while core.has_unfinished:
        for output in core.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.new_token_ids)
        core.scheduler.check_integrity()
    return tokens


def fake(core: EngineCore) -> FakeRunner:
    assert isinstance(core.runner, FakeRunner)
    return core.runner


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one at a time": {"max_num_seqs": 1},
    "chunks of 8": {"max_num_batched_tokens": 8},
    "small pool": {"num_blocks": 24},
    "no prefix cache": {"prefix_caching": False},
    "missed prefixes": {"faults": FaultConfig(miss_prefix_cache=True)},
    "preempted every third step": {"faults": FaultConfig(preempt_every=3)},
    "blocks of one": {"block_size": 1, "num_blocks": 128},
    "blocks of sixteen": {"block_size": 16, "num_blocks": 12},
    "priority": {"policy": "priority"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens_do_not_depend_on_how_they_were_scheduled(name: str) -> None:
    core = make_core(**CONFIGURATIONS[name])
    expected = {}
    for i in range(10):
        prompt = [9] * 12 + [i % 3] * (i % 5 + 1)
        params = SamplingParams(n=1 + i % 2, max_tokens=4 + 3 * i, seed=i % 4, priority=i % 3)
        core.add_request(f"r{i}", prompt, params, stream=i % 2 == 0)
        for index in range(params.n):
            expected[f"r{i}", index] = reference_tokens(
                prompt, 4 + 3 * i, seed=i % 4, index=index, alphabet=ALPHABET, stop_token_ids=frozenset({EOS})
            )
    assert run_out(core) == expected
    assert core.scheduler.stats.num_free_blocks == core.scheduler.limits.num_blocks


def test_choices_differ_and_repeat() -> None:
    answers = []
    for _ in range(2):
        core = make_core()
        core.add_request("a", [9, 8, 7], SamplingParams(n=3, max_tokens=12, ignore_eos=True))
        core.add_request("b", [9, 8, 7], SamplingParams(max_tokens=12, ignore_eos=True))
        answers.append(run_out(core))
    assert answers[0] == answers[1], "seeds are drawn from the engine's"
    assert len({tuple(tokens) for tokens in answers[0].values()}) == 4


def test_max_tokens_of_none_goes_to_the_end_of_the_context() -> None:
    core = make_core(num_blocks=10)
    core.add_request("a", [9, 8, 7], SamplingParams(ignore_eos=True))
    assert len(run_out(core)["a", 0]) == 40 - 3, "ten blocks of four hold less than the context"


def test_eos_is_ignored_only_where_asked() -> None:
    core = make_core()
    for name, ignore in (("stops", False), ("goes on", True)):
        core.add_request(name, [9, 8, 7], SamplingParams(max_tokens=90, seed=1, ignore_eos=ignore))
    tokens = run_out(core)
    assert len(tokens["goes on", 0]) == 90
    end = tokens["goes on", 0].index(EOS)
    assert tokens["stops", 0] == tokens["goes on", 0][: end + 1]


@pytest.mark.parametrize(
    ("prompt", "changes", "param"),
    [
        ([], {}, "prompt"),
        ([1] * 96, {}, "prompt"),
        ([1, 64], {}, "prompt"),
        ([1, -1], {}, "prompt"),
        ([1, 2**70], {}, "prompt"),
        ([1, 1.5], {}, "prompt"),
        (["1"], {}, "prompt"),
        ([[1]], {}, "prompt"),
        ([[1], [1, 2]], {}, "prompt"),
        ([None], {}, "prompt"),
        ([True], {}, "prompt"),
        ("abc", {}, "prompt"),
        ([1], {"max_tokens": 96}, "max_tokens"),
        ([1], {"stop_token_ids": [64]}, "stop_token_ids"),
    ],
)
def test_a_wrong_request_is_refused_and_leaves_nothing(prompt: Any, changes: dict[str, Any], param: str) -> None:
    core = make_core()
    with pytest.raises(RequestError) as refused:
        core.add_request("a", prompt, SamplingParams(**({"max_tokens": 1} | changes)))
    assert refused.value.param == param
    assert not core.has_unfinished
    core.add_request("a", [1], SamplingParams(max_tokens=1))


def test_salt_and_domain_both_separate_prefixes() -> None:
    core = make_core()
    prompt = list(range(10, 22))
    for i, (domain, salt) in enumerate([("", None), ("x", None), ("", "x"), ("1:", "x"), ("x", None)]):
        core.add_request(f"r{i}", prompt, SamplingParams(max_tokens=1, cache_salt=salt), cache_domain=domain)
        (end,) = core.step()
        assert end.metrics is not None
        assert end.metrics.num_cached_tokens == (8 if i == 4 else 0), (domain, salt)


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on() -> None:
    core = make_core()
    core.add_request("a", [9, 8], SamplingParams(max_tokens=5, seed=1))
    fake(core).fail_next = "after"
    (end,) = core.step()
    assert end.finish_reason == FinishReason.ERROR
    assert end.error is not None
    assert "told to fail" in end.error
    core.add_request("a", [9, 8], SamplingParams(max_tokens=5, seed=1, ignore_eos=True))
    assert run_out(core) == {("a", 0): reference_tokens([9, 8], 5, seed=1, alphabet=ALPHABET)}
    assert core.scheduler.stats.num_free_blocks == 64


def test_an_engine_whose_steps_all_fail_is_dead() -> None:
    core = make_core()
    for i in range(MAX_FAILED_STEPS):
        core.add_request(f"r{i}", [9, 8], SamplingParams(max_tokens=5))
        fake(core).fail_next = "before"
        if i < MAX_FAILED_STEPS - 1:
            core.step()
    with pytest.raises(EngineDeadError, match="InjectedError") as dead:
        core.step()
    assert isinstance(dead.value.__cause__, InjectedError)


def test_failures_that_are_not_in_a_row_kill_nobody() -> None:
    core = make_core()
    for i in range(2 * MAX_FAILED_STEPS):
        core.add_request(f"r{i}", [9, 8], SamplingParams(max_tokens=1))
        if i % MAX_FAILED_STEPS != 0:
            fake(core).fail_next = "before"
        core.step()
    assert not core.has_unfinished


def test_an_interrupt_ends_the_step_but_not_the_engine() -> None:
    core = make_core()
    runner = core.runner

    class Interrupted:
        def execute(self, step: SchedulerOutput) -> ModelOutput:
            raise KeyboardInterrupt

    core.add_request("a", [9, 8], SamplingParams(max_tokens=5))
    core.runner = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        core.step()
    core.runner = runner
    assert core.has_unfinished, "nobody has been told yet"
    (end,) = core.step()
    assert (end.request_id, end.finish_reason) == ("a", FinishReason.ERROR)
    assert not core.has_unfinished
    core.add_request("b", [9, 8], SamplingParams(max_tokens=5, seed=1, ignore_eos=True))
    assert run_out(core)["b", 0] == reference_tokens([9, 8], 5, seed=1, alphabet=ALPHABET)


def test_a_neighbour_that_is_not_finite_changes_nobody() -> None:
    core = make_core()
    for name in "ab":
        core.add_request(name, [9, 8, ord(name) % 5], SamplingParams(max_tokens=12, seed=1, ignore_eos=True))
    core.step()
    fake(core).nan_rows = {0}
    (end,) = core.step()
    assert (end.request_id, end.finish_reason, len(end.new_token_ids)) == ("a", FinishReason.ERROR, 1)
    expected = reference_tokens([9, 8, ord("b") % 5], 12, seed=1, alphabet=ALPHABET)
    assert run_out(core)["b", 0] == expected


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_extras_are_complete_whatever_the_schedule(name: str) -> None:
    def ask(core: EngineCore) -> None:
        for other in range(4):
            core.add_request(f"o{other}", [other] * 20, SamplingParams(max_tokens=20, ignore_eos=True, seed=1))
        params = SamplingParams(
            max_tokens=30, seed=2, logprobs=0, prompt_logprobs=0, return_hidden_states=[0, 1], ignore_eos=True
        )
        core.add_request("a", [9, 8, 7, 6, 5] * 5, params)

    outputs = []
    for core in (make_core(), make_core(**CONFIGURATIONS[name])):
        ask(core)
        while core.has_unfinished:
            outputs += [output for output in core.step() if output.request_id == "a"]
    plain, other = outputs
    assert len(plain.new_logprobs) == 30
    assert [entry.top_ids for entry in other.prompt_logprobs or []] == [[i] for i in ([9, 8, 7, 6, 5] * 5)[1:]]
    assert plain.prompt_logprobs == other.prompt_logprobs
    assert plain.new_logprobs == other.new_logprobs
    assert plain.hidden_states is not None
    assert other.hidden_states is not None
    assert plain.hidden_states.shape == (30, 2, 1)
    assert (plain.hidden_states == other.hidden_states).all()


class Device:
    """A runner that starts steps when it is told to and ends them when they are waited for, in the order of both."""

    def __init__(self, core: EngineCore) -> None:
        self.runner = fake(core)
        self.out: list[int] = []
        self.log: list[str] = []
        self.at_execute: dict[int, BaseException] = {}
        self.at_wait: dict[int, BaseException] = {}
        core.runner = self

    def execute(self, step: SchedulerOutput) -> StepHandle:
        self.log.append(f"execute {step.step}")
        if step.step in self.at_execute:
            raise self.at_execute.pop(step.step)
        device, output = self, self.runner.execute(step)
        self.out.append(step.step)

        class Handle:
            def wait(self) -> ModelOutput:
                assert device.out.pop(0) == step.step
                device.log.append(f"wait {step.step}")
                if step.step in device.at_wait:
                    raise device.at_wait.pop(step.step)
                return output

        return Handle()


def overlapped(**changes: Any) -> tuple[EngineCore, Device]:
    core = make_core(max_steps_in_flight=2, **changes)
    return core, Device(core)


def test_a_step_is_handed_out_before_the_one_before_it_is_waited_for() -> None:
    core, device = overlapped()
    core.add_request("a", [9, 8], SamplingParams(max_tokens=4, seed=1, ignore_eos=True), stream=True)
    said = [core.step() for _ in range(4)]
    assert [len(output.new_token_ids) for outputs in said for output in outputs] == [1, 1, 1, 1]
    assert " ".join(device.log) == "execute 0 execute 1 wait 0 execute 2 wait 1 execute 3 wait 2 wait 3"
    assert not core.has_unfinished, "who is certain to end is not run again"
    assert core.scheduler.stats.num_wasted_tokens == 0


def test_a_stop_is_known_a_step_late_and_nobody_hears_of_it() -> None:
    core, device = overlapped()
    core.add_request("stops", [9, 8, 7], SamplingParams(max_tokens=90, seed=1), stream=True)
    expected = reference_tokens([9, 8, 7], 90, seed=1, alphabet=ALPHABET, stop_token_ids=frozenset({EOS}))
    assert len(expected) < 90
    heard = []
    while core.scheduler.requests:
        heard += [token for output in core.step() for token in output.new_token_ids]
    assert heard == expected
    assert core.has_unfinished, "a step with it is out"
    assert core.scheduler.stats.num_free_blocks == 64, "and nobody waits for its blocks"
    core.add_request("next", [9, 8, 7], SamplingParams(max_tokens=2, seed=1, ignore_eos=True))
    assert run_out(core) == {("next", 0): expected[:2]}
    assert core.scheduler.stats.num_wasted_tokens == 1
    assert device.out == []


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_overlap_changes_no_token(name: str) -> None:
    tokens, stats = [], []
    for num_steps in (1, 2):
        core = make_core(max_steps_in_flight=num_steps, **CONFIGURATIONS[name])
        Device(core)
        for i in range(10):
            params = SamplingParams(n=1 + i % 2, max_tokens=4 + 3 * i, seed=i % 4, priority=i % 3)
            core.add_request(f"r{i}", [9] * 12 + [i % 3] * (i % 5 + 1), params, stream=i % 2 == 0)
        tokens.append(run_out(core))
        stats.append(core.scheduler.stats)
    assert tokens[0] == tokens[1]
    assert stats[0].num_output_tokens == stats[1].num_output_tokens
    assert stats[0].num_wasted_tokens == 0 < stats[1].num_wasted_tokens


@pytest.mark.parametrize("where", ["execute", "wait"])
def test_what_fails_fails_in_its_turn(where: str) -> None:
    core, device = overlapped()
    for name, max_tokens in (("short", 2), ("long", 9)):
        core.add_request(name, [9, 8], SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True))
    (device.at_execute if where == "execute" else device.at_wait)[2] = InjectedError("the device is gone")
    assert core.step() == []
    (short,) = core.step()
    assert (short.request_id, short.finish_reason) == ("short", FinishReason.LENGTH), "step 1 is none the worse"
    (long,) = core.step()
    assert (long.request_id, long.finish_reason) == ("long", FinishReason.ERROR)
    assert "the device is gone" in (long.error or "")
    core.add_request("next", [9, 8], SamplingParams(max_tokens=5, seed=1, ignore_eos=True))
    assert run_out(core) == {("next", 0): reference_tokens([9, 8], 5, seed=1, alphabet=ALPHABET)}
    assert core.scheduler.stats.num_free_blocks == 64
    assert device.out == []


@pytest.mark.parametrize("where", ["execute", "wait"])
def test_an_interrupt_loses_no_step_that_is_out(where: str) -> None:
    core, device = overlapped()
    core.add_request("a", [9, 8], SamplingParams(max_tokens=3, seed=1, ignore_eos=True), stream=True)
    (device.at_execute if where == "execute" else device.at_wait)[1] = KeyboardInterrupt()
    heard = core.step() if where == "wait" else []
    with pytest.raises(KeyboardInterrupt):
        core.step()
    while core.has_unfinished:
        heard += core.step()
    assert [output.finish_reason for output in heard] == [None, FinishReason.ERROR]
    assert heard[0].new_token_ids == reference_tokens([9, 8], 1, seed=1, alphabet=ALPHABET)
    assert "interrupted" in (heard[1].error or "")
    core.add_request("b", [9, 8], SamplingParams(max_tokens=5, seed=1, ignore_eos=True))
    assert run_out(core)["b", 0] == reference_tokens([9, 8], 5, seed=1, alphabet=ALPHABET)


def test_steps_that_fail_in_a_row_kill_with_one_still_out() -> None:
    core, device = overlapped()
    core.add_request("old", [9, 8], SamplingParams(max_tokens=50, seed=1, ignore_eos=True))
    core.step()
    for i in range(MAX_FAILED_STEPS):
        core.add_request(f"r{i}", [9, i], SamplingParams(max_tokens=50, seed=1, ignore_eos=True))
        device.at_wait[2 + i] = InjectedError("the device is gone")
    core.step()
    for i in range(1, MAX_FAILED_STEPS):
        assert all(end.finish_reason == FinishReason.ERROR for end in core.step())
        core.add_request(f"s{i}", [9, i], SamplingParams(max_tokens=50, seed=1, ignore_eos=True))
    with pytest.raises(EngineDeadError, match="the device is gone"):
        core.step()


def test_a_row_is_given_away_while_a_step_with_it_is_out() -> None:
    core, _ = overlapped(max_num_seqs=1)
    for name, seed in (("a", 1), ("b", 2)):
        core.add_request(name, [9, 8, 7], SamplingParams(max_tokens=6, seed=seed, ignore_eos=True), stream=True)
    core.step()
    core.abort("a")
    tokens = run_out(core)
    assert tokens == {("b", 0): reference_tokens([9, 8, 7], 6, seed=2, alphabet=ALPHABET)}
    assert core.scheduler.stats.num_wasted_tokens == 1
