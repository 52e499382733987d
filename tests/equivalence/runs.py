"""This module holds runs of an engine and their comparison, up to ties or bit by bit. It does not know what differs
between two runs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from octavo.engine.llm import LLM, GenerationProgress
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import CompletionOutput, LogprobEntry, RequestOutput

NEAR_TIE = 1e-3
"""Gap between the two likeliest tokens below which rounding may choose, outside invariant mode."""


class Task(NamedTuple):
    """One request."""

    prompt: list[int]
    params: SamplingParams


def run(
    llm: LLM, tasks: Sequence[Task], on_progress: Callable[[GenerationProgress], None] | None = None
) -> list[RequestOutput]:
    """Run requests in one batch, with the scheduler's invariants checked after every step and nothing left at the end.

    Args:
        llm: idle.
        tasks: the requests.
        on_progress: called after every step as well.
    """
    scheduler = llm.engine.core.scheduler

    def check(progress: GenerationProgress) -> None:
        scheduler.check_integrity()
        if on_progress is not None:
            on_progress(progress)

    answers = llm.generate([task.prompt for task in tasks], [task.params for task in tasks], on_progress=check)
    if scheduler.has_unfinished:  # where steps overlap, one may be out whose every row has ended meanwhile
        llm.step()
    assert_idle(llm)
    return answers


def assert_idle(llm: LLM) -> None:
    """Assert that nothing runs or waits and every block is free."""
    scheduler = llm.engine.core.scheduler
    scheduler.check_integrity()
    stats = scheduler.stats
    assert not scheduler.has_unfinished
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == scheduler.limits.num_blocks


def run_alone(llm: LLM, tasks: Sequence[Task]) -> list[RequestOutput]:
    """Run requests one after the other."""
    return [run(llm, [task])[0] for task in tasks]


def assert_same(found: Sequence[RequestOutput], expected: Sequence[RequestOutput], *, bitwise: bool) -> None:
    """Assert that two runs gave the same answers.

    Args:
        found, expected: in the same order.
        bitwise: all of tokens, texts and log-probabilities; else tokens up to a near tie of a greedy choice, and
            log-probabilities to 1e-4.
    """
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for choice, (ours, theirs) in enumerate(zip(one.outputs, other.outputs, strict=True)):
            where = f"request {number}, choice {choice}"
            ended_early = _assert_same_choice(ours, theirs, bitwise=bitwise, where=where)
            if not ended_early:
                assert (ours.finish_reason, ours.stop_reason) == (theirs.finish_reason, theirs.stop_reason), where
                assert ours.text == theirs.text, where
        where = f"prompt of request {number}"
        _assert_same_logprobs(one.prompt_logprobs or [], other.prompt_logprobs or [], bitwise=bitwise, where=where)


def _assert_same_choice(ours: CompletionOutput, theirs: CompletionOutput, *, bitwise: bool, where: str) -> bool:
    """Return whether the comparison ended at a near tie."""
    stop = len(theirs.token_ids)
    if not bitwise:
        pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
        differing = [step for step, (one, other) in enumerate(pairs) if one != other]
        if differing and is_near_tie(theirs, differing[0]):
            stop = differing[0]
    assert ours.token_ids[:stop] == theirs.token_ids[:stop], where
    assert stop < len(theirs.token_ids) or len(ours.token_ids) == stop, where
    logprobs, expected = (ours.logprobs or [])[:stop], (theirs.logprobs or [])[:stop]
    _assert_same_logprobs(logprobs, expected, bitwise=bitwise, where=where)
    return stop < len(theirs.token_ids)


def is_near_tie(answer: CompletionOutput, step: int) -> bool:
    """Return whether the two likeliest tokens of a step were too close to call."""
    if answer.logprobs is None or len(answer.logprobs[step].top_logprobs) < 2:
        return False
    first, second = answer.logprobs[step].top_logprobs[:2]
    return first - second < NEAR_TIE


def _assert_same_logprobs(
    found: Sequence[LogprobEntry | None], expected: Sequence[LogprobEntry | None], *, bitwise: bool, where: str
) -> None:
    assert len(found) == len(expected), where
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one is None or other is None:
            assert one is other, f"{where}, step {step}"
        elif bitwise:
            assert bits(one) == bits(other), f"{where}, step {step}: {one} and {other}"
        else:
            assert abs(one.logprob - other.logprob) <= 1e-4, f"{where}, step {step}: {one} and {other}"


def bits(entry: LogprobEntry) -> tuple[bytes, int, list[int], bytes]:
    """Return an entry with its floats as bytes, so that -0.0, NaN and the last bit count."""
    tops = struct.pack(f"{len(entry.top_logprobs)}d", *entry.top_logprobs)
    return struct.pack("d", entry.logprob), entry.rank, entry.top_ids, tops


def all_bits(answers: Sequence[RequestOutput]) -> list[tuple[bytes, int, list[int], bytes]]:
    """Return every output token's entry, for comparisons that must differ."""
    return [bits(entry) for answer in answers for choice in answer.outputs for entry in choice.logprobs or ()]
