"""This module holds what is told of a sequence: its tokens, and all else at its end. It does not know blocks."""

from __future__ import annotations

import numpy as np

from ..request import Request, RowTable
from ..step import EngineOutput, ModelOutput, RequestMetrics
from .flights import Flight

__all__ = ["keep_extras", "last_news", "news"]


def keep_extras(table: RowTable, flight: Flight, output: ModelOutput) -> None:
    """Keep the log-probabilities and hidden states of a step with their requests until their next news.

    Args:
        table: the rows' requests.
        flight: the step.
        output: what it computed.
    """
    work, rows, left = flight.work, flight.rows, flight.left

    def owner(row: int) -> Request | None:
        return None if row in left else table.request(row)

    for place, entry in output.logprobs.items():
        if (request := owner(int(rows[work.sampled[place]]))) is not None:
            request.logprobs.append(entry)
    for place, states in output.hidden_states.items():
        if (request := owner(int(rows[work.sampled[place]]))) is not None:
            request.hidden_states.append(states)
    for row, entries in output.prompt_logprobs.items():
        if (request := owner(row)) is not None and entries:
            # A resumed row computes positions again whose entries it already has.
            start = int(work.num_computed_tokens[np.flatnonzero(rows == row)[0]])
            num_known = len(request.prompt_logprobs) - start
            assert num_known >= 0, f"prompt log-probabilities of {request.request_id} have a gap before {start}"
            request.prompt_logprobs += entries[num_known:]


def news(request: Request, table: RowTable) -> EngineOutput:
    """Return what a sequence that goes on has to say since its last news."""
    token_ids = table.output_token_ids(request, request.num_reported_tokens)
    request.num_reported_tokens += len(token_ids)
    logprobs, request.logprobs = request.logprobs, []
    return EngineOutput(request.request_id, request.index, token_ids, new_logprobs=logprobs)


def last_news(
    request: Request, token_ids: list[int], error: str | None, error_param: str | None = None
) -> EngineOutput:
    """Return the end of a sequence that has its final status.

    Args:
        request: the sequence.
        token_ids: all of its output that counts, which may be less than was reported.
        error: why it failed, if it did.
        error_param: the field of the request that it comes from, if it does.
    """
    start = request.num_reported_tokens
    request.num_reported_tokens = len(token_ids)
    hidden_states = request.hidden_states[: len(token_ids)]
    return EngineOutput(
        request_id=request.request_id,
        index=request.index,
        new_token_ids=token_ids[start:],
        finish_reason=request.status.finish_reason,
        stop_reason=request.stop_reason,
        error=error,
        error_param=error_param,
        new_logprobs=request.logprobs[: max(0, len(token_ids) - start)],
        prompt_logprobs=request.prompt_logprobs if request.params.prompt_logprobs is not None else None,
        hidden_states=np.stack(hidden_states) if hidden_states else None,
        metrics=RequestMetrics(
            arrival_time_s=request.arrival_time_s,
            first_scheduled_time_s=request.first_scheduled_time_s,
            first_token_time_s=request.first_token_time_s,
            finish_time_s=request.finish_time_s,
            num_cached_tokens=max(0, request.num_cached_tokens),
            num_preemptions=request.num_preemptions,
        ),
    )
