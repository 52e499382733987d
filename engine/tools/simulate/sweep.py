"""This module holds simulations over a grid of settings: which there are, running them in processes, going on where an
earlier run stopped. It does not know argv or pages.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ...config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from ...errors import ConfigError, OctavoError, describe
from ...hardware import available_memory_bytes
from ...resolve import Hardware, ResolvedConfig, resolve
from ...scheduler import SchedulerLimits
from ...strict_json import parse_json
from ..gpus import Gpu, find_gpu, hardware_of
from ..roofline import LAUNCHES_PER_LAYER, LAUNCHES_PER_STEP, CostModel, Roofline
from .cost import LinearCost
from .figures import figures
from .simulation import Simulation
from .workload import Workload

__all__ = [
    "Point",
    "Scenario",
    "Simulated",
    "append_finished",
    "parse_sweeps",
    "points_of",
    "read_finished",
    "run_points",
]

Point = Mapping[str, Any]
"""Settings of one simulation that differ from the others', by name."""
OnProgress = Callable[[int], None]

_ENGINE = {each.name: part for part in (CacheConfig, SchedulerConfig) for each in fields(part)} | {
    "dtype": EngineConfig
}
_OWN = ("request_rate", "gpu")
VERSION = 1
HEAD = '{"octavo_simulation"'
"""Of every line that is kept."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that decides what comes of a simulation.

    Raises:
        ConfigError: neither a GPU nor a cost model is given.
    """

    workload: Workload
    model: ModelConfig
    config: EngineConfig
    gpu: Gpu | None = None
    """Whose memory, and without `cost` whose data sheet counts; None: this machine's memory."""
    cost: LinearCost | None = None
    """None: the roofline of the GPU."""
    efficiency: float = 1.0
    """Part of the roofline's bandwidth and rate that is reached."""
    overhead_s: float = 0.0
    """Of every step, on top of the roofline."""
    goodput: Mapping[str, float] = field(default_factory=dict)
    request_rate: float | None = None
    """None: as the workload has it."""
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gpu is None and self.cost is None:
            raise ConfigError("what should steps take? Name a card with --gpu, or a measured run with --cost")

    def at(self, point: Point) -> Scenario:
        """Return the same with some settings changed."""
        engine = {name: value for name, value in point.items() if name in _ENGINE}
        config = self.config
        for part in ("cache", "scheduler"):
            mine = {name: value for name, value in engine.items() if _ENGINE[name] is type(getattr(config, part))}
            config = replace(config, **{part: replace(getattr(config, part), **mine)})
        if "dtype" in engine:
            config = replace(config, dtype=engine["dtype"])
        own = {name: value for name, value in point.items() if name in _OWN}
        if "gpu" in own:
            own["gpu"] = find_gpu(own["gpu"])
        return replace(self, config=config, **own)

    def resolved(self) -> ResolvedConfig:
        """Return the settings that an engine would run with there.

        Raises:
            ConfigError, CapacityError: none could.
        """
        if self.gpu is None:
            return resolve(self.config, self.model, Hardware("cpu", "this machine", available_memory_bytes()))
        return resolve(self.config, self.model, hardware_of(self.gpu))

    def cost_model(self, resolved: ResolvedConfig) -> CostModel:
        """Return what says how long steps take."""
        if self.cost is not None:
            return self.cost
        assert self.gpu is not None, "one of the two is there"
        num_launches = LAUNCHES_PER_LAYER * self.model.num_layers + LAUNCHES_PER_STEP
        return Roofline(
            self.model,
            self.gpu,
            dtype=resolved.dtype,
            kv_cache_dtype=resolved.kv_cache_dtype,
            bandwidth_efficiency=self.efficiency,
            flops_efficiency=self.efficiency,
            launch_s=self.overhead_s / num_launches,
        )

    def run(self, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Simulate and return all figures."""
        resolved, workload = self.resolved(), self.workload
        if self.request_rate is not None:
            workload = workload.at_rate(self.request_rate, self.burstiness, self.seed)
        limits = SchedulerLimits(
            vocab_size=self.model.vocab_size,
            max_model_len=resolved.max_model_len,
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            num_blocks=resolved.num_blocks,
            block_size=resolved.block_size,
            prefix_caching=self.config.cache.prefix_caching,
            policy=self.config.scheduler.policy,
        )
        outcome = Simulation(workload, limits, self.cost_model(resolved)).run(on_progress)
        engine = ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "dtype")
        return figures(outcome, resolved.num_blocks, self.goodput) | {
            "engine": {name: getattr(resolved, name) for name in engine},
            "refused": list(dict.fromkeys(outcome.refused))[:3],
        }

    def key(self, point: Point) -> str:
        """Return a name of one simulation that no other has."""
        digest = sha256()
        workload = self.workload
        for numbers in (workload.arrival_s, workload.prompt_tokens, workload.output_tokens):
            digest.update(numbers.tobytes())
        for number in range(0, len(workload), max(1, len(workload) // 256)):
            digest.update(workload.prompt(number, self.model.vocab_size).tobytes())
        parts = replace(self, workload=None).at(point)  # type: ignore[arg-type]
        # A pool that is made from the memory there is may be another the next time.
        digest.update(repr((parts, parts.resolved().num_blocks)).encode())
        return digest.hexdigest()[:32]


class Simulated(NamedTuple):
    """One point of a sweep and what came of it."""

    point: Point
    result: dict[str, Any]


def parse_sweeps(words: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each setting of words such as max_num_batched_tokens=512,2048.

    Raises:
        ConfigError: a word is not such, or a value is not allowed.
    """
    found: dict[str, list[Any]] = {}
    for word in words:
        name, _, text = word.partition("=")
        name = name.replace("-", "_")
        if name not in _ENGINE and name not in _OWN:
            raise ConfigError(f"--sweep is {describe(word)}; allowed: NAME=A,B,... of {', '.join((*_ENGINE, *_OWN))}")
        if name in found:
            raise ConfigError(f"--sweep names {name} twice")
        found[name] = [_value(name, each) for each in text.split(",")]
        if len(set(map(repr, found[name]))) < len(found[name]):
            raise ConfigError(f"--sweep {word}: a value is given twice")
    return found


def _value(name: str, text: str) -> Any:
    if name == "gpu":
        if text == "cpu":
            raise ConfigError(
                "--sweep gpu=cpu: a CPU is measured, not looked up; allowed: --gpu cpu, without a sweep of it"
            )
        return find_gpu(text).name
    value: Any = text
    with suppress(ValueError):
        value = parse_json(text)
    if name == "request_rate":
        with suppress(TypeError, ValueError):
            if float(text) > 0:
                return float(text)
        raise ConfigError(f"request_rate is {describe(text)}; allowed: a number above 0, or inf")
    EngineConfig.from_settings({name: value})  # says what is wrong with it
    return value


def points_of(sweeps: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Return the grid of all values; one empty point where nothing is swept."""
    return [dict(zip(sweeps, values, strict=True)) for values in product(*sweeps.values())]


def read_finished(file: Path, scenario: Scenario, points: Sequence[Point]) -> dict[int, dict[str, Any]]:
    """Return the results that a file has of these points, by their place; other lines are let be.

    Raises:
        ConfigError: a line is no result.
    """
    if not file.exists():
        return {}
    places = {scenario.key(point): place for place, point in enumerate(points)}
    found: dict[int, dict[str, Any]] = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if record["octavo_simulation"] != VERSION:
                raise ValueError(f"has another version than {VERSION}")
            if record["key"] in places:
                found[places[record["key"]]] = record["result"]
        except (ValueError, KeyError, TypeError) as error:
            is_ours = HEAD.startswith(line[: len(HEAD)])
            if number == len(lines) and is_ours and not line.endswith("\n"):
                continue  # the run that wrote it was ended in the middle of the line
            raise ConfigError(f"--output {file}: line {number} is no result of a simulation: {error}") from None
    return found


def append_finished(file: Path, scenario: Scenario, done: Simulated) -> None:
    """Add a result to a file that `read_finished` reads; a line that was left without its end goes."""
    record = {"octavo_simulation": VERSION, "key": scenario.key(done.point), **done._asdict()}
    with file.open("a+b") as stream:
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(json.dumps(record).encode() + b"\n")


def run_points(
    scenario: Scenario, points: Mapping[int, Point], num_processes: int, on_progress: OnProgress
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Simulate points and yield (place, result) as each is done.

    Args:
        scenario: what they have in common.
        points: by place.
        num_processes: that may run at once; 1: all here.
        on_progress: called now and then with the requests of all points that are over.

    Raises:
        OctavoError: a point cannot be simulated; the others are given up.
    """
    if num_processes == 1 or len(points) == 1:
        num_over = 0

        def tell(num: int) -> None:
            on_progress(num_over + num)

        for place, point in points.items():
            yield place, scenario.at(point).run(tell)
            num_over += len(scenario.workload)
        return
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", max(points) + 1)
    with context.Pool(min(num_processes, len(points)), _begin, (scenario, counts)) as pool:
        results = pool.imap_unordered(_run, points.items())
        left = len(points)
        while left:
            try:
                place, result = results.next(POLL_S)
            except multiprocessing.TimeoutError:
                on_progress(sum(counts[:]))
                continue
            if isinstance(result, OctavoError):
                raise result
            left -= 1
            yield place, result


_scenario: Scenario
_counts: Any


def _begin(scenario: Scenario, counts: Any) -> None:
    """Begin a process of the pool; Ctrl-C is for the one that started it."""
    global _scenario, _counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _scenario, _counts = scenario, counts


def _run(task: tuple[int, Point]) -> tuple[int, dict[str, Any] | OctavoError]:
    place, point = task

    def tell(num: int) -> None:
        _counts[place] = num

    try:
        result = _scenario.at(point).run(tell)
    except OctavoError as error:
        return place, error
    _counts[place] = len(_scenario.workload)
    return place, result
