"""This module holds the metrics of a server, in vLLM's names and buckets, computed from a run's events. It does not
know HTTP.

Times are the user's: where a clock is given, a token is there when its event reaches this recorder, in the process that
sends it on. A sequence counts as one request, as in vLLM: n choices are n requests, but for `request_params_n`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ..errors import ConfigError, describe
from ..events import EventKind, RequestEvent, StepEvent
from ..step import FinishReason
from .latency import Latencies, Progress, TokenTimes
from .series import Collector, Series

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

FIRST_TOKEN_EDGES = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_EDGES = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_EDGES = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS_EDGES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PARAMS_N_EDGES = (1, 2, 5, 10, 20)
RATES_WINDOW_S = 5.0
MAX_PENDING_STEPS = 64


class _Moments(NamedTuple):
    """What some steps brought, for the rates of the last seconds."""

    at_s: npt.NDArray[np.float64]
    """[num_steps] when."""
    num_prefill_tokens: npt.NDArray[np.int64]
    num_output_tokens: npt.NDArray[np.int64]
    latencies: Latencies


class Metrics:
    """A recorder that counts, on a registry of its own.

    Args:
        model_name: as users name it; a label of every engine metric.
        num_blocks: of the KV pool.
        max_model_len: sizes the buckets of token counts.
        prefix: of every engine metric; "vllm:" makes dashboards for vLLM work.
        clock: when tokens and ends reach the user, as they come in; None: when they happened, for runs that are over.

    Raises:
        ConfigError: the prefix cannot begin a metric's name.
    """

    def __init__(
        self,
        *,
        model_name: str,
        num_blocks: int,
        max_model_len: int,
        prefix: str = "octavo:",
        clock: Callable[[], float] | None = None,
    ) -> None:
        if not re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)?", prefix):
            raise ConfigError(
                f"metrics_prefix is {describe(prefix)}; allowed: letters, digits, _ and :, no digit first"
            )
        self.registry = CollectorRegistry()
        self._clock = clock
        self._num_blocks = num_blocks
        self._times = TokenTimes()
        self._num_choices: dict[str, list[int]] = {}
        """By request: choices that have arrived, and those of them that have ended."""
        self._pending: list[tuple[StepEvent, float]] = []
        """Steps that are not counted yet, and when they were there, to the user."""
        self._moments: deque[_Moments] = deque()
        self._rates: tuple[int, float, dict[str, Any]] | None = None
        self._num_steps = 0
        self._series = _engine_series(prefix, max_model_len)
        for reason in FinishReason:
            self._series["request_success"].add(0, reason.value)
        self._series["engine_up"].set(1)
        self.registry.register(Collector(list(self._series.values()), {"model_name": model_name}))
        self._http = Series("http_requests", "HTTP requests answered.", ("method", "handler", "status"))
        self._http_seconds = Series(
            "http_request_duration_seconds",
            "Time to the end of an HTTP answer.",
            ("method", "handler"),
            edges=FIRST_TOKEN_EDGES,
        )
        self.registry.register(Collector((self._http, self._http_seconds), {}))
        ProcessCollector(registry=self.registry)

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format, of type `CONTENT_TYPE_LATEST`."""
        self._count_pending()
        return generate_latest(self.registry)

    def observe_http(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Count an HTTP request.

        Args:
            method: GET, POST or another known one.
            handler: the route's pattern, never the path itself: each value is kept for ever.
            status: of the answer.
            seconds: until it was sent completely.
        """
        self._http.add(1, method, handler, str(status))
        self._http_seconds.histogram(method, handler).add(seconds)

    def engine_died(self) -> None:
        """Note that the engine is gone: it runs and queues nothing any more."""
        self._count_pending()
        for name in ("engine_up", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            self._series[name].set(0)

    def on_request(self, event: RequestEvent) -> None:
        """Take what happened to a sequence."""
        self._count_pending()
        # Events come with the news of the next step: of them only an end is as late to the user as it is here.
        now_s = self._clock() if self._clock is not None and event.kind == EventKind.FINISHED else event.time_s
        progress = self._times.on_request(event, now_s)
        if progress is None:
            return
        series, kind = self._series, event.kind
        running, waiting = series["num_requests_running"], series["num_requests_waiting"]
        if kind == EventKind.ARRIVED:
            waiting.add(1)
            self._num_choices.setdefault(event.request_id, [0, 0])[0] += 1
        elif kind == EventKind.ADMITTED:
            waiting.add(-1)
            running.add(1)
            series["prefix_cache_queries"].add(event.num_tokens)
            series["prefix_cache_hits"].add(event.num_cached_tokens)
            if progress.num_admissions == 1:
                series["prompt_tokens"].add(event.num_tokens)
                series["prompt_tokens_cached"].add(event.num_cached_tokens)
                series["request_queue_time_seconds"].histogram().add(now_s - progress.arrived_s)
        elif kind == EventKind.PREEMPTED:
            running.add(-1)
            waiting.add(1)
            series["num_preemptions"].add(1)
        elif kind == EventKind.FINISHED:
            (running if event.row >= 0 else waiting).add(-1)
            self._finish(event, progress, now_s)

    def _finish(self, event: RequestEvent, progress: Progress, now_s: float) -> None:
        series = self._series
        series["request_success"].add(1, event.detail)
        values = {
            "e2e_request_latency_seconds": now_s - progress.arrived_s,
            "request_prefill_time_seconds": progress.first_token_s - progress.admitted_s,
            "request_decode_time_seconds": progress.last_token_s - progress.first_token_s,
            "request_inference_time_seconds": progress.last_token_s - progress.admitted_s,
            "request_prompt_tokens": progress.num_prompt_tokens,
            "request_generation_tokens": event.num_tokens,
            "request_params_max_tokens": progress.max_tokens,
        }
        for name, value in values.items():
            series[name].histogram().add(value)
        if event.num_tokens > 1:
            per_token = (progress.last_token_s - progress.first_token_s) / (event.num_tokens - 1)
            series["request_time_per_output_token_seconds"].histogram().add(per_token)
        choices = self._num_choices[event.request_id]
        choices[1] += 1
        if choices[0] == choices[1]:
            series["request_params_n"].histogram().add(self._num_choices.pop(event.request_id)[0])
        if series["num_requests_running"].values[()] == 0:
            # No step will come that says so.
            series["kv_cache_usage_perc"].set(0)

    def on_step(self, event: StepEvent) -> None:
        """Take a step that has ended.

        It is counted later, together with others: counting one costs as much as counting many, and between two waits
        for the engine nothing of this is in the CPU's caches (90 µs a step against 20 of many one by one, and 3 of many
        at once, on the development machine).
        """
        self._pending.append((event, event.end_s if self._clock is None else self._clock()))
        if len(self._pending) == MAX_PENDING_STEPS:
            self._count_pending()

    def _count_pending(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        latencies, series, num_steps = self._times.on_steps(pending), self._series, len(pending)
        counts = np.concatenate([event.num_scheduled_tokens for event, _ in pending])
        steps = np.repeat(np.arange(num_steps), [len(event.num_scheduled_tokens) for event, _ in pending])
        num_prefilled = np.bincount(steps, np.where(counts > 1, counts, 0), num_steps).astype(np.int64)
        num_sampled = np.array([len(event.sampled) for event, _ in pending])
        series["generation_tokens"].add(int(num_sampled.sum()))
        series["iteration_tokens_total"].histogram().add_all(np.bincount(steps, counts, num_steps).astype(np.float64))
        series["time_to_first_token_seconds"].histogram().add_all(latencies.first_s)
        series["inter_token_latency_seconds"].histogram().add_all(latencies.gaps_s)
        event, now_s = pending[-1]
        series["kv_cache_usage_perc"].set(1 - event.num_free_blocks / self._num_blocks)
        series["num_wasted_tokens"].add(sum(event.num_wasted_tokens for event, _ in pending))
        series["num_failed_steps"].add(sum(bool(event.failed) for event, _ in pending))
        self._num_steps += num_steps
        at_s = np.array([now_s for _, now_s in pending])
        self._moments.append(_Moments(at_s, num_prefilled, num_sampled, latencies))
        while self._moments[0].at_s[-1] < now_s - RATES_WINDOW_S:
            self._moments.popleft()

    def rates(self, now_s: float) -> dict[str, Any]:
        """Return what the last seconds brought, for the live view; computed once for all watchers of a moment.

        Args:
            now_s: the present, on the clock of the metrics.

        Returns:
            Tokens and steps per second, {"p50", "p90", "p99"} of `ttft_s` and `itl_s` or None, and the rate of tokens
            found in the prefix cache since the start, or None.
        """
        self._count_pending()
        known = self._rates
        if known is not None and known[0] == self._num_steps and now_s - known[1] < 1:
            return known[2]
        start_s, moments = now_s - RATES_WINDOW_S, self._moments
        queries = self._series["prefix_cache_queries"].values[()]
        num_steps = sum(int((each.at_s >= start_s).sum()) for each in moments)
        num_prefilled = sum(int(each.num_prefill_tokens[each.at_s >= start_s].sum()) for each in moments)
        num_sampled = sum(int(each.num_output_tokens[each.at_s >= start_s].sum()) for each in moments)
        latencies = [each.latencies for each in moments]
        rates = {
            "window_s": RATES_WINDOW_S,
            "prefill_tokens_per_s": round(num_prefilled / RATES_WINDOW_S, 3),
            "decode_tokens_per_s": round(num_sampled / RATES_WINDOW_S, 3),
            "steps_per_s": round(num_steps / RATES_WINDOW_S, 3),
            "ttft_s": _percentiles([each.first_s[each.first_at_s >= start_s] for each in latencies]),
            "itl_s": _percentiles([each.gaps_s[each.gaps_at_s >= start_s] for each in latencies]),
            "prefix_hit_rate": round(self._series["prefix_cache_hits"].values[()] / queries, 6) if queries else None,
        }
        self._rates = (self._num_steps, now_s, rates)
        return rates


def _percentiles(parts: Sequence[npt.NDArray[np.float64]]) -> dict[str, float] | None:
    values = np.concatenate(parts) if parts else np.empty(0)
    if len(values) == 0:
        return None
    names = ("p50", "p90", "p99")
    return {
        name: round(value, 6) for name, value in zip(names, np.percentile(values, (50, 90, 99)).tolist(), strict=True)
    }


def _engine_series(prefix: str, max_model_len: int) -> dict[str, Series]:
    """Return the engine's series by their names without prefix; those without labels of their own begin at 0."""
    token_edges = [float(f"{digit}e{power}") for power in range(9) for digit in (1, 2, 5)]
    token_edges = [edge for edge in token_edges if edge <= max_model_len]
    gauges = {
        "engine_up": "1 while the engine serves, 0 once it has died.",
        "num_requests_running": "Sequences that have a row in the batch.",
        "num_requests_waiting": "Sequences in the queue, preempted ones included.",
        "kv_cache_usage_perc": "Blocks of the KV cache in use, as a fraction of 1.",
    }
    counters = {
        "prefix_cache_queries": "Tokens looked up in the prefix cache.",
        "prefix_cache_hits": "Tokens found there.",
        "num_preemptions": "Times a sequence lost its row and blocks.",
        "prompt_tokens": "Prompt tokens of sequences that were started.",
        "prompt_tokens_cached": "Those of them that were found in the prefix cache.",
        "generation_tokens": "Tokens sampled, but for those in vain.",
        "num_failed_steps": "Steps that raised.",
        "num_wasted_tokens": "Tokens sampled in vain: by sequences that had ended or been preempted meanwhile.",
    }
    seconds = {
        "time_to_first_token_seconds": ("From arrival to the first token.", FIRST_TOKEN_EDGES),
        "inter_token_latency_seconds": ("From one token of a sequence to the next.", INTER_TOKEN_EDGES),
        "request_time_per_output_token_seconds": ("Mean time per token after the first.", INTER_TOKEN_EDGES),
        "e2e_request_latency_seconds": ("From arrival to the end.", REQUEST_EDGES),
        "request_queue_time_seconds": ("From arrival to the first row.", REQUEST_EDGES),
        "request_prefill_time_seconds": ("From the first row to the first token.", REQUEST_EDGES),
        "request_decode_time_seconds": ("From the first token to the last.", REQUEST_EDGES),
        "request_inference_time_seconds": ("From the first row to the last token.", REQUEST_EDGES),
    }
    tokens = {
        "iteration_tokens_total": ("Tokens run in a step.", STEP_TOKENS_EDGES),
        "request_prompt_tokens": ("Prompt tokens of a sequence.", token_edges),
        "request_generation_tokens": ("Output tokens of a sequence.", token_edges),
        "request_params_n": ("Choices asked for.", PARAMS_N_EDGES),
        "request_params_max_tokens": ("The most tokens a sequence might have had.", token_edges),
    }
    found = {name: Series(prefix + name, text, (), is_counter=False) for name, text in gauges.items()}
    found |= {name: Series(prefix + name, text, ()) for name, text in counters.items()}
    for series in found.values():
        series.set(0)
    for name, (text, edges) in (seconds | tokens).items():
        found[name] = Series(prefix + name, text, (), edges=edges)
        found[name].histogram()
    name = "request_success"
    return found | {name: Series(prefix + name, "Sequences that ended, by how.", ("finished_reason",))}
