"""This module holds who is preempted when blocks run out, who comes back first, and that everybody ends."""

from __future__ import annotations

import pytest
from octavo.engine.config import FaultConfig
from octavo.engine.request import RequestStatus
from octavo.engine.scheduler import Scheduler

from .building import make_request, make_scheduler, output_for, step


def names(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.running_requests()]


def run_out(scheduler: Scheduler, max_steps: int = 500) -> int:
    for count in range(max_steps):
        if not scheduler.has_unfinished:
            return count
        step(scheduler)
    raise AssertionError(f"{scheduler.stats} after {max_steps} steps")


def test_the_last_in_order_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=8)
    first, second = make_request("a", 12, max_tokens=20), make_request("b", 11, max_tokens=8)
    scheduler.add([first])
    scheduler.add([second])
    step(scheduler)
    scheduler.add([make_request("c", 3, max_tokens=2)])
    while names(scheduler) != ["a"]:
        step(scheduler)
    assert second.status == RequestStatus.PREEMPTED
    assert second.num_preemptions == 1
    assert scheduler.waiting.head() is second
    while second.status == RequestStatus.PREEMPTED:
        assert "c" not in names(scheduler), "nobody overtakes a preempted request"
        step(scheduler)
    run_out(scheduler)
    assert first.num_preemptions == 0, "the oldest is never preempted for a younger one"


def test_a_lone_request_may_fill_the_whole_pool() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add([make_request("a", 16, max_tokens=16)])
    assert run_out(scheduler) == 16
    assert scheduler.stats.num_preemptions == 0


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_requests_that_together_need_far_more_than_the_pool_all_end(block_size: int) -> None:
    scheduler = make_scheduler(num_blocks=48 // block_size, block_size=block_size)
    for i in range(12):
        scheduler.add([make_request(f"r{i}", 5 + i, max_tokens=25)])
    run_out(scheduler)
    assert scheduler.stats.num_preemptions > 0
    assert scheduler.stats.num_free_blocks == 48 // block_size


def test_a_row_that_cannot_have_all_its_blocks_takes_what_there_is_or_stands_still() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=16)
    scheduler.add([make_request("a", 30, max_tokens=2)])
    step(scheduler)
    pool = scheduler.kv.pool
    held = [pool.take() for _ in range(2)]
    work = scheduler.schedule()
    assert work is not None
    assert work.num_scheduled_tokens.tolist() == [8]
    assert not len(work.sampled)
    scheduler.fail(work, "not what this test is about")
    pool.release(held)
    scheduler.check_integrity()

    scheduler.add([make_request("b", 8)])
    step(scheduler)
    held = [pool.take() for _ in range(pool.num_free)]
    assert scheduler.schedule() is None, "b stands still"
    pool.release(held)
    work, _ = step(scheduler)
    assert work.num_computed_tokens.tolist() == [8]


def test_a_request_starts_only_when_its_whole_prompt_would_fit() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=16)
    scheduler.add([make_request("a", 8, max_tokens=4)])
    step(scheduler)
    scheduler.add([make_request("b", 24, max_tokens=2)])
    scheduler.add([make_request("c", 2, max_tokens=2)])
    step(scheduler)
    assert names(scheduler) == ["a"], "b needs seven blocks of five, and c does not overtake it"
    run_out(scheduler)
    assert scheduler.stats.num_preemptions == 0


def test_a_prompt_that_stands_still_is_not_taken_for_a_decode() -> None:
    scheduler = make_scheduler(num_blocks=16, max_num_batched_tokens=16)
    scheduler.add([make_request("a", 5)])
    step(scheduler)
    scheduler.add([make_request("b", 30, max_tokens=2)])
    step(scheduler)
    pool = scheduler.kv.pool
    held = [pool.take() for _ in range(pool.num_free)]
    for expected in ([1, 1], [1]):
        work = scheduler.schedule()
        assert work is not None
        assert work.num_scheduled_tokens.tolist() == expected
        scheduler.update(work, output_for(work))
    pool.release(held)
    work, _ = step(scheduler)
    assert work.num_scheduled_tokens.tolist() == [1, 14]


@pytest.mark.parametrize(("num_blocks", "starts"), [(8, False), (9, True)])
def test_the_block_a_row_takes_next_is_not_given_to_a_new_one(num_blocks: int, starts: bool) -> None:
    scheduler = make_scheduler(num_blocks=num_blocks)
    scheduler.add([make_request("a", 7)])
    step(scheduler)
    scheduler.add([make_request("b", 23, max_tokens=1)])
    step(scheduler)
    assert ("b" in scheduler.requests) != starts, "a has 8 tokens in 2 blocks and needs a third; b needs six"
    run_out(scheduler)
    assert scheduler.stats.num_preemptions == 0


def test_a_hundredth_of_the_pool_stays_free_beside_others() -> None:
    scheduler = make_scheduler(num_blocks=200, max_num_batched_tokens=1000, max_model_len=1000)
    scheduler.add([make_request("a", 3)])
    step(scheduler)
    scheduler.add([make_request("b", 4 * 198 - 1, max_tokens=2)])
    step(scheduler)
    assert names(scheduler) == ["a"]
    scheduler.abort("b")
    scheduler.add([make_request("c", 4 * 196 - 1, max_tokens=2)])
    step(scheduler)
    assert names(scheduler) == ["a", "c"]


def test_under_fcfs_priority_means_nothing() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 5), ("c", -5)):
        scheduler.add([make_request(name, 3, max_tokens=1, priority=priority)])
    ended = [step(scheduler)[1][0].request_id for _ in range(3)]
    assert ended == ["a", "b", "c"]


def test_under_priority_the_smaller_comes_first_and_is_served_first() -> None:
    scheduler = make_scheduler(max_num_seqs=3, policy="priority")
    for name, priority in (("a", 1), ("b", 2)):
        scheduler.add([make_request(name, 3, priority=priority)])
    step(scheduler)
    for name, priority in (("d", 9), ("c", 0)):
        scheduler.add([make_request(name, 3, priority=priority)])
    step(scheduler)
    assert names(scheduler) == ["c", "a", "b"]
    work, _ = step(scheduler)
    assert [scheduler.rows.request(row).request_id for row in work.rows.tolist()] == ["c", "a", "b"]


def test_forced_preemption_never_stops_progress() -> None:
    scheduler = make_scheduler(faults=FaultConfig(preempt_every=1, miss_prefix_cache=True), max_num_batched_tokens=8)
    for name in "abc":
        scheduler.add([make_request(name, 20, max_tokens=6)])
    run_out(scheduler)
    assert scheduler.stats.num_preemptions >= 3
