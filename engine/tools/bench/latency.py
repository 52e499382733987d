"""This module runs one batch at a time through an engine and says how long it takes, before the first tokens and for
each after them. It does not know files, terminals or argv.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ConfigError
from ...llm import LLM
from ...sampling_params import SamplingParams
from ..serving_result import TABLE_WIDTH, table_row
from . import WrongResultError
from .comparison import Difference, of_repeats

__all__ = ["Batch", "check_fits", "latency_differences", "latency_lines", "latency_result", "run_batch"]

PERCENTILES = (10, 25, 50, 75, 90, 99)
_COUNTS = (
    ("Batch size:", "batch_size"),
    ("Input tokens each:", "input_len"),
    ("Output tokens each:", "output_len"),
    ("Iterations:", "num_iters"),
)
_TITLES = {
    "": "Latency of a Batch",
    "prefill_": "Prefill (until all have a first token)",
    "per_token_": "Time per Output Token (excl. 1st token)",
}


@dataclass(frozen=True, slots=True)
class Batch:
    """The times of one batch, seconds from its arrival."""

    prefill_s: float
    """Until every sequence had its first token."""
    end_s: float


def check_fits(llm: LLM, batch_size: int, num_tokens: int) -> None:
    """Refuse a batch that would not run as one.

    Args:
        llm: the engine.
        batch_size: sequences.
        num_tokens: of each, prompt and answer.

    Raises:
        ConfigError: there are too few rows or blocks.
    """
    resolved = llm.engine.resolved
    if batch_size > resolved.max_num_seqs:
        raise ConfigError(f"--batch-size is {batch_size}; allowed: at most {resolved.max_num_seqs}, see --max-num-seqs")
    needed = batch_size * -(-num_tokens // resolved.block_size)
    if needed > resolved.num_blocks:
        raise ConfigError(
            f"--batch-size is {batch_size}: {num_tokens} tokens each need {needed} blocks of {resolved.block_size}; "
            f"allowed: at most {resolved.num_blocks}, see --kv-cache-tokens"
        )


def run_batch(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Batch | None:
    """Run prompts together, with nothing in the prefix cache at first; None: stopped.

    Args:
        llm: the engine; idle.
        prompts: token ids of each.
        params: of sampling, with `max_tokens` and `ignore_eos`.
        should_stop: asked before every step.

    Raises:
        RequestError: a prompt can never run.
        WrongResultError: an answer failed or has another length than was asked for.
    """
    llm.engine.core.scheduler.reset_prefix_cache()
    start_s = time.monotonic()
    prefill_s = 0.0
    running: set[str] = set()
    waiting: set[str] = set()
    try:
        for prompt in prompts:
            running.add(llm.add(prompt, params, stream=True))
        waiting |= running
        while running:
            if should_stop():
                return None
            for output in llm.step():
                answer = output.outputs[0]
                waiting.discard(output.request_id)
                if output.finished:
                    running.discard(output.request_id)
                    if answer.error is not None or len(answer.token_ids) != params.max_tokens:
                        reason = answer.error or f"an answer has {len(answer.token_ids)} tokens"
                        raise WrongResultError(f"no speed is told of a wrong batch: {reason}")
            if not waiting and not prefill_s:
                prefill_s = time.monotonic() - start_s
    finally:
        for request_id in running:
            llm.abort(request_id)
    return Batch(prefill_s, time.monotonic() - start_s)


def latency_result(batches: Sequence[Batch], *, output_len: int) -> dict[str, Any]:
    """Return the figures of a batch size in seconds, by vLLM's names where it has one."""
    values = {
        "": [each.end_s for each in batches],
        "prefill_": [each.prefill_s for each in batches],
        "per_token_": [(each.end_s - each.prefill_s) / (output_len - 1) for each in batches] if output_len > 1 else [],
    }
    result: dict[str, Any] = {"num_iters": len(batches)}
    for prefix, seconds in values.items():
        result[f"avg_{prefix}latency"] = float(np.mean(seconds)) if seconds else None
        result[f"{prefix}percentiles"] = {
            str(part): float(np.percentile(seconds, part)) for part in PERCENTILES if seconds
        }
        result[f"{prefix}latencies"] = seconds
    return result


def latency_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the table of one batch size."""
    lines = [" Latency Benchmark Result ".center(TABLE_WIDTH, "=")]
    lines += [table_row(label, result[key]) for label, key in _COUNTS]
    for prefix, title in _TITLES.items():
        if (mean := result[f"avg_{prefix}latency"]) is not None:
            lines += [title.center(TABLE_WIDTH, "-"), table_row("Mean (ms):", mean * 1000)]
            parts = result[f"{prefix}percentiles"].items()
            lines += [table_row(f"P{part} (ms):", seconds * 1000) for part, seconds in parts]
    return [*lines, "=" * TABLE_WIDTH]


def latency_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Compare the times of two results' batches, as far as both have them."""
    return [
        of_repeats(f"{prefix}latency_ms", *([1000 * seconds for seconds in each[key]] for each in (old, new)))
        for prefix, key in ((prefix, f"{prefix}latencies") for prefix in _TITLES)
        if old.get(key) and new.get(key)
    ]
