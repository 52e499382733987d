"""This module holds how well a simulation predicts a real run: throughput and times of SmolLM2 on this CPU.

    python benchmarks/simulate.py [--scale 1] [--threads 2] [--cpu-time] [--json]

One run is recorded, and a cost model is fitted to its steps; then other workloads, at other rates and of other lengths,
are run for real and simulated with that model. A simulation gets the workload and the engine's limits and nothing of
the run that it predicts. Runs are taken in the order fit, others, fit again: how far the second fit run is from the
first says what the machine does on its own. No figure is told of a run in which an answer was not as long as asked for.

With --cpu-time the clock is the CPU that this process has used, and waits for arrivals are skipped: with one thread, on
a machine that others use, that comes nearest to having it alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.observe.recording import Recording
from octavo.engine.observe.ring import EventRing
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler
from octavo.engine.startup import Engine, start_engine
from octavo.engine.step import RequestMetrics
from octavo.engine.tools.simulate.cost import LinearCost, fit_cost, measured_steps
from octavo.engine.tools.simulate.figures import figures
from octavo.engine.tools.simulate.reading import read_workload
from octavo.engine.tools.simulate.simulation import Simulation
from octavo.engine.tools.simulate.workload import Workload

from engine import cpu_name

RESULTS = Path(__file__).parent / "results" / "cpu" / "simulate.json"
SETTINGS = {"max_num_seqs": 16, "kv_cache_tokens": 16_384, "max_num_batched_tokens": 256}
LENGTHS = "input=lognormal:96:0.7:512,output=lognormal:32:0.5:128"
WORKLOADS = {
    "fit": f"poisson:rate=1.5,n=60,{LENGTHS}",
    "slower": f"poisson:rate=0.7,n=30,{LENGTHS},seed=1",
    "at once": f"poisson:rate=inf,n=60,{LENGTHS},seed=2",
    "long prompts": "poisson:rate=0.5,n=25,input=200-600,output=16-32,seed=3",
    "long outputs": "poisson:rate=0.6,n=30,input=16-64,output=48-160,seed=4",
    "shared prefixes": f"poisson:rate=1.5,n=50,{LENGTHS},prefix=256,prefixes=2,seed=5",
    "fit again": f"poisson:rate=1.5,n=60,{LENGTHS}",
}
FIGURES = (
    "output_throughput",
    "duration",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "median_itl_ms",
    "mean_batch",
)
TOLD = ("output_throughput", "median_ttft_ms", "median_tpot_ms")


class Clock:
    """Tells the time, of the world or of this process, and waits."""

    def __init__(self, *, cpu_time: bool) -> None:
        self._cpu_time = cpu_time
        self._skipped_s = 0.0

    def now(self) -> float:
        return time.process_time() + self._skipped_s if self._cpu_time else time.monotonic()

    def wait_until(self, time_s: float) -> None:
        left_s = max(0.0, time_s - self.now())
        if self._cpu_time:
            self._skipped_s += left_s
        else:
            time.sleep(left_s)


def run_for_real(engine: Engine, workload: Workload, clock: Clock) -> tuple[dict[str, float], Recording]:
    """Run a workload at its times; return its figures and the recording of its steps."""
    ring = EventRing(1_000_000, 100_000)
    limits = engine.core.scheduler.limits
    core = EngineCore(Scheduler(limits, clock.now, ring), engine.core.runner)
    arrivals, asked = workload.arrival_s.tolist(), workload.output_tokens.tolist()
    told: dict[int, RequestMetrics] = {}
    number, start_s = 0, clock.now()
    while number < len(workload) or core.has_unfinished:
        now_s = clock.now() - start_s
        while number < len(workload) and arrivals[number] <= now_s:
            params = SamplingParams(max_tokens=asked[number], temperature=0.0, ignore_eos=True)
            ids = workload.prompt(number, limits.vocab_size).tolist()
            core.add_request(str(number), ids, params, arrived_s=start_s + arrivals[number])
            number += 1
        if not core.has_unfinished:
            clock.wait_until(start_s + arrivals[number])
            continue
        for news in core.step():
            if news.error is not None or len(news.new_token_ids) != asked[int(news.request_id)]:
                raise SystemExit(f"request {news.request_id} is wrong: {news.error or len(news.new_token_ids)}")
            assert news.metrics is not None, "nothing streams"
            told[int(news.request_id)] = news.metrics
    recording = Recording({}, ring, ring.is_complete)
    return _measured(workload, told, ring, start_s), recording


def _measured(workload: Workload, told: dict[int, RequestMetrics], ring: EventRing, start_s: float) -> dict[str, float]:
    rows = [told[i] for i in range(len(workload))]
    first = np.array([row.first_token_time_s for row in rows], dtype=np.float64)
    end = np.array([row.finish_time_s for row in rows], dtype=np.float64)
    ttft = first - start_s - workload.arrival_s
    several = workload.output_tokens > 1
    tpot = ((end - first) / np.maximum(workload.output_tokens - 1, 1))[several]
    duration = float(end.max() - start_s)
    ends = np.array([step.end_s for step in ring.steps])
    gaps = np.repeat(np.diff(ends), [len(step.sampled) for step in ring.steps][1:])
    return {
        "output_throughput": float(workload.output_tokens.sum()) / duration,
        "duration": duration,
        "median_ttft_ms": 1000 * float(np.median(ttft)),
        "p99_ttft_ms": 1000 * float(np.percentile(ttft, 99)),
        "median_tpot_ms": 1000 * float(np.median(tpot)),
        "median_itl_ms": 1000 * float(np.median(gaps)),
        "mean_batch": sum(len(step.rows) for step in ring.steps) / len(ring.steps),
    }


def predict(engine: Engine, workload: Workload, cost: LinearCost) -> dict[str, float]:
    """Simulate a workload; return the same figures."""
    limits = engine.core.scheduler.limits
    result = figures(Simulation(workload, limits, cost).run(), limits.num_blocks)
    return {name: result[name] for name in FIGURES}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how well a simulation predicts a real run.")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the requests; less is quicker and noisier")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU; needs --threads 1")
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name} to benchmarks/results/cpu/")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts all threads together; give --threads 1")
    torch.set_num_threads(args.threads)
    clock = Clock(cpu_time=args.cpu_time)
    engine = start_engine(EngineConfig.from_settings({"model": "smollm2-135m", **SETTINGS}))
    run_for_real(engine, read_workload("poisson:rate=inf,n=8,input=100,output=8"), clock)  # warms up
    rows: dict[str, dict[str, Any]] = {}
    cost: LinearCost | None = None
    print(f"{'workload':<16} {'':>9} {'tok/s':>8} {'TTFT ms':>9} {'TPOT ms':>9} {'rows':>6}")
    for name, words in WORKLOADS.items():
        workload = read_workload(words)
        workload = read_workload(words, most=max(8, round(args.scale * len(workload))))
        measured, recording = run_for_real(engine, workload, clock)
        if cost is None:
            cost = fit_cost(measured_steps(recording))
        predicted = predict(engine, workload, cost)
        errors = {each: predicted[each] / measured[each] - 1 for each in FIGURES}
        rows[name] = {"workload": words, "measured": measured, "predicted": predicted, "relative_error": errors}
        for kind, values in (("measured", measured), ("predicted", predicted)):
            told = [values[each] for each in TOLD]
            print(f"{name:<16} {kind:>9} {told[0]:8.1f} {told[1]:9.1f} {told[2]:9.2f} {values['mean_batch']:6.2f}")
        print(f"{'':<16} {'error':>9} {errors[TOLD[0]]:8.1%} {errors[TOLD[1]]:9.1%} {errors[TOLD[2]]:9.1%}", flush=True)
    assert cost is not None, "there are workloads"
    first, again = (rows[name]["measured"] for name in ("fit", "fit again"))
    drift = {name: again[name] / first[name] - 1 for name in FIGURES}
    others = [row["relative_error"] for name, row in rows.items() if not name.startswith("fit")]
    worst = {name: max(abs(each[name]) for each in others) for name in TOLD}
    print(f"a step takes {cost}; error of a step {cost.error:.1%}")
    print("largest error of the workloads it was not fitted to: " + ", ".join(f"{k} {v:.1%}" for k, v in worst.items()))
    print("the machine's own: " + ", ".join(f"{name} {drift[name]:+.1%}" for name in TOLD))
    if args.json:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "settings": {"scale": args.scale, "cpu_time": args.cpu_time, "model": "smollm2-135m", **SETTINGS},
            "machine": {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__},
            "cost": cost.to_json(),
            "rows": rows,
            "largest_error": worst,
            "drift_of_the_machine": drift,
        }
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
