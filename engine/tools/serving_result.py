"""This module holds what a load on a server amounts to: checks, figures under vLLM's names, a table. It does not know
who sent it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .workload import LoadRequest

if TYPE_CHECKING:
    from .load import Load, Measured
    from .stream_client import Answer

__all__ = ["METRICS", "TABLE_WIDTH", "PerRequest", "serving_result", "table_lines", "table_row", "wrong_answers"]

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
"""Short and long name of each measured time."""
_COUNTS = (
    ("Successful requests:", "completed"),
    ("Failed requests:", "failed"),
    ("Maximum request concurrency:", "max_concurrency"),
    ("Request rate configured (RPS):", "request_rate"),
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Cached input tokens:", "total_cached_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Request goodput (req/s):", "request_goodput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
    ("Peak concurrent requests:", "max_concurrent_requests"),
    ("Total token throughput (tok/s):", "total_token_throughput"),
)
TABLE_WIDTH = 50


class PerRequest(NamedTuple):
    """Every measured time of a run, in seconds: one list for each answered request."""

    ttft: list[list[float]]
    tpot: list[list[float]]
    itl: list[list[float]]
    e2el: list[list[float]]

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> PerRequest:
        """Read them from a saved result, ours or vLLM's.

        Raises:
            KeyError, TypeError, ValueError: it is none, or lacks the raw values.
        """
        names = ("ttfts", "itls", "output_lens", "errors")
        rows = [row for row in zip(*(result[name] for name in names), strict=True) if not row[3]]
        latencies = [float(ttft) + math.fsum(itls) for ttft, itls, _, _ in rows]
        return cls(
            ttft=[[float(row[0])] for row in rows],
            tpot=[
                [(latency - row[0]) / (row[2] - 1)] if row[2] > 1 else []
                for row, latency in zip(rows, latencies, strict=True)
            ],
            itl=[[float(each) for each in row[1]] for row in rows],
            e2el=[[latency] for latency in latencies],
        )


def wrong_answers(requests: Sequence[LoadRequest], answers: Sequence[Answer], *, ignore_eos: bool) -> list[str]:
    """Return what is wrong with answers that did not fail, in words, as far as counts can show it.

    Args:
        requests: what was asked.
        answers: one for each.
        ignore_eos: whether every answer was to be as long as asked for.
    """
    found = []
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True), 1):
        told, most, num_pieces = answer.num_output_tokens, request.max_tokens, len(answer.piece_times_s)
        if answer.error:
            continue
        if answer.finish_reason is None:
            found.append(f"request {number} has no finish_reason")
        elif told is None:
            continue
        elif told > most:
            found.append(f"request {number} asked for at most {most} tokens, usage says {told}")
        elif told < num_pieces:
            found.append(f"request {number} came in {num_pieces} pieces of text, usage says {told} tokens")
        elif ignore_eos and told != most:
            found.append(f"request {number} asked for exactly {most} tokens, usage says {told}")
    return found


def serving_result(
    requests: Sequence[LoadRequest], measured: Measured, load: Load, *, goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return all figures of a run, by vLLM's names where it has one. Times in lists are seconds, others say.

    Args:
        requests: what was asked.
        measured: what came.
        load: how it was sent.
        goodput: most milliseconds of ttft, tpot or e2el for a request to count as good.
    """
    answers, duration_s = measured.answers, measured.duration_s
    done = [answer for answer in answers if not answer.error]
    num_input = sum(answer.num_prompt_tokens or 0 for answer in done)
    num_output = sum(map(_output_len, done))
    result: dict[str, Any] = {
        "num_prompts": len(requests),
        "request_rate": "inf" if math.isinf(load.request_rate) else load.request_rate,
        "burstiness": "inf" if math.isinf(load.burstiness) else load.burstiness,
        "max_concurrency": load.max_concurrency,
        "seed": load.seed,
        "duration": duration_s,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "total_cached_tokens": _sum_told(answer.num_cached_tokens for answer in done),
        "request_throughput": len(done) / duration_s,
        "request_goodput": None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": _peak_tokens(done),
        "max_concurrent_requests": _peak_requests(done),
        "client_cpu_s": measured.client_cpu_s,
        "client_late_p99_ms": float(np.percentile(measured.late_s, 99)) * 1000,
        "input_lens": [answer.num_prompt_tokens or 0 for answer in answers],
        "output_lens": [0 if answer.error else _output_len(answer) for answer in answers],
        "ttfts": [_ttft(answer) for answer in answers],
        "itls": [np.diff(_times(answer)).tolist() for answer in answers],
        "latencies": [0.0 if answer.error else _times(answer)[-1] - answer.start_s for answer in answers],
        "start_times": [answer.start_s for answer in answers],
        "queue_times": measured.queue_times_s,
        "errors": [answer.error for answer in answers],
    }
    values = PerRequest.of(result)
    if goodput:
        result["request_goodput"] = _num_good(values, goodput) / duration_s
    for name in METRICS:
        result |= _statistics(name, [each for of_request in getattr(values, name) for each in of_request])
    return result


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the table of one result; what does not apply is left out."""
    lines = [" Serving Benchmark Result ".center(TABLE_WIDTH, "=")]
    for label, key in _COUNTS:
        value = result[key]
        if value is not None and (key, value) != ("request_rate", "inf"):
            lines.append(table_row(label, value))
    for name, (short, title) in METRICS.items():
        if result[f"mean_{name}_ms"] is not None:
            lines.append(title.center(TABLE_WIDTH, "-"))
            for statistic in ("mean", "median", "p99"):
                lines.append(table_row(f"{statistic.capitalize()} {short} (ms):", result[f"{statistic}_{name}_ms"]))
    return [*lines, "=" * TABLE_WIDTH]


def table_row(label: str, value: float) -> str:
    """Return a line of a table: whole numbers as they are, others with two decimals."""
    return f"{label:<40} " + (f"{value:<10}" if isinstance(value, int) else f"{value:<10.2f}").rstrip()


def _output_len(answer: Answer) -> int:
    """Return the tokens of an answer: what usage says, or else one for each piece."""
    return len(answer.piece_times_s) if answer.num_output_tokens is None else answer.num_output_tokens


def _times(answer: Answer) -> list[float]:
    """Return when tokens came; where an answer has no text, when it ended."""
    return answer.piece_times_s or ([] if answer.error else [answer.end_s])


def _ttft(answer: Answer) -> float:
    return 0.0 if answer.error else _times(answer)[0] - answer.start_s


def _sum_told(counts: Any) -> int | None:
    told = [count for count in counts if count is not None]
    return sum(told) if told else None


def _peak_tokens(done: Sequence[Answer]) -> float:
    """Return the most tokens that came in one second, counted in whole seconds from the first request."""
    if not done:
        return 0.0
    first_s = min(answer.start_s for answer in done)
    per_second: Counter[int] = Counter()
    for answer in done:
        # A piece may be several tokens.
        share = _output_len(answer) / len(_times(answer))
        for time_s in _times(answer):
            per_second[int(time_s - first_s)] += share  # type: ignore[assignment]
    return float(max(per_second.values()))


def _peak_requests(done: Sequence[Answer]) -> int:
    # At equal times an end comes before a beginning.
    changes = sorted([(answer.start_s, 1) for answer in done] + [(_times(answer)[-1], -1) for answer in done])
    return int(np.cumsum([change for _, change in changes]).max(initial=0))


def _num_good(values: PerRequest, goodput: Mapping[str, float]) -> int:
    """Return how many requests met every objective; an answer of one token has a TPOT of 0."""
    columns = [[(each or [0.0])[0] * 1000 <= most for each in getattr(values, name)] for name, most in goodput.items()]
    return sum(all(row) for row in zip(*columns, strict=True))


def _statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    keys = [f"{statistic}_{name}_ms" for statistic in ("mean", "median", "std", "p99")]
    if not values:
        return dict.fromkeys(keys)
    found = (np.mean(values), np.median(values), np.std(values), np.percentile(values, 99))
    return {key: float(value) * 1000 for key, value in zip(keys, found, strict=True)}
