"""This module holds what one step contains and what becomes of it, with outputs made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from octavo.engine.errors import ConfigError, RequestError
from octavo.engine.request import RequestStatus
from octavo.engine.scheduler.batch import split_budget
from octavo.engine.step import FinishReason, LogprobEntry

from .building import Clock, limits, make_request, make_scheduler, output_for, step


def test_a_prompt_runs_whole_then_one_token_at_a_time() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 10, max_tokens=3)])
    work, said = step(scheduler)
    assert work.new_sequences[0].token_ids.tolist() == list(scheduler.rows.token_ids[0, :10])
    assert (work.num_tokens, work.num_decodes, work.sampled.tolist()) == (10, 1, [0])
    assert work.block_columns.tolist() == [0, 1, 2]
    assert said == []
    work, said = step(scheduler)
    assert (work.num_tokens, work.num_computed_tokens.tolist()) == (1, [10])
    assert not work.new_sequences
    assert not len(work.block_ids)
    work, (end,) = step(scheduler)
    assert end.new_token_ids == [7, 7, 7]
    assert end.finish_reason == FinishReason.LENGTH
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None
    assert scheduler.stats.num_free_blocks == 32


def test_a_long_prompt_runs_in_chunks_and_samples_once_at_their_end() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add([make_request("a", 40)])
    counts = [step(scheduler)[0] for _ in range(4)]
    assert [work.num_tokens for work in counts] == [16, 16, 8, 1]
    assert [work.num_computed_tokens[0] for work in counts] == [0, 16, 32, 40]
    assert [len(work.sampled) for work in counts] == [0, 0, 1, 1]


def test_decodes_come_first_and_a_long_prompt_gets_the_rest() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20)
    scheduler.add([make_request("a", 3)])
    step(scheduler)
    scheduler.add([make_request("long", 60)])
    work, _ = step(scheduler)
    assert work.num_scheduled_tokens.tolist() == [1, 19]
    scheduler.add([make_request("b", 5)])
    work, _ = step(scheduler)
    assert work.num_scheduled_tokens.tolist() == [1, 19]
    step(scheduler)
    work, _ = step(scheduler)
    assert [scheduler.rows.request(row).request_id for row in work.rows.tolist()] == ["a", "long", "b"]
    assert work.num_scheduled_tokens.tolist() == [1, 3, 5]
    assert (work.num_decodes, work.num_decode_tokens, work.sampled.tolist()) == (3, 9, [0, 1, 2])


def test_rows_with_more_than_sixteen_tokens_come_last() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("long", 17)])
    scheduler.add([make_request("short", 16)])
    work, _ = step(scheduler)
    assert work.num_scheduled_tokens.tolist() == [16, 17]
    assert (work.num_decodes, work.num_decode_tokens) == (1, 16)
    assert scheduler.rows.request(int(work.rows[0])).request_id == "short"


@pytest.mark.parametrize(
    ("todo", "budget", "expected"),
    [
        ([1, 1, 1], 3, [1, 1, 1]),
        ([9, 1, 9, 1], 12, [9, 1, 1, 1]),
        ([9, 1, 9], 4, [3, 1, 0]),
        ([5, 5], 100, [5, 5]),
        ([1, 8], 2, [1, 1]),
        ([], 4, []),
    ],
)
def test_the_budget_is_split(todo: list[int], budget: int, expected: list[int]) -> None:
    counts = split_budget(np.array(todo, dtype=np.int32), budget)
    assert counts.tolist() == expected
    assert counts.dtype == np.int32


def test_steady_decode_hands_out_the_same_arrays() -> None:
    scheduler = make_scheduler(block_size=64)
    for name in "abc":
        scheduler.add([make_request(name, 5)])
    step(scheduler)
    first, _ = step(scheduler)
    second, _ = step(scheduler)
    assert first.rows is second.rows
    assert first.sampled is second.sampled
    assert first.num_scheduled_tokens is second.num_scheduled_tokens
    assert second.num_computed_tokens.tolist() == [6, 6, 6]


def test_a_stop_token_ends_a_sequence_and_is_kept() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 4, stop_token_ids=frozenset({9}))])
    scheduler.add([make_request("b", 5, stop_token_ids=frozenset({8}))])
    step(scheduler)
    _, (end,) = step(scheduler, token=9)
    assert (end.request_id, end.new_token_ids, end.stop_reason) == ("a", [7, 9], 9)
    assert end.finish_reason == FinishReason.STOP
    assert [request.request_id for request in scheduler.running_requests()] == ["b"]


def test_max_tokens_of_one_ends_with_the_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 4, max_tokens=1)])
    scheduler.add([make_request("b", 4, max_tokens=2)])
    _, (end,) = step(scheduler)
    assert (end.request_id, end.new_token_ids, end.finish_reason) == ("a", [7], FinishReason.LENGTH)
    work, (end,) = step(scheduler)
    assert (end.request_id, end.new_token_ids) == ("b", [7, 7])
    assert work.removed_rows.tolist() == [0]


def test_a_stream_says_each_token_once() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 4, max_tokens=3, stream=True)])
    said = [step(scheduler, token=token)[1] for token in (5, 6, 8)]
    assert [[output.new_token_ids for output in outputs] for outputs in said] == [[[5]], [[6]], [[8]]]
    assert said[1][0].finish_reason is None
    assert said[2][0].finish_reason == FinishReason.LENGTH


def test_log_probabilities_leave_with_their_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 4, max_tokens=3, stream=True, params={"logprobs": 0})])
    for token in (5, 6, 8):
        entry = LogprobEntry(-float(token), 1, [token], [-float(token)])
        _, (said,) = step(scheduler, token=token, logprobs={0: entry})
        assert (said.new_token_ids, said.new_logprobs) == ([token], [entry])


def test_a_stop_string_cuts_what_was_not_said_yet() -> None:
    scheduler = make_scheduler()
    params = {"logprobs": 0, "return_hidden_states": [0]}
    scheduler.add([make_request("a", 4, params=params)])
    entry = LogprobEntry(-1.0, 1, [7], [-1.0])
    for _ in range(3):
        step(scheduler, logprobs={0: entry}, hidden_states={0: np.ones((1, 2), dtype=np.float32)})
    end = scheduler.finish("a", 0, 1)
    assert end is not None
    assert (end.new_token_ids, end.new_logprobs) == ([7], [entry])
    assert end.hidden_states is not None
    assert end.hidden_states.shape == (1, 1, 2)


def test_a_stop_string_cuts_what_was_said_already() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 4, stream=True, params={"logprobs": 0})])
    entry = LogprobEntry(-1.0, 1, [7], [-1.0])
    for _ in range(3):
        step(scheduler, logprobs={0: entry})
    end = scheduler.finish("a", 0, 1)
    assert end is not None
    assert (end.new_token_ids, end.new_logprobs, end.finish_reason) == ([], [], FinishReason.STOP)
    assert scheduler.finish("a", 0, 1) is None
    assert not scheduler.has_unfinished


def test_abort_ends_all_choices_wherever_they_are() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add([make_request("a", 6, index=i) for i in range(3)])
    scheduler.add([make_request("b", 6)])
    step(scheduler)
    ends = scheduler.abort("a")
    assert sorted(end.index for end in ends) == [0, 1, 2]
    assert {end.finish_reason for end in ends} == {FinishReason.ABORT}
    assert scheduler.abort("a") == []
    scheduler.check_integrity()
    work, _ = step(scheduler)
    assert (work.removed_rows.tolist(), work.new_sequences[0].row) == ([0], 0)


def test_abort_in_the_middle_of_a_chunked_prompt_frees_its_blocks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add([make_request("a", 40)])
    step(scheduler)
    scheduler.abort("a")
    scheduler.check_integrity()
    assert scheduler.stats.num_free_blocks == 32


def test_abort_while_the_step_runs_leaves_the_others_alone() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add([make_request(name, 6, max_tokens=2 if name == "b" else 10)])
    step(scheduler)
    work = scheduler.schedule()
    assert work is not None
    scheduler.abort("b")
    scheduler.update(work, output_for(work, token=9))
    scheduler.check_integrity()
    assert [request.request_id for request in scheduler.running_requests()] == ["a", "c"]
    assert scheduler.rows.num_tokens[[0, 2]].tolist() == [8, 8]
    assert scheduler.stats.num_free_blocks == 32 - 4


def test_a_row_that_is_not_finite_ends_alone_and_leaves_nothing_in_the_cache() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 9, max_tokens=1)])
    scheduler.add([make_request("b", 9)])
    work = scheduler.schedule()
    assert work is not None
    (end,) = scheduler.update(work, output_for(work, failed=np.array([True, False])))
    scheduler.check_integrity()
    assert (end.request_id, end.finish_reason, end.new_token_ids) == ("a", FinishReason.ERROR, [])
    assert end.error is not None
    assert "finite" in end.error
    assert scheduler.stats.num_cached_blocks == 2, "only those of b"


def test_a_failed_row_takes_its_earlier_chunks_out_of_the_cache() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add([make_request("a", 24)])
    step(scheduler)
    assert scheduler.stats.num_cached_blocks == 4
    step(scheduler, failed=np.array([True]))
    assert scheduler.stats.num_cached_blocks == 0


def test_a_step_that_raised_ends_its_rows_and_no_others() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add([make_request(name, 9)])
    work = scheduler.schedule()
    assert work is not None
    ends = scheduler.fail(work, "the device is gone")
    scheduler.check_integrity()
    assert [(end.request_id, end.error) for end in ends] == [("a", "the device is gone"), ("b", "the device is gone")]
    assert scheduler.stats.num_cached_blocks == 0
    work, _ = step(scheduler)
    assert [new.row for new in work.new_sequences] == [1]
    assert sorted(work.removed_rows.tolist()) == [0, 1]


def test_rows_removed_by_a_step_that_raised_are_removed_again() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 9, max_tokens=1)])
    scheduler.add([make_request("b", 9)])
    step(scheduler)
    work = scheduler.schedule()
    assert work is not None
    assert work.removed_rows.tolist() == [0]
    scheduler.fail(work, "no")
    scheduler.add([make_request("c", 9)])
    work, _ = step(scheduler)
    assert sorted(work.removed_rows.tolist()) == [0, 1]


def test_what_can_never_run_is_refused_whole() -> None:
    scheduler = make_scheduler(num_blocks=8)
    with pytest.raises(RequestError, match="32 by the KV cache") as refused:
        scheduler.add([make_request("a", 30, max_tokens=3)])
    assert refused.value.param == "max_tokens"
    with pytest.raises(RequestError, match="128 by the context"):
        scheduler.add([make_request("a", 120, max_tokens=9)])
    scheduler.add([make_request("a", 30, max_tokens=2)])
    with pytest.raises(RequestError, match="'a'"):
        scheduler.add([make_request("a", 3)])
    assert scheduler.stats.num_waiting == 1


def test_an_id_may_be_used_again_once_its_request_has_ended() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 3, max_tokens=1)])
    step(scheduler)
    scheduler.add([make_request("a", 3, max_tokens=1)])
    assert step(scheduler)[1][0].finish_reason == FinishReason.LENGTH


def test_prompt_logprobs_are_joined_over_chunks_and_never_doubled_by_preemption() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, num_blocks=16, max_num_seqs=2)
    request = make_request("a", 20, params={"prompt_logprobs": 0})
    scheduler.add([request])

    def entries(start: int, end: int) -> dict[int, list[LogprobEntry]]:
        return {0: [LogprobEntry(float(-i), 1, [], []) for i in range(start, min(end, 19))]}

    step(scheduler, prompt_logprobs=entries(0, 8))
    step(scheduler, prompt_logprobs=entries(8, 16))
    scheduler._preempt(0)
    scheduler.check_integrity()
    for start in (0, 8, 16):
        work, _ = step(scheduler, prompt_logprobs=entries(start, start + 8))
        assert work.num_computed_tokens.tolist() == [start], "no prefix hit as long as entries are owed"
    assert [entry.logprob for entry in request.prompt_logprobs] == [float(-i) for i in range(19)]
    scheduler._preempt(0)
    work, _ = step(scheduler)
    assert work.num_computed_tokens.tolist() == [20], "nothing is owed any more: its own blocks are found"


def test_tokens_are_counted_by_what_they_were_for() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add([make_request("a", 20, max_tokens=3)])
    while scheduler.has_unfinished:
        step(scheduler)
    assert (scheduler.stats.num_prefill_tokens, scheduler.stats.num_output_tokens) == (20, 3)


def test_times_are_read_from_the_injected_clock() -> None:
    scheduler = make_scheduler()
    clock = scheduler._clock
    assert isinstance(clock, Clock)
    clock.now = 1.0
    scheduler.add([make_request("a", 5, max_tokens=2)])
    clock.now = 2.0
    work = scheduler.schedule()
    assert work is not None
    clock.now = 3.0
    scheduler.update(work, output_for(work))
    clock.now = 4.0
    _, (end,) = step(scheduler)
    assert end.metrics is not None
    assert end.metrics.arrival_time_s == 1.0
    assert end.metrics.first_scheduled_time_s == 2.0
    assert end.metrics.first_token_time_s == 3.0
    assert end.metrics.finish_time_s == 4.0


def test_a_storm_of_cancellations_leaves_no_heap_behind() -> None:
    scheduler = make_scheduler()
    for i in range(1000):
        scheduler.add([make_request(f"r{i}", 4)])
    for i in range(999):
        scheduler.abort(f"r{i}")
    assert len(scheduler.waiting) == 1
    assert len(scheduler.waiting._heap) <= 32
    work, _ = step(scheduler)
    assert scheduler.rows.request(int(work.rows[0])).request_id == "r999"


def test_the_queue_keeps_its_order_when_the_dead_are_swept_out() -> None:
    scheduler = make_scheduler(max_num_seqs=1, policy="priority")
    priorities = {f"r{i}": i * 83 % 200 for i in range(200)}
    for request_id, priority in priorities.items():
        scheduler.add([make_request(request_id, 4, max_tokens=1, priority=priority)])
    kept = [request_id for i, request_id in enumerate(priorities) if i % 4 == 3]
    for request_id in priorities:
        if request_id not in kept:
            scheduler.abort(request_id)
    ended = [step(scheduler)[1][0].request_id for _ in kept]
    assert ended == sorted(kept, key=priorities.__getitem__)
    assert not scheduler.has_unfinished


def test_choices_are_served_by_their_index() -> None:
    scheduler = make_scheduler()
    template = make_request("a", 3)
    requests = [make_request("a", 3, index=i) for i in range(3)]
    for request in requests:
        request.arrival = template.arrival
    scheduler.add(requests)
    step(scheduler)
    assert [request.index for request in scheduler.running_requests()] == [0, 1, 2]


def test_update_must_belong_to_the_step_in_flight() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", 4)])
    old, _ = step(scheduler)
    scheduler.schedule()
    with pytest.raises(AssertionError, match="before update"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="in flight is step 1"):
        scheduler.update(old, output_for(old))


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs is 8; allowed: at most max_num_batched_tokens, 4"):
        limits(max_num_batched_tokens=4)
    with pytest.raises(ConfigError, match="num_blocks is 0"):
        limits(num_blocks=0)
    with pytest.raises(ConfigError, match="eos_token_ids"):
        limits(eos_token_ids=frozenset({1000}))


def test_a_request_knows_its_end() -> None:
    assert RequestStatus.FINISHED_STOPPED.is_finished
    assert not RequestStatus.PREEMPTED.is_finished
    assert RequestStatus.RUNNING.finish_reason is None
