"""This module holds what a simulation amounts to: figures under the names of `bench serve`, which are vLLM's, and a
table. It does not know how it was run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..serving_result import METRICS, TABLE_WIDTH, table_lines, table_row
from .simulation import Outcome

__all__ = ["figures", "simulation_lines"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

TIMES = {**METRICS, "queue": ("queue", "Time in the Queue")}
"""Short and long name of each time that is told."""
QUANTILES = np.linspace(0, 100, 101)
_MORE = (
    ("Steps:", "num_steps", "{:,}"),
    ("Mean rows of a step:", "mean_batch", "{:,.1f}"),
    ("Time in which a step ran:", "busy", "{:.1%}"),
    ("Preemptions:", "num_preemptions", "{:,}"),
    ("Prefix cache hits (of tokens):", "prefix_hit_rate", "{:.1%}"),
    ("Peak KV usage:", "peak_kv_usage", "{:.1%}"),
)


def figures(outcome: Outcome, num_blocks: int, goodput: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return all figures of a run; whatever is named _ms is milliseconds, other times are seconds.

    Args:
        outcome: of a simulation.
        num_blocks: of its KV pool.
        goodput: most milliseconds of ttft, tpot or e2el for a request to count as good.
    """
    done, workload = outcome.done, outcome.workload
    inputs, outputs = workload.prompt_tokens[done], workload.output_tokens[done]
    arrived, first, finished = workload.arrival_s[done], outcome.first_token_s[done], outcome.finished_s[done]
    tpot = np.where(outputs > 1, (finished - first) / np.maximum(outputs - 1, 1), 0.0)
    by_request = {
        "ttft": first - arrived,
        "tpot": tpot[outputs > 1],
        "e2el": finished - arrived,
        "queue": outcome.scheduled_s[done] - arrived,
    }
    times = {name: (values, np.ones(len(values), dtype=np.int64)) for name, values in by_request.items()}
    times["itl"] = (outcome.gaps_s, outcome.num_gaps)
    duration_s = float(finished.max(initial=0.0))
    per_s = 1 / duration_s if duration_s else 0.0
    result: dict[str, Any] = {
        "num_prompts": len(workload),
        "request_rate": "inf" if np.isinf(workload.rate) else workload.rate,
        "max_concurrency": None,
        "duration": duration_s,
        "completed": len(arrived),
        "failed": len(workload) - len(arrived),
        "total_input_tokens": int(inputs.sum()),
        "total_output_tokens": int(outputs.sum()),
        "total_cached_tokens": int(outcome.num_cached_tokens[done].sum()),
        "request_throughput": len(arrived) * per_s,
        "request_goodput": None,
        "output_throughput": int(outputs.sum()) * per_s,
        "total_token_throughput": int(inputs.sum() + outputs.sum()) * per_s,
        "max_output_tokens_per_s": None,
        "max_concurrent_requests": _peak(arrived, finished),
        "num_steps": outcome.num_steps,
        "mean_batch": outcome.num_row_steps / max(outcome.num_steps, 1),
        "busy": outcome.busy_s * per_s,
        "num_preemptions": int(outcome.num_preemptions.sum()),
        "prefix_hit_rate": outcome.prefix_hits / max(outcome.prefix_queries, 1),
        "peak_kv_usage": outcome.peak_blocks / num_blocks,
    }
    if goodput:
        seconds = {**by_request, "tpot": tpot}  # an answer of one token has 0
        is_good = np.all([1000 * seconds[name] <= most for name, most in goodput.items()], axis=0)
        result["request_goodput"] = int(is_good.sum()) * per_s
    for name, (values, counts) in times.items():
        result |= _statistics(name, values, counts)
    used = outcome.moments[:, 2] / num_blocks
    result["timeline"] = {
        "time_s": (np.arange(len(used)) * outcome.distance_s).tolist(),
        "running": outcome.moments[:, 0].tolist(),
        "waiting": outcome.moments[:, 1].tolist(),
        "kv_usage": used.tolist(),
    }
    result["quantiles_ms"] = {
        name: (1000 * _quantiles(values, counts, QUANTILES)).tolist()
        for name, (values, counts) in times.items()
        if len(values)
    }
    return result


def simulation_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the table of one result."""
    lines = [" Simulation, not a measurement ".center(TABLE_WIDTH, "="), *table_lines(result)[1:-1]]
    if result["mean_queue_ms"] is not None:
        lines.append(TIMES["queue"][1].center(TABLE_WIDTH, "-"))
        for statistic in ("mean", "median", "p99"):
            lines.append(table_row(f"{statistic.capitalize()} queue (ms):", result[f"{statistic}_queue_ms"]))
    lines.append("Engine".center(TABLE_WIDTH, "-"))
    lines += [f"{label:<40} {form.format(result[key])}" for label, key, form in _MORE]
    return [*lines, "=" * TABLE_WIDTH]


def _peak(begins: FloatArray, ends: FloatArray) -> int:
    """Return the most requests under way at once; at equal times an end comes before a beginning."""
    order = np.lexsort((np.repeat((1, 0), len(begins)), np.concatenate((begins, ends))))
    return int(np.cumsum(np.repeat((1, -1), len(begins))[order]).max(initial=0))


def _statistics(name: str, values: FloatArray, counts: IntArray) -> dict[str, float | None]:
    keys = [f"{statistic}_{name}_ms" for statistic in ("mean", "median", "std", "p90", "p99")]
    if not len(values):
        return dict.fromkeys(keys)
    mean = float(np.average(values, weights=counts))
    std = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
    median, p90, p99 = _quantiles(values, counts, (50, 90, 99)).tolist()
    return {key: 1000 * value for key, value in zip(keys, (mean, median, std, p90, p99), strict=True)}


def _quantiles(values: FloatArray, counts: IntArray, percents: Sequence[float] | FloatArray) -> FloatArray:
    """Return what np.percentile does of values each of which counts so many times."""
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(counts[order])
    place = np.asarray(percents) / 100 * (ends[-1] - 1)
    low = np.floor(place)
    at = values[order][np.searchsorted(ends, np.stack((low, np.minimum(low + 1, ends[-1] - 1))), side="right")]
    found: FloatArray = at[0] + (at[1] - at[0]) * (place - low)
    return found
