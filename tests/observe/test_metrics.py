"""This module holds the metrics against the log of a run: every counter and every bucket must agree. It does not know
the scheduler's own counters, but for a second opinion.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import octavo.engine.observe.metrics as metrics_module
import pytest
from octavo.engine.errors import ConfigError
from octavo.engine.events import EventKind, RequestEvent, StepEvent
from octavo.engine.observe.metrics import Metrics
from octavo.engine.sampling_params import SamplingParams
from prometheus_client.parser import text_string_to_metric_families

from .runs import MAX_MODEL_LEN, NUM_BLOCKS, Log, Run, Told, busy_run, make_core, replay

DASHBOARD = Path(metrics_module.__file__).with_name("grafana.json")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def make_metrics(**options: object) -> Metrics:
    return Metrics(**({"model_name": "fake", "num_blocks": NUM_BLOCKS, "max_model_len": MAX_MODEL_LEN} | options))


def read(metrics: Metrics, prefix: str = "octavo:") -> Samples:
    """Return the engine's samples as a scraper reads them, by name without prefix and labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "fake", sample
                found[sample.name.removeprefix(prefix), tuple(sorted(labels.items()))] = sample.value
    return found


def number(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def check_histogram(samples: Samples, name: str, values: Iterable[float]) -> None:
    values = list(values)
    edges = [(dict(labels)["le"], count) for (key, labels), count in samples.items() if key == f"{name}_bucket"]
    assert len(edges) > 3, name
    for edge, count in edges:
        assert count == sum(value <= float(edge) for value in values), f"{name} up to {edge}"
    assert number(samples, f"{name}_count") == len(values), name
    assert math.isclose(number(samples, f"{name}_sum"), math.fsum(values), rel_tol=1e-9, abs_tol=1e-9), name


@pytest.fixture(scope="module", params=[1, 2], ids=["one by one", "overlap"])
def run_and_samples(request: pytest.FixtureRequest) -> tuple[Run, Samples]:
    metrics = make_metrics()
    run = busy_run(metrics, max_steps_in_flight=request.param)
    return run, read(metrics)


def test_a_run_has_everything_in_it(run_and_samples: tuple[Run, Samples]) -> None:
    run, _ = run_and_samples
    told = replay(run.log).values()
    assert {told_.finished.detail for told_ in told} == {"stop", "length", "abort", "error"}
    assert sum(len(told_.preempted) for told_ in told) >= 5
    assert sum(admitted.num_cached_tokens > 0 for told_ in told for admitted in told_.admitted) >= 5
    assert any(not told_.admitted for told_ in told), "nobody was aborted in the queue"
    details = {event.detail for event in run.log.events if isinstance(event, RequestEvent) and event.kind == "waits"}
    assert details >= {"no blocks free", "token budget spent"}, details


def test_every_counter_equals_the_log_and_the_scheduler(run_and_samples: tuple[Run, Samples]) -> None:
    run, samples = run_and_samples
    told, stats = list(replay(run.log).values()), run.core.scheduler.stats
    admitted = [event for told_ in told for event in told_.admitted]
    first = [told_.admitted[0] for told_ in told if told_.admitted]
    steps = [event for event in run.log.events if isinstance(event, StepEvent)]
    expected = {
        "num_preemptions_total": sum(len(told_.preempted) for told_ in told),
        "prefix_cache_queries_total": sum(event.num_tokens for event in admitted),
        "prefix_cache_hits_total": sum(event.num_cached_tokens for event in admitted),
        "prompt_tokens_total": sum(event.num_tokens for event in first),
        "prompt_tokens_cached_total": sum(event.num_cached_tokens for event in first),
        "generation_tokens_total": sum(run.num_heard.values()),
        "num_failed_steps_total": 1,
    }
    for name, value in expected.items():
        assert value > 0, name
        assert number(samples, name) == value, name
    assert number(samples, "num_preemptions_total") == stats.num_preemptions
    assert number(samples, "prefix_cache_queries_total") == stats.prefix_cache_queries
    assert number(samples, "prefix_cache_hits_total") == stats.prefix_cache_hits
    assert number(samples, "generation_tokens_total") == stats.num_output_tokens
    assert number(samples, "num_wasted_tokens_total") == stats.num_wasted_tokens
    assert (stats.num_wasted_tokens > 0) == (run.core.scheduler.limits.max_steps_in_flight == 2)
    ends = Counter(told_.finished.detail for told_ in told if told_.finished is not None)
    for reason in ("stop", "length", "abort", "error"):
        assert number(samples, "request_success_total", finished_reason=reason) == ends[reason], reason
    assert len(steps) == number(samples, "iteration_tokens_total_count") == stats.num_steps
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert number(samples, gauge) == 0, gauge


def test_every_bucket_equals_the_log(run_and_samples: tuple[Run, Samples]) -> None:
    run, samples = run_and_samples
    told = list(replay(run.log).values())
    started = [told_ for told_ in told if told_.admitted]
    spoke = [told_ for told_ in told if told_.token_times]
    steps = [event for event in run.log.events if isinstance(event, StepEvent)]
    choices = Counter(told_.arrived.request_id for told_ in told)

    def ended(told_: Told) -> RequestEvent:
        assert told_.finished is not None
        return told_.finished

    check_histogram(samples, "iteration_tokens_total", [float(event.num_scheduled_tokens.sum()) for event in steps])
    check_histogram(samples, "time_to_first_token_seconds", [t.token_times[0] - t.arrived.time_s for t in spoke])
    gaps = [b - a for t in spoke for a, b in zip(t.token_times, t.token_times[1:], strict=False)]
    check_histogram(samples, "inter_token_latency_seconds", gaps)
    check_histogram(samples, "e2e_request_latency_seconds", [ended(t).time_s - t.arrived.time_s for t in told])
    check_histogram(samples, "request_queue_time_seconds", [t.admitted[0].time_s - t.arrived.time_s for t in started])
    prefill = [t.token_times[0] - t.admitted[0].time_s for t in spoke]
    check_histogram(samples, "request_prefill_time_seconds", prefill)
    check_histogram(samples, "request_decode_time_seconds", [t.token_times[-1] - t.token_times[0] for t in spoke])
    inference = [t.token_times[-1] - t.admitted[0].time_s for t in spoke]
    check_histogram(samples, "request_inference_time_seconds", inference)
    check_histogram(samples, "request_prompt_tokens", [t.arrived.num_tokens for t in told])
    check_histogram(samples, "request_generation_tokens", [ended(t).num_tokens for t in told])
    check_histogram(samples, "request_params_max_tokens", [t.arrived.max_tokens for t in told])
    check_histogram(samples, "request_params_n", choices.values())
    per_token = [
        (t.token_times[-1] - t.token_times[0]) / (ended(t).num_tokens - 1) for t in spoke if ended(t).num_tokens > 1
    ]
    check_histogram(samples, "request_time_per_output_token_seconds", per_token)


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
def test_gauges_count_sequences_by_where_they_are(max_steps_in_flight: int) -> None:
    metrics = make_metrics()
    core = make_core(metrics, max_num_seqs=2, max_num_batched_tokens=8, max_steps_in_flight=max_steps_in_flight)
    for i in range(5):
        core.add_request(f"r{i}", [i + 1, 2, 3], SamplingParams(max_tokens=9))
    for _ in range(4):
        core.step()
        stats, samples = core.scheduler.stats, read(metrics)
        assert number(samples, "num_requests_running") == stats.num_running == 2
        assert number(samples, "num_requests_waiting") == stats.num_waiting == 3
        used = NUM_BLOCKS - stats.num_free_blocks
        assert math.isclose(number(samples, "kv_cache_usage_perc"), used / NUM_BLOCKS)
    core.abort("r4")
    core.abort("r0")
    samples = read(metrics)
    assert number(samples, "num_requests_running") == 1
    assert number(samples, "num_requests_waiting") == 2
    for i in range(5):
        core.abort(f"r{i}")
    assert number(read(metrics), "kv_cache_usage_perc") == 0, "no step comes that would say so"
    assert number(read(metrics), "engine_up") == 1
    metrics.engine_died()
    assert number(read(metrics), "engine_up") == 0


def test_times_are_those_of_the_clock_that_is_given() -> None:
    """The front's: what was late on its way makes the token late, but not the arrival, which comes with the token."""
    now = [0.0]
    metrics = make_metrics(clock=lambda: now[0])
    log = Log()
    core = make_core(log)
    core.add_request("r", [1, 2, 3], SamplingParams(max_tokens=3))
    while core.has_unfinished:
        core.step()
    tokens, arrived_s = 0, log.events[0].time_s
    now[0] = arrived_s + 9
    for event in log.events:
        if isinstance(event, StepEvent):
            tokens += 1
            now[0] = arrived_s + 10.0 * tokens
            metrics.on_step(event)
        else:
            metrics.on_request(event)
    samples = read(metrics)
    check_histogram(samples, "time_to_first_token_seconds", [10.0])
    check_histogram(samples, "inter_token_latency_seconds", [10.0, 10.0])
    check_histogram(samples, "e2e_request_latency_seconds", [30.0])


def test_rates_are_those_of_the_last_seconds() -> None:
    metrics = make_metrics()
    assert metrics.rates(100.0)["ttft_s"] is None
    run = busy_run(metrics)
    now = run.core.scheduler._clock()
    steps = [event for event in run.log.events if isinstance(event, StepEvent)]
    assert steps[-1].end_s - steps[0].end_s < 5, "the run is within the window"
    rates = metrics.rates(now)
    assert rates["decode_tokens_per_s"] == pytest.approx(sum(run.num_heard.values()) / 5)
    chunks = sum(int(count) for event in steps for count in event.num_scheduled_tokens if count > 1)
    assert rates["prefill_tokens_per_s"] == pytest.approx(chunks / 5)
    assert rates["ttft_s"]["p50"] <= rates["ttft_s"]["p99"]
    later = metrics.rates(now + 100)
    assert later["decode_tokens_per_s"] == 0
    assert later["itl_s"] is None
    assert later["prefix_hit_rate"] == rates["prefix_hit_rate"] > 0


def test_events_from_the_middle_of_a_run_are_no_error() -> None:
    metrics, run = make_metrics(), busy_run()
    middle = len(run.log.events) // 2
    rows = {event.row for event in run.log.events[middle:] if isinstance(event, RequestEvent)}
    assert rows
    for event in run.log.events[middle:]:
        if isinstance(event, StepEvent):
            metrics.on_step(event)
        else:
            metrics.on_request(event)
    samples = read(metrics)
    assert number(samples, "num_requests_running") == number(samples, "num_requests_waiting") == 0


def test_prefix_and_http() -> None:
    metrics = make_metrics(prefix="vllm:")
    metrics.observe_http("POST", "/v1/completions", 200, 0.25)
    metrics.observe_http("POST", "/v1/completions", 200, 0.5)
    text = metrics.exposition().decode()
    assert 'vllm:num_requests_running{model_name="fake"} 0.0' in text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="200"} 2.0' in text
    assert 'http_request_duration_seconds_sum{handler="/v1/completions",method="POST"} 0.75' in text
    assert "process_resident_memory_bytes" in text
    for prefix in ("9x", "a b", "ü"):
        with pytest.raises(ConfigError, match="metrics_prefix"):
            make_metrics(prefix=prefix)


def test_the_names_are_those_that_people_know() -> None:
    names = {family.name for family in text_string_to_metric_families(make_metrics().exposition().decode())}
    known = """
        num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries prefix_cache_hits
        num_preemptions prompt_tokens generation_tokens iteration_tokens_total time_to_first_token_seconds
        inter_token_latency_seconds e2e_request_latency_seconds request_queue_time_seconds
        request_prefill_time_seconds request_decode_time_seconds request_success request_prompt_tokens
        request_generation_tokens request_params_n request_params_max_tokens
    """
    assert {f"octavo:{name}" for name in known.split()} <= names


def test_the_dashboard_shows_every_metric_and_only_those_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 36
    assert "id" not in dashboard, "an id would overwrite somebody's dashboard"
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    metrics = make_metrics()
    metrics.observe_http("GET", "/health", 200, 0.1)
    families = list(text_string_to_metric_families(metrics.exposition().decode()))
    existing = {sample.name: family.name for family in families for sample in family.samples}
    shown: set[str] = set()
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    expressions.append(variables["model_name"]["query"]["query"].removeprefix("label_values(").split(",")[0] + "{")
    for expression in expressions:
        assert expression.count("(") == expression.count(")"), expression
        names = set(re.findall(r"(?:octavo:|http_|process_)\w+", expression))
        assert names, expression
        assert names <= existing.keys(), f"{names - existing.keys()} in {expression}"
        shown |= {existing[name] for name in names}
    for panel in panels:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(panel[name] for name in ("title", "description", "targets")), panel["id"]
    own = {family.name for family in families if family.name.startswith(("octavo:", "http_"))}
    assert shown >= own, own - shown
    boxes = [panel["gridPos"] for panel in panels]
    for box in boxes:
        assert box["x"] + box["w"] <= 24
    cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
    assert len(cells) == len(set(cells)), "panels overlap"


def test_kinds_that_arrive_are_all_that_there_are() -> None:
    assert {event.kind for event in busy_run().log.events if isinstance(event, RequestEvent)} == set(EventKind)
