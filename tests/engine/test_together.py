"""This module holds several users of one `LLM` at once, and what one of them does to the others. It does not know how
steps are scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from octavo.engine.errors import EngineDeadError
from octavo.engine.llm import LLM, GenerationProgress
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import FinishReason

from ..checkpoints import make_prompts
from .test_faults import Failing

A, B = make_prompts([20, 9], seed=31)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tokens_of(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate(prompt, params)[0].outputs[0].token_ids


@pytest.fixture
def llm(make_llm: Callable[..., LLM]) -> Iterator[LLM]:
    """An engine of which nothing may be left after the test."""
    engine = make_llm()
    yield engine
    assert not engine.engine.core.has_unfinished
    stats = engine.stats
    assert stats.num_free_blocks == engine.engine.core.scheduler.limits.num_blocks
    assert (engine._texts._requests, engine._progress, engine._news, engine._added) == ({}, {}, {}, set())


def test_interleaved_streams_lose_nothing(llm: LLM) -> None:
    expected = [tokens_of(llm, prompt) for prompt in (A, B)]
    seen: list[list[int]] = [[], []]
    streams = {0: llm.stream(A, GREEDY), 1: llm.stream(B, GREEDY)}
    while streams:
        for i, stream in list(streams.items()):
            answer = next(stream, None)
            if answer is None:
                del streams[i]
            else:
                assert len(answer.outputs[0].token_ids) > len(seen[i])
                seen[i] = list(answer.outputs[0].token_ids)
    assert seen == expected


def test_a_stream_goes_on_after_others_ran_it_to_its_end(llm: LLM) -> None:
    expected = tokens_of(llm, A)
    stream = llm.stream(A, GREEDY)
    assert len(next(stream).outputs[0].token_ids) == 1
    tokens_of(llm, B, GREEDY.replace(max_tokens=30))
    (rest,) = stream
    assert rest.finished
    assert rest.outputs[0].token_ids == expected


def test_generate_from_a_callback(llm: LLM) -> None:
    expected = [tokens_of(llm, prompt) for prompt in (A, B)]
    inner: list[list[int]] = []

    def ask(progress: GenerationProgress) -> None:
        if not inner:
            inner.append([])
            inner[0] = tokens_of(llm, B)

    assert llm.generate(A, GREEDY, on_progress=ask)[0].outputs[0].token_ids == expected[0]
    assert inner == expected[1:]


def test_step_returns_what_another_front_brought(llm: LLM) -> None:
    expected = tokens_of(llm, A)
    request_id = llm.add(A, GREEDY)
    tokens_of(llm, B, GREEDY.replace(max_tokens=30))
    (answer,) = llm.step()
    assert (answer.request_id, answer.finished, answer.outputs[0].token_ids) == (request_id, True, expected)
    assert llm.step() == []


def test_abort_ends_a_stream(llm: LLM) -> None:
    for answer in llm.stream(A, GREEDY):
        llm.abort(answer.request_id)
    assert answer.finished
    assert answer.outputs[0].finish_reason is FinishReason.ABORT
    assert len(answer.outputs[0].token_ids) == 1


def test_abort_from_a_callback_ends_one_prompt_of_a_batch(llm: LLM) -> None:
    expected = tokens_of(llm, B)

    def abort(progress: GenerationProgress) -> None:
        if progress.num_output_tokens == 4:
            llm.abort("request-1")

    aborted, other = llm.generate([A, B], GREEDY, on_progress=abort)
    assert (aborted.request_id, aborted.finished) == ("request-1", True)
    assert aborted.outputs[0].finish_reason is FinishReason.ABORT
    assert other.outputs[0].token_ids == expected


def test_an_interrupted_step_tells_its_requests_later(llm: LLM) -> None:
    request_id = llm.add(A, GREEDY)
    Failing(llm, KeyboardInterrupt(), range(2, 3), after=True)
    llm.step()
    llm.step()
    with pytest.raises(KeyboardInterrupt):
        llm.step()
    (answer,) = llm.step()
    assert (answer.request_id, answer.finished) == (request_id, True)
    assert answer.outputs[0].finish_reason is FinishReason.ERROR
    assert len(answer.outputs[0].token_ids) == 2


def test_a_dead_engine_stays_dead(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    Failing(llm, RuntimeError("gone"), range(100), after=False)
    for _ in range(2):
        llm.generate(A, GREEDY)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="in a row"):
            llm.generate(A, GREEDY)
