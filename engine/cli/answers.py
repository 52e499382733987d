"""This module holds what an answer looks like as a line of JSONL. It does not know files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .batch import Finished

if TYPE_CHECKING:
    from ..step import CompletionOutput, LogprobEntry, RequestOutput

__all__ = ["beyond_text", "record_of", "to_line"]


def record_of(finished: Finished) -> dict[str, Any]:
    """Return what is written of one request: its answers, or the error in their place."""
    request, output = finished.request, finished.output
    if output is None:
        return {"id": request.id, "line": request.line, "error": finished.error}
    record: dict[str, Any] = {
        "id": request.id,
        "outputs": [_answer(each) for each in output.outputs],
        "usage": _usage(output),
        "metrics": _metrics(output),
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [each and _logprob(each) for each in output.prompt_logprobs]
    return record


def to_line(record: dict[str, Any]) -> bytes:
    """Return a record as one line of UTF-8, whatever its texts hold."""
    # A lone surrogate cannot be encoded; written out it is the JSON escape of itself.
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"


def beyond_text(sampling: Mapping[str, Any]) -> list[str]:
    """Return those sampling parameters that ask for something a line of JSONL holds and plain text cannot."""
    asked = [name for name in ("logprobs", "prompt_logprobs", "return_hidden_states") if sampling.get(name) is not None]
    return asked + ["no detokenize"] * (sampling.get("detokenize") is False)


def _answer(answer: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "logprobs": None if answer.logprobs is None else [_logprob(each) for each in answer.logprobs],
    }
    if answer.stop_reason is not None:
        found["stop_reason"] = answer.stop_reason
    if answer.hidden_states is not None:
        found["hidden_states"] = answer.hidden_states.tolist()
    return found


def _logprob(entry: LogprobEntry) -> dict[str, Any]:
    return {
        "logprob": _finite(entry.logprob),
        "rank": entry.rank,
        "top_ids": entry.top_ids,
        "top_logprobs": [_finite(each) for each in entry.top_logprobs],
    }


def _finite(value: float) -> float | None:
    """Return the number, or None for minus infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _usage(output: RequestOutput) -> dict[str, int]:
    prompt_tokens = len(output.prompt_token_ids)
    completion_tokens = sum(len(each.token_ids) for each in output.outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "cached_tokens": output.num_cached_tokens,
    }


def _metrics(output: RequestOutput) -> dict[str, float | int | None]:
    """Return seconds from the request's arrival, over all of its answers."""
    known = [each.metrics for each in output.outputs if each.metrics is not None]
    if not known:
        return {}
    arrival = known[0].arrival_time_s

    def since(times: list[float | None], pick: Any) -> float | None:
        reached = [time for time in times if time is not None]
        return round(pick(reached) - arrival, 6) if reached else None

    return {
        "queue_s": since([each.first_scheduled_time_s for each in known], min),
        "first_token_s": since([each.first_token_time_s for each in known], min),
        "total_s": since([each.finish_time_s for each in known], max),
        "num_preemptions": sum(each.num_preemptions for each in known),
    }
