"""This module holds `octavo simulate`: from flags to simulations, their tables and pages. It does not know how one is
run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import EngineConfig
from ..errors import ConfigError
from .bench_options import objectives_from
from .endings import FAILED, OK
from .flags import Options, own_options
from .outputs import STDOUT, write_output
from .progress import GenerationBar
from .simulate_options import SimulateOptions
from .terminal import error_line, show, stderr

if TYPE_CHECKING:
    from ..tools.gpus import Gpu
    from ..tools.simulate.cost import LinearCost
    from ..tools.simulate.sweep import Scenario, Simulated
    from ..tools.simulate.workload import Workload

__all__ = ["simulate"]


def simulate(
    workload: Annotated[str, typer.Argument(metavar="WORKLOAD", show_default=False)],
    more_objectives: Annotated[list[str] | None, typer.Argument(metavar="OBJECTIVE", hidden=True)] = None,
    *,
    options: Options,
) -> int:
    r"""Run a workload through the engine's scheduler on a clock, and predict what its users would see.

    Needs no GPU and no weights. WORKLOAD is poisson:rate=8,n=10000,input=512,output=128 (lengths also as 100-1000,
    lognormal:MEDIAN:SIGMA or exponential:MEAN; like=sharegpt has its lengths; prefix=1000,prefixes=4 are shared),
    burst:size=64,every=10,n=640, a file of JSON lines with arrival_s, prompt_tokens or prompt, and output_tokens, a
    ShareGPT file, or a recording of octavo serve.
    """
    own = own_options(SimulateOptions, options.own)
    # As in bench, --goodput ttft:200 tpot:50 may name several; what follows the first arrives as an argument.
    goodput = objectives_from([*(own.goodput or ()), *(more_objectives or ())])
    if options.config.device != "auto":
        raise ConfigError(f"device is {options.config.device!r}; a simulation runs nowhere: --gpu or --cost says where")
    from ..tools.simulate.sweep import parse_sweeps, points_of

    sweeps = parse_sweeps(own.sweep or ())
    scenario = _scenario(workload, options.config, own, goodput, sweeps)
    if not options.quiet:
        for line in scenario.workload.notes:
            stderr().print(line, style="yellow")
    runs = _run(scenario, points_of(sweeps), own, quiet=options.quiet)
    return _show(scenario, runs, own, sweeps, quiet=options.quiet)


def _scenario(
    words: str, config: EngineConfig, own: SimulateOptions, goodput: Mapping[str, float], sweeps: Mapping[str, Any]
) -> Scenario:
    from ..tools.plan import read_model
    from ..tools.simulate.cost import read_cost, write_cost
    from ..tools.simulate.sweep import Scenario

    gpu = _gpu(own.gpu or next(iter(sweeps.get("gpu", ())), None), config)
    cost: LinearCost | None = None if own.cost is None else read_cost(own.cost)
    if cost is not None and own.save_cost is not None:
        write_cost(own.save_cost, cost)
    scenario = Scenario(
        _workload(words, config, own),
        read_model(config.model),
        config,
        gpu,
        cost,
        own.efficiency,
        own.overhead_us * 1e-6,
        goodput,
        own.request_rate,
        own.burstiness,
        own.seed,
    )
    scenario.resolved()
    return scenario


def _gpu(name: str | None, config: EngineConfig) -> Gpu | None:
    from ..tools.gpus import find_gpu

    if name == "cpu":
        from ..tools.cpu import measure_cpu

        return measure_cpu("float32" if config.dtype == "auto" else config.dtype)
    return None if name is None else find_gpu(name)


def _workload(words: str, config: EngineConfig, own: SimulateOptions) -> Workload:
    """Read the workload, with the model's tokenizer if it needs one and there is one."""
    from ..text.tokenizer import Tokenizer
    from ..tools.simulate.reading import read_workload

    encode, path, folder, metadata = None, Path(config.model), None, None
    if Path(words).is_file():
        if config.tokenizer is not None:
            folder = Path(config.tokenizer)
        elif path.suffix == ".json":
            folder = path.parent if (path.parent / "tokenizer.json").is_file() else None
        else:
            from ..loader import resolve_model

            found = resolve_model(config.model, load_format="dummy")
            folder, metadata = found.tokenizer_folder, found.tokenizer_metadata
        if folder is not None:
            encode = Tokenizer.from_folder(folder).encode
        elif metadata is not None:
            encode = Tokenizer.from_gguf(metadata).encode
    return read_workload(words, encode, seed=own.seed, most=own.num_prompts)


def _run(scenario: Scenario, points: Sequence[Mapping[str, Any]], own: SimulateOptions, *, quiet: bool) -> list[Any]:
    """Simulate what is not done yet; return all in the order of the grid."""
    from ..hardware import num_cores
    from ..tools.simulate.sweep import Simulated, append_finished, read_finished, run_points

    for point in points:
        scenario.at(point).resolved()  # what cannot run is said before anything does
    found = {} if own.output is None else read_finished(own.output, scenario, points)
    if found and not quiet:
        stderr().print(f"{len(found):,} of {len(points):,} are in {own.output}", style="dim")
    left = {place: point for place, point in enumerate(points) if place not in found}
    if left:
        live = _Live(total := len(left) * len(scenario.workload))
        with GenerationBar(live, total, num_over=0, quiet=quiet) as bar:
            for place, result in run_points(scenario, left, own.jobs or num_cores(), partial(live.show, bar)):
                found[place] = result
                if own.output is not None:
                    append_finished(own.output, scenario, Simulated(points[place], result))
    return [Simulated(point, found[place]) for place, point in enumerate(points)]


class _Live:
    """Counts what is over, and tells how fast it goes."""

    def __init__(self, total: int) -> None:
        self.now = ""
        self._total = total
        self._num_over = 0
        self._begun_s = time.monotonic()

    def show(self, bar: GenerationBar, num_over: int) -> None:
        """Bring a bar up to date."""
        bar.over(num_over - self._num_over)
        self._num_over = num_over
        if num_over:
            rate = num_over / max(time.monotonic() - self._begun_s, 1e-9)
            self.now = f"{rate:,.0f} requests/s, {(self._total - num_over) / rate:,.0f} s left"
        bar.step()


def _show(
    scenario: Scenario, runs: Sequence[Simulated], own: SimulateOptions, sweeps: Mapping[str, Any], *, quiet: bool
) -> int:
    from ..tools.simulate.figures import simulation_lines
    from ..tools.simulate.page import point_name, simulation_page, sweep_lines

    about = _about(scenario, own, runs, sweeps)
    document = {"octavo_simulation": 1, "about": about, "points": [run._asdict() for run in runs]}
    if own.json != STDOUT:
        for name, value in about.items():
            if not quiet:
                stderr().print(f"{name}: {value}", style="dim")
        show("\n".join(sweep_lines(runs) if sweeps else simulation_lines(runs[0].result)))
    if own.json is not None:
        write_output(own.json, json.dumps(document) + "\n")
    if own.html is not None:
        write_output(own.html, simulation_page(about, runs, scenario.workload.notes).html())
    for run in runs:
        if run.result["failed"]:
            where = f"{point_name(run.point)}: " if sweeps else ""
            reasons = "\n".join(run.result["refused"])
            error_line(f"{where}{run.result['failed']:,} requests are refused, such as:\n{reasons}")
    return FAILED if any(run.result["failed"] for run in runs) else OK


def _about(
    scenario: Scenario, own: SimulateOptions, runs: Sequence[Simulated], sweeps: Mapping[str, Any]
) -> dict[str, str]:
    from ..tools.simulate.page import about_run

    workload = scenario.workload
    inputs, outputs = workload.prompt_tokens, workload.output_tokens
    about = {
        "workload": workload.name.replace(",", ", "),
        "requests": f"{len(workload):,} of {inputs.mean():,.0f} + {outputs.mean():,.0f} tokens on average",
        "model": scenario.config.model,
    }
    if scenario.gpu is not None and "gpu" not in sweeps:
        about["machine"] = scenario.gpu.title
    if scenario.cost is not None:
        about["steps take"] = str(scenario.cost)
    else:
        assert scenario.gpu is not None, "one of the two is there"
        about["steps take"] = f"{scenario.efficiency:.0%} of bandwidth and rate ({scenario.gpu.source})"
        more = f", and {own.overhead_us:,g} µs" if own.overhead_us else ""
        about["steps take"] += more or (": a bound" if scenario.efficiency == 1 else "")
    if own.request_rate is not None:
        about["arrivals"] = f"{own.request_rate:g} requests per second"
    if scenario.goodput:
        about["good are"] = ", ".join(f"{name} up to {most:g} ms" for name, most in scenario.goodput.items())
    if not sweeps:
        about |= about_run(runs[0].result)
    return about
