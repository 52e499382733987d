"""This module holds the explanation of a request: where its time went, in numbers and in words. It does not know HTTP.

It works while the request runs and after it has ended, for as long as its events are in the ring.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from ..events import EventKind
from .history import FloatArray, HeadWaits, IntArray, Life, StepTable, lives
from .ring import EventRing

__all__ = ["explain", "summaries"]

Json = dict[str, Any]


def explain(ring: EventRing, *request_ids: str, now_s: float | None = None) -> Json | None:
    """Explain one request, or one of several prompts, each of which has an id of its own.

    Times are in seconds, those named `at_s` since its arrival; `tokens` and `chunks` are columns.

    Args:
        ring: what is known.
        request_ids: which; or those of its prompts, in order.
        now_s: the present, on the clock of the events, for a request that waits or runs; None: the latest event.

    Returns:
        {"request_id", "choices": [...]}, one for each of the n choices of every prompt, each with its `sentences`; None
        where nothing is known of it.
    """
    latest: dict[tuple[int, int], Life] = {
        (prompt, life.choice): life
        for prompt, request_id in enumerate(request_ids)
        for life in lives(ring.events_of(request_id))
    }
    if not latest:
        return None
    num_choices = 1 + max(choice for _, choice in latest)
    if now_s is None:
        now_s = max(ring.events[-1].time_s, ring.steps[-1].end_s if ring.steps else 0.0)
    firsts = [stay.first_step for life in latest.values() for stay in life.stays]
    # And the step before the first, which it may have waited for.
    table = StepTable([event for event in ring.steps if event.step >= min(firsts) - 1] if firsts else [])
    queue = HeadWaits(ring.events)
    choices = [
        _choice(ring, table, queue, life, now_s) | {"choice": prompt * num_choices + choice}
        for (prompt, choice), life in sorted(latest.items())
    ]
    return {"request_id": request_ids[0], "choices": choices}


def _choice(ring: EventRing, table: StepTable, queue: HeadWaits, life: Life, now_s: float) -> Json:
    runs = [table.runs_of(stay) for stay in life.stays]
    start_s = _start_s(life)
    arrived, finished = life.arrived, life.finished
    first_step = ring.steps[0].step if ring.steps else 0
    is_complete = arrived is not None and all(stay.first_step >= first_step for stay in life.stays)
    state = "finished" if finished else "waiting" if life.waits and life.waits[-1].end_s is None else "running"
    waits: list[Json] = []
    for wait in life.waits:
        end_s = now_s if wait.end_s is None else wait.end_s
        reasons = {reason.value: _seconds(time_s) for reason, time_s in queue.between(wait.start_s, end_s).items()}
        at_s, seconds = _seconds(wait.start_s - start_s), _seconds(end_s - wait.start_s)
        waits.append({"at_s": at_s, "seconds": seconds, "reasons": reasons})
    chunks = _joined([run.places[run.is_chunk] for run in runs])
    began_s, ended_s = (
        np.concatenate([getattr(run, name)[run.is_chunk] for run in runs] or [np.empty(0)])
        for name in ("start_s", "end_s")
    )
    places = _joined([run.places[run.sampled] for run in runs])
    at = table.end_s[places]
    admitted = life.stays[0].admitted if life.stays else None
    has_first = is_complete and len(at) > 0
    choice: Json = {
        "choice": life.choice,
        "state": state,
        "is_complete": is_complete,
        "prompt_tokens": arrived.num_tokens if arrived else None,
        "max_tokens": arrived.max_tokens if arrived else None,
        "output_tokens": finished.num_tokens if finished else len(at),
        "finish_reason": finished.detail if finished else None,
        "seconds": _seconds((finished.time_s if finished else now_s) - start_s),
        "waits": waits,
        "queued_s": waits[0]["seconds"] if waits and arrived else None,
        "cached_tokens": admitted.num_cached_tokens if admitted else None,
        "rows": [stay.admitted.row for stay in life.stays],
        "chunks": {
            "step": (chunks + table.first_step).tolist(),
            "num_tokens": _joined([run.num_tokens[run.is_chunk] for run in runs]).tolist(),
            "at_s": _rounded(began_s - start_s),
            "seconds": _rounded(ended_s - began_s),
        },
        "preemptions": list(_preemptions(life, start_s)),
        "time_to_first_token_s": _seconds(at[0] - start_s) if has_first else None,
        "tokens": {"step": (places + table.first_step).tolist(), "at_s": _rounded(at - start_s)},
        "inter_token_s": _spread(np.diff(at)),
    }
    choice["sentences"] = list(_sentences(choice))
    return choice


def _start_s(life: Life) -> float:
    """Return when it arrived, or what is known of it begins."""
    if life.arrived is not None:
        return life.arrived.time_s
    starts = [wait.start_s for wait in life.waits] + [stay.admitted.time_s for stay in life.stays]
    if life.finished is not None:
        starts.append(life.finished.time_s)
    return min(starts)


def _preemptions(life: Life, start_s: float) -> Iterator[Json]:
    """Yield what each preemption cost: tokens whose KV was given up, and those of them that were computed again."""
    resumed = [*[stay.admitted for stay in life.stays[1:]], None]
    for stay, after in zip(life.stays, resumed, strict=False):
        if stay.left is not None and stay.left.kind == EventKind.PREEMPTED:
            lost = stay.left.num_tokens
            yield {
                "step": stay.left.step,
                "at_s": _seconds(stay.left.time_s - start_s),
                "lost_tokens": lost,
                "recomputed_tokens": None if after is None else max(0, lost - after.num_cached_tokens),
                "queued_s": None if after is None else _seconds(after.time_s - stay.left.time_s),
            }


def _joined(parts: list[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _rounded(seconds: FloatArray) -> list[float]:
    rounded: list[float] = np.round(seconds, 6).tolist()
    return rounded


def _spread(gaps: FloatArray) -> Json | None:
    if len(gaps) == 0:
        return None
    numbers = _rounded(np.array([gaps.mean(), *np.percentile(gaps, (50, 99)), gaps.max()]))
    return dict(zip(("mean", "p50", "p99", "max"), numbers, strict=True))


def _sentences(choice: Json) -> Iterator[str]:
    """Say the same in words."""
    if not choice["is_complete"]:
        yield "Part of this is no longer known: it has left the ring of events, and numbers cover the rest."
    if choice["prompt_tokens"] is not None:
        yield f"Arrived with {_tokens(choice['prompt_tokens'])}, for at most {choice['max_tokens']} more."
    waits, cached = choice["waits"], choice["cached_tokens"]
    if waits:
        verb = "Was queued" if choice["rows"] or choice["state"] == "finished" else "Has been queued for"
        yield f"{verb} {_words(waits[0]['seconds'])}: {_reasons(waits[0]['reasons'])}."
    if cached is not None and choice["prompt_tokens"] is not None:
        yield f"Prefix hit: {cached}/{choice['prompt_tokens']} tokens were in the cache."
    chunks = choice["chunks"]["num_tokens"]
    if chunks:
        sizes = ", ".join(map(str, chunks[:8])) + (", …" if len(chunks) > 8 else "")
        yield f"Ran {_tokens(sum(chunks))} in {len(chunks)} {'chunk' if len(chunks) == 1 else 'chunks'}: {sizes}."
    for number, preemption in enumerate(choice["preemptions"], 1):
        again, queued = preemption["recomputed_tokens"], preemption["queued_s"]
        after = (
            "it waits to go on"
            if again is None
            else f"{again} of them computed again after {_words(queued)} of waiting"
        )
        because = f" ({_reasons(waits[number]['reasons'])})" if number < len(waits) else ""
        lost = _tokens(preemption["lost_tokens"])
        yield f"Preempted in step {preemption['step']}, giving up {lost}: {after}{because}."
    if choice["time_to_first_token_s"] is not None:
        yield f"First token {_words(choice['time_to_first_token_s'])} after arrival."
    gaps = choice["inter_token_s"]
    if gaps is not None:
        yield f"Then a token every {_words(gaps['p50'])} (median; the slowest took {_words(gaps['max'])})."
    if choice["state"] == "finished":
        reason, output = choice["finish_reason"], _tokens(choice["output_tokens"])
        yield f"Ended after {_words(choice['seconds'])} with {output}: {reason}."
        cut = len(choice["tokens"]["step"]) - choice["output_tokens"]
        if cut > 0:
            yield f"{_tokens(cut)} more had been sampled when a stop string was found."


def _reasons(reasons: dict[str, float]) -> str:
    if len(reasons) == 1:
        return next(iter(reasons))
    return ", ".join(f"{_words(seconds)} {reason}" for reason, seconds in reasons.items())


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def _words(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else "1 s"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"


def _seconds(value: float) -> float:
    return round(float(value), 6)


def summaries(ring: EventRing, count: int) -> list[Json]:
    """Return a line for each of the latest requests, the newest first.

    Args:
        ring: what is known.
        count: how many at most.
    """
    lines = []
    for request_id in islice(ring.request_ids(), count):
        latest = {life.choice: life for life in lives(ring.events_of(request_id))}
        known = list(latest.values())
        arrived, ended = known[0].arrived, [life.finished for life in known if life.finished is not None]
        waiting = sum(bool(life.waits) and life.waits[-1].end_s is None for life in known)
        state = "finished" if len(ended) == len(known) else "waiting" if waiting == len(known) else "running"
        lines.append(
            {
                "request_id": request_id,
                "state": state,
                "num_choices": len(known),
                "arrived_s": None if arrived is None else _seconds(arrived.time_s),
                "prompt_tokens": None if arrived is None else arrived.num_tokens,
                "cached_tokens": known[0].stays[0].admitted.num_cached_tokens if known[0].stays else None,
                "output_tokens": sum(event.num_tokens for event in ended),
                "num_preemptions": sum(len(list(_preemptions(life, 0.0))) for life in known),
                "finish_reasons": [event.detail for event in ended],
                "seconds": _seconds(max(event.time_s for event in ended) - _start_s(known[0])) if ended else None,
            }
        )
    return lines
