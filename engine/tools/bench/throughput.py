"""This module runs many requests through an engine at once, round after round, and says what came of it. It does not
know files, terminals or argv.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ...llm import LLM
from ...sampling_params import SamplingParams
from ...step import RequestOutput
from ..serving_result import TABLE_WIDTH, table_row
from ..workload import LoadRequest
from . import WrongResultError
from .comparison import Difference, of_repeats

__all__ = ["Round", "run_round", "throughput_differences", "throughput_lines", "throughput_result"]

_ROWS = (
    ("Successful requests:", "num_requests"),
    ("Rounds:", "num_rounds"),
    ("Benchmark duration (s):", "elapsed_time"),
    ("Total input tokens:", "total_prompt_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "requests_per_second"),
    ("Input token throughput (tok/s):", "prompt_tokens_per_second"),
    ("Output token throughput (tok/s):", "output_tokens_per_second"),
    ("Total token throughput (tok/s):", "tokens_per_second"),
    ("Engine steps:", "num_steps"),
    ("Preemptions:", "num_preemptions"),
    ("Tokens sampled in vain:", "num_wasted_tokens"),
    ("Prefix cache hits (tokens):", "prefix_cache_hits"),
    ("Peak KV cache usage (%):", "kv_cache_usage_peak_perc"),
    ("Mean KV cache usage (%):", "kv_cache_usage_mean_perc"),
)
RATES = ("requests_per_second", "prompt_tokens_per_second", "output_tokens_per_second", "tokens_per_second")
_SUMS = (
    "elapsed_time",
    "num_requests",
    "total_prompt_tokens",
    "total_output_tokens",
    "num_steps",
    "num_preemptions",
    "num_wasted_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
)


@dataclass(frozen=True, slots=True)
class Round:
    """What came of all requests, once."""

    elapsed_time: float
    """Seconds from the first request's arrival to the last one's end, tokenising and text included."""
    num_requests: int
    total_prompt_tokens: int
    total_output_tokens: int
    num_steps: int
    num_preemptions: int
    num_wasted_tokens: int
    """Sampled while the end of their sequence was not known yet, as steps overlap."""
    prefix_cache_queries: int
    """Tokens looked up at admissions."""
    prefix_cache_hits: int
    kv_cache_usage_peak_perc: float
    """Most of the pool's blocks that running requests held after a step, in percent."""
    kv_cache_usage_mean_perc: float
    """The same on average over steps."""


def run_round(
    llm: LLM,
    requests: Sequence[LoadRequest],
    params: SamplingParams,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[], None] = lambda: None,
    on_over: Callable[[], None] = lambda: None,
) -> Round | None:
    """Run all requests together, with nothing in the prefix cache at first; None: stopped.

    Args:
        llm: the engine; idle.
        requests: what to ask; every answer gets its full length.
        params: of sampling, without `max_tokens` and with `ignore_eos`.
        should_stop: asked before every step.
        on_step, on_over: called after every step, and for every request that is over.

    Raises:
        RequestError: a request can never run.
        WrongResultError: an answer failed or has another length than was asked for.
    """
    llm.engine.core.scheduler.reset_prefix_cache()
    num_blocks, before, running, usage = llm.engine.resolved.num_blocks, llm.stats, dict[str, LoadRequest](), [0.0]
    num_prompt = num_output = 0
    start_s = time.monotonic()
    try:
        for request in requests:
            running[llm.add(request.prompt, params.replace(max_tokens=request.max_tokens))] = request
        while running:
            if should_stop():
                return None
            for output in llm.step():
                if output.finished:
                    num_output += _checked_len(output, running.pop(output.request_id))
                    num_prompt += len(output.prompt_token_ids)
                    on_over()
            usage.append(1 - llm.stats.num_free_blocks / num_blocks)
            on_step()
    finally:
        for request_id in running:
            llm.abort(request_id)
    elapsed_s, after = time.monotonic() - start_s, llm.stats
    counts = ("num_steps", "num_preemptions", "num_wasted_tokens", "prefix_cache_queries", "prefix_cache_hits")
    return Round(
        elapsed_time=elapsed_s,
        num_requests=len(requests),
        total_prompt_tokens=num_prompt,
        total_output_tokens=num_output,
        kv_cache_usage_peak_perc=100 * max(usage),
        kv_cache_usage_mean_perc=100 * fmean(usage[1:] or usage),
        **{name: getattr(after, name) - getattr(before, name) for name in counts},
    )


def throughput_result(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the figures of all rounds together, by vLLM's names where it has one, and of each."""
    entries = [asdict(each) for each in rounds]
    total = {name: sum(each[name] for each in entries) for name in _SUMS}
    return {
        **_rates(total),
        "num_rounds": len(rounds),
        "kv_cache_usage_peak_perc": max(each.kv_cache_usage_peak_perc for each in rounds),
        "kv_cache_usage_mean_perc": fmean(each.kv_cache_usage_mean_perc for each in rounds),
        "rounds": [_rates(each) for each in entries],
    }


def throughput_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the table of a result."""
    rows = [table_row(label, result[key]) for label, key in _ROWS]
    return [" Throughput Benchmark Result ".center(TABLE_WIDTH, "="), *rows, "=" * TABLE_WIDTH]


def throughput_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Compare the rates of two results' rounds, as far as both have them; one of vLLM's is one round."""
    ours = [result.get("rounds") or [result] for result in (old, new)]
    return [
        of_repeats(name, *([each[name] for each in rounds] for rounds in ours))
        for name in RATES
        if all(each.get(name) for rounds in ours for each in rounds)
    ]


def _rates(figures: Mapping[str, Any]) -> dict[str, Any]:
    num_prompt, num_output = figures["total_prompt_tokens"], figures["total_output_tokens"]
    numbers = (figures["num_requests"], num_prompt, num_output, num_prompt + num_output)
    rates = {name: number / figures["elapsed_time"] for name, number in zip(RATES, numbers, strict=True)}
    return {**figures, "total_num_tokens": num_prompt + num_output, **rates}


def _checked_len(output: RequestOutput, request: LoadRequest) -> int:
    """Return the tokens of an answer, all that were asked for."""
    (answer,) = output.outputs
    if answer.error is not None:
        raise WrongResultError(f"a request failed, so no speed is told: {answer.error}")
    if len(answer.token_ids) != request.max_tokens:
        told = f"{len(answer.token_ids)} tokens, not the {request.max_tokens} asked for"
        raise WrongResultError(f"an answer has {told}, so no speed is told")
    return len(answer.token_ids)
