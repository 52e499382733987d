"""This module holds the cases of prefix sharing that engines have shipped bugs in."""

from __future__ import annotations

import pytest
from octavo.engine.config import FaultConfig
from octavo.engine.scheduler import Scheduler

from .building import make_request, make_scheduler, step

PREFIX = list(range(100, 120))


def tables(scheduler: Scheduler) -> dict[str, list[int]]:
    return {r.request_id + str(r.index): scheduler.kv.tables[r.row] for r in scheduler.running_requests()}


def test_a_hit_of_exactly_the_whole_prompt_computes_the_last_token_again() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", PREFIX, max_tokens=1)])
    step(scheduler)
    assert scheduler.stats.num_cached_blocks == 5
    scheduler.add([make_request("b", PREFIX, max_tokens=1)])
    work, (end,) = step(scheduler)
    assert work.num_computed_tokens.tolist() == [16], "4 of the 5 full blocks"
    assert work.num_scheduled_tokens.tolist() == [4]
    assert end.metrics is not None
    assert end.metrics.num_cached_tokens == 16


@pytest.mark.parametrize(("length", "hit"), [(16, 12), (17, 16), (19, 16), (20, 16)])
def test_only_full_blocks_are_shared(length: int, hit: int) -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", PREFIX)])
    step(scheduler)
    scheduler.add([make_request("b", PREFIX[:length])])
    work, _ = step(scheduler)
    assert work.num_computed_tokens.tolist() == [20, hit]
    assert tables(scheduler)["a0"][: hit // 4] == tables(scheduler)["b0"][: hit // 4]
    assert not set(tables(scheduler)["a0"]) & set(tables(scheduler)["b0"][hit // 4 :])


def test_requests_that_share_a_prefix_in_one_step_compute_it_once() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=256)
    scheduler.add([make_request("a", [*PREFIX, 1, 2], index=i) for i in range(3)])
    for name in "bcd":
        scheduler.add([make_request(name, [*PREFIX, ord(name), 3])])
    work, _ = step(scheduler)
    assert work.num_scheduled_tokens.tolist() == [22], "the others wait for the prefix"
    work, _ = step(scheduler)
    assert work.num_computed_tokens.tolist() == [22, 20, 20, 20, 20, 20]
    assert work.num_tokens == 1 + 5 * 2
    shared = [table[:5] for table in tables(scheduler).values()]
    assert all(table == shared[0] for table in shared)


def test_who_waits_for_a_prefix_starts_when_its_maker_is_gone() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add([make_request("a", [*PREFIX, *range(200, 230)])])
    scheduler.add([make_request("b", [*PREFIX, 1])])
    step(scheduler)
    assert list(tables(scheduler)) == ["a0"]
    scheduler.abort("a")
    work, _ = step(scheduler)
    assert work.num_computed_tokens.tolist() == [16], "what a had computed is kept"
    assert not scheduler.kv.is_pending(None)


def test_who_waits_for_a_prefix_starts_when_its_maker_is_preempted() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add([make_request("a", [*PREFIX, *range(200, 230)])])
    scheduler.add([make_request("b", [*PREFIX, 1])])
    step(scheduler)
    scheduler._preempt(0)
    assert not scheduler.kv.has_pending
    work, _ = step(scheduler)
    assert tables(scheduler).keys() == {"a0"}, "nobody overtakes it"
    assert work.num_computed_tokens.tolist() == [16]


def test_a_prefix_computed_twice_survives_the_end_of_one_copy() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", PREFIX, params={"prompt_logprobs": 0})])
    scheduler.add([make_request("b", PREFIX, params={"prompt_logprobs": 0})])
    step(scheduler)
    assert not set(tables(scheduler)["a0"]) & set(tables(scheduler)["b0"])
    assert scheduler.stats.num_cached_blocks == 5, "the first copy is the one that is found"
    scheduler.abort("b")
    scheduler.check_integrity()
    scheduler.add([make_request("c", PREFIX)])
    step(scheduler)
    assert tables(scheduler)["c0"][:4] == tables(scheduler)["a0"][:4]


def test_a_preempted_request_resumes_onto_its_own_blocks() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", PREFIX)])
    for _ in range(3):
        step(scheduler)
    before = tables(scheduler)["a0"][:5]
    scheduler._preempt(0)
    scheduler.check_integrity()
    work, _ = step(scheduler)
    assert work.removed_rows.tolist() == [0]
    assert work.new_sequences[0].token_ids.tolist() == [*PREFIX, 7, 7, 7]
    assert work.num_computed_tokens.tolist() == [20]
    assert work.num_scheduled_tokens.tolist() == [3]
    assert tables(scheduler)["a0"][:5] == before
    assert scheduler.rows.request(0).num_cached_tokens == 0, "of the first admission"


def test_outputs_are_found_by_the_next_turn() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", PREFIX, max_tokens=6)])
    while scheduler.has_unfinished:
        step(scheduler)
    scheduler.add([make_request("b", [*PREFIX, *[7] * 6, 1, 2, 3])])
    work, _ = step(scheduler)
    assert work.num_computed_tokens.tolist() == [24]


def test_a_block_that_is_exactly_full_takes_a_new_one_for_the_next_token() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", PREFIX[:8])])
    work, _ = step(scheduler)
    assert work.block_columns.tolist() == [0, 1]
    work, _ = step(scheduler)
    assert (work.block_rows.tolist(), work.block_columns.tolist()) == ([0], [2])
    work, _ = step(scheduler)
    assert not len(work.block_ids)


def test_what_is_lost_first_is_the_end_of_a_prefix() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add([make_request("a", PREFIX, max_tokens=1)])
    step(scheduler)
    scheduler.add([make_request("b", 15, max_tokens=1)])
    step(scheduler)
    assert scheduler.stats.num_cached_blocks == 4 + 3, "b took the three that were not cached and one of a's"
    scheduler.add([make_request("c", [*PREFIX, 1])])
    work, _ = step(scheduler)
    assert work.num_computed_tokens.tolist() == [16]


def test_salts_share_nothing() -> None:
    scheduler = make_scheduler()
    for name, salt in (("a", ""), ("b", "x"), ("c", "x")):
        scheduler.add([make_request(name, PREFIX, cache_salt=salt)])
        step(scheduler)
    made = tables(scheduler)
    assert not set(made["a0"]) & set(made["b0"])
    assert made["b0"][:4] == made["c0"][:4]


def test_models_share_nothing() -> None:
    digests = []
    for model_id in ("one", "two"):
        scheduler = make_scheduler(model_id=model_id)
        request = make_request("a", PREFIX)
        scheduler.add([request])
        step(scheduler)
        digests.append(request.digests)
    assert not set(digests[0]) & set(digests[1])


def test_equal_blocks_after_different_prefixes_are_different() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", [1, 1, 1, 1, *PREFIX])])
    step(scheduler)
    scheduler.add([make_request("b", [2, 2, 2, 2, *PREFIX])])
    work, _ = step(scheduler)
    assert work.num_computed_tokens.tolist() == [24, 0]


def test_a_reset_cache_finds_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add([make_request("a", PREFIX)])
    step(scheduler)
    scheduler.reset_prefix_cache()
    scheduler.add([make_request("b", PREFIX)])
    work, _ = step(scheduler)
    assert work.num_computed_tokens.tolist() == [20, 0]


@pytest.mark.parametrize(
    "changes", [{"prefix_caching": False}, {"faults": FaultConfig(miss_prefix_cache=True)}], ids=["off", "missed"]
)
def test_without_hits_every_prompt_is_computed(changes: dict[str, object]) -> None:
    scheduler = make_scheduler(**changes)
    for name in "ab":
        scheduler.add([make_request(name, PREFIX)])
    work, _ = step(scheduler)
    assert work.num_scheduled_tokens.tolist() == [20, 20]
    assert scheduler.stats.prefix_cache_hits == 0


def test_hits_are_counted() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add([make_request(name, PREFIX)])
        step(scheduler)
    assert (scheduler.stats.prefix_cache_queries, scheduler.stats.prefix_cache_hits) == (40, 16)
