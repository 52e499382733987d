"""This module checks who is in an engine and what each of them holds, without steps."""

from __future__ import annotations

import pytest
from octavo.engine.request import RequestStatus
from octavo.engine.scheduler.flights import Flights
from octavo.engine.scheduler.roster import End, Roster

from .building import limits, make_request

STOPPED = End(RequestStatus.FINISHED_STOPPED)


def make_roster() -> Roster:
    """Return a roster in which "a" and "b" wait."""
    roster = Roster(limits(), Flights())
    for name in "ab":
        roster.add([make_request(name, 9, stream=name == "a")], 1.0)
    return roster


def test_a_sequence_comes_and_goes_with_all_that_is_kept_by_row() -> None:
    roster = make_roster()
    request = roster.requests["a"][0]
    for num_preemptions in range(2):
        sequence = roster.admit(request, roster.kv.look_up(request), 2.0)
        roster.kv.grow(sequence.row, 3)
        assert (request.status, request.row, roster.num_streaming) == (RequestStatus.RUNNING, sequence.row, 1)
        assert roster.order.is_running[sequence.row]
        assert roster.without_first_token == {sequence.row: request}
        if num_preemptions == 0:
            roster.preempt(sequence.row)
            assert roster.waiting.head() is request
        else:
            assert roster.end(request, STOPPED, 3.0).finish_reason == "stop"
        assert (request.row, roster.num_streaming, roster.without_first_token) == (-1, 0, {})
        assert not roster.order.is_running.any()
        assert roster.kv.pool.num_free == limits().num_blocks
        assert roster.take_removed_rows().tolist() == [sequence.row]
        assert roster.take_removed_rows().tolist() == []
    assert (roster.num_preemptions, request.first_scheduled_time_s, list(roster.requests)) == (1, 2.0, ["b"])


def test_a_sequence_that_waits_ends_without_a_row() -> None:
    roster = make_roster()
    roster.end(roster.requests["a"][0], STOPPED, 3.0)
    assert (len(roster.waiting), list(roster.requests), roster.removed_rows) == (1, ["b"], [])


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    roster = make_roster()
    request = roster.requests["b"][0]
    with pytest.raises(AssertionError, match="b overtakes a"):
        roster.admit(request, roster.kv.look_up(request), 2.0)
