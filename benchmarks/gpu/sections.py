"""This module holds what the suite runs: sections of processes, in the order in which time is spent on them. It does
not know how anything is measured, nor what becomes of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .children import Job
from .store import Store

__all__ = ["RESERVE_S", "ROOT", "SECTIONS", "Context", "NotRunError", "Section", "level", "python"]

ROOT: Final = Path(__file__).resolve().parents[2]
NO_SPLIT_K: Final = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
INVARIANCE: Final = "tests/kernels/test_attention_invariance.py"
ENGINE: Final = "tests/equivalence/test_triton.py"
TESTS_PER_PROCESS: Final = 60
STEP_MODELS: Final = {"quick": ("llama-3.1-8b",), "normal": ("llama-3.1-8b",)}
"""Whose whole steps are timed, by how much is; with --full all three."""
ALL_MODELS: Final = ("llama-3.1-8b", "qwen3-0.6b", "qwen3-8b")
RESERVE_S: Final = 8.0
"""Kept back for the last files; a section is not begun with less than twice of it."""
REPORTED_ARCHS: Final = (100, 90, 80)
SANITIZER: Final = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def level(args: argparse.Namespace) -> str:
    """Return how much is wanted: "quick", "normal" or "full"."""
    return "quick" if args.quick else "full" if args.full else "normal"


@dataclass(frozen=True)
class Context:
    """What sections are built from."""

    args: argparse.Namespace
    machine: dict[str, Any]
    store: Store
    folder: Path
    deadline: float

    @property
    def level(self) -> str:
        """How many benchmarks."""
        return level(self.args)

    @property
    def arch(self) -> int:
        """Compute capability times ten; without a GPU that of the one the kernels are made for."""
        gpu = self.machine["gpu"]
        return int(gpu["arch"]) if gpu else 90

    @property
    def num_workers(self) -> int:
        """How many processes may compile at once."""
        return os.cpu_count() or 1


class NotRunError(Exception):
    """A section that cannot run here; says why."""


def python(*arguments: str) -> list[str]:
    """Return the command of a module; -P, as kernels/ in the working directory passes for the package of that name."""
    return [sys.executable, "-P", "-m", *arguments]


def pytest(context: Context, path: str, *options: str) -> list[str]:
    """Return the command that runs the tests of one path. A warning is none of ours on another machine's versions."""
    tier = "test" if context.args.quick else "all"
    plugins = ("-p", "gpu.pytest_lines", "-p", "no:cacheprovider")
    return python("pytest", path, f"--tier={tier}", "-q", *plugins, "-W", "default", *options)


def static(context: Context) -> list[Job]:
    """What the kernels compile to for this machine, or the nearest that the report knows; without a GPU for sm_90."""
    path = context.folder / "static.json"
    arch = next((arch for arch in REPORTED_ARCHS if arch <= context.arch), REPORTED_ARCHS[-1])
    argv = python("octavo.kernels.aot", "report", "--target", f"sm_{arch}", "--json", str(path))
    argv += ["--workers", str(context.num_workers)] + (["--kernel", context.args.kernel] if context.args.kernel else [])
    argv += ["--block-size", "64"] if context.level == "quick" else []

    def collect() -> dict[str, dict[str, Any]]:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        left_out = ("constants", "signature", "mix", "model")
        kept = [{name: value for name, value in row.items() if name not in left_out} for row in rows]
        found = {f"{row['kernel']}: {row['variant']}": {"status": "measured", **row} for row in kept}
        return found | {"report": {"status": "passed"}}

    return [Job("report", argv, case_timeout_s=900, tells=False, env={"TRITON_INTERPRET": "0"}, collect=collect)]


def ceilings(_: Context) -> list[Job]:
    """What this machine can do at best."""
    return [Job("ceilings", python("gpu.ceilings"))]


def compiling(context: Context) -> list[Job]:
    """Compile what the benchmarks launch, all at once and before anything is timed."""
    if context.store.is_done("bench"):
        raise NotRunError("the benchmarks are done")
    argv = python("gpu.compiling", "--arch", str(context.arch), "--level", context.level)
    return [Job("compile", [*argv, "--workers", str(context.num_workers)], case_timeout_s=600)]


def tests(context: Context) -> list[Job]:
    """All kernel tests on the GPU, file by file, large files in parts: most of their time is compiling."""
    files = sorted(path for path in (ROOT / "tests/kernels").rglob("test_*.py") if "aot" not in path.parts)
    names = [str(path.relative_to(ROOT)) for path in files]
    counts = dict.fromkeys([name for name in names if name != INVARIANCE], 0)
    listed = context.folder / "collected"
    argv = pytest(context, "tests/kernels", "--collect-only", "--continue-on-collection-errors", "--lines", str(listed))
    subprocess.run(argv, capture_output=True, timeout=max(1.0, context.deadline - time.monotonic()), check=False)
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else ():
        for test in json.loads(line).get("plan", ()):
            name = test.partition("::")[0]
            counts[name] = counts.get(name, 0) + (name in counts)
    jobs = []
    for name, count in counts.items():
        if name in names and name != INVARIANCE:
            parts = max(1, -(-count // TESTS_PER_PROCESS))
            for part in range(1, parts + 1):
                label = name if parts == 1 else f"{name} {part}/{parts}"
                jobs.append(Job(label, pytest(context, name, "--shard", f"{part}/{parts}")))
    return jobs


def invariance(context: Context) -> list[Job]:
    """What is promised to the last bit: in the tests, and at a real model's shapes."""
    return [
        Job("tests", pytest(context, INVARIANCE)),
        Job("promises", python("gpu.bits", "--group", "promises")),
    ]


def engine(context: Context) -> list[Job]:
    """The engine on the kernels against the engine on the torch backend."""
    # A test's first engine compiles its kernels.
    jobs = [Job("tests", pytest(context, ENGINE), case_timeout_s=240)] if (ROOT / ENGINE).exists() else []
    if context.args.model:
        jobs.append(Job("model", python("gpu.engines", "--model", context.args.model), case_timeout_s=600))
    if not jobs:
        raise NotRunError(f"{ENGINE} is not there, and no --model was given")
    return jobs


def ceilings_option(context: Context) -> list[str]:
    """Return the option that names this run's ceilings; none where they were not measured."""
    rates = {name: rate for facts in context.store.cases("ceilings").values() for name, rate in facts.items()}
    if not {"copy_bytes_per_s", "matmul_flops_per_s"} <= set(rates):
        return []
    path = context.folder / "ceilings.json"
    path.write_text(json.dumps(rates), encoding="utf-8")
    return ["--ceilings", str(path)]


def bench(context: Context) -> list[Job]:
    """Times of every op and of other libraries."""
    options = ["--level", context.level, *ceilings_option(context)]
    groups = ("decode", "prefill", "rest")
    # Long, as a peer may compile itself within a case.
    return [Job(name, python("gpu.kernels", "--group", name, *options), case_timeout_s=400) for name in groups]


def predictions(_: Context) -> list[Job]:
    """What steps take at best by the cards' data sheets: no measurement."""
    return [Job("floors", python("gpu.floors"))]


def step(context: Context) -> list[Job]:
    """Decode steps of the whole engine, and of its parts, beside their floors."""
    options = ["--level", context.level, *ceilings_option(context)]
    models = STEP_MODELS.get(context.level, ALL_MODELS)
    # An engine starts within a case, and compiles what is missing.
    return [Job(name, python("gpu.steps", "--model", name, *options), case_timeout_s=240) for name in models]


def engines(context: Context) -> list[Job]:
    """Ours beside transformers' continuous batching and vLLM."""
    names = {"quick": ("qwen3-0.6b",), "normal": ("llama-3.1-8b",)}.get(context.level, ALL_MODELS)
    models = [*names, *([context.args.model] if context.args.model else [])]
    options = ["--level", context.level]
    return [Job(name, python("side_by_side", "--model", name, *options), case_timeout_s=500) for name in models]


def kv(context: Context) -> list[Job]:
    """Keys and values in other dtypes."""
    argv = python("gpu.kv", "--model", ALL_MODELS[0], *ceilings_option(context))
    return [Job("kv", argv, case_timeout_s=240)]


def memory(context: Context) -> list[Job]:
    """What an engine holds beside what was planned."""
    names = ALL_MODELS[:1] if context.level != "full" else ALL_MODELS
    return [Job(name, python("gpu.memory", "--model", name), case_timeout_s=200) for name in names]


def loading(context: Context) -> list[Job]:
    """How fast weights come from files."""
    names = ("qwen3-0.6b",) if context.level != "full" else ("qwen3-0.6b", "qwen3-8b")
    return [Job(name, python("gpu.loading", "--model", name), case_timeout_s=300) for name in names]


def tune(context: Context) -> list[Job]:
    """Sweep the kernels' launch settings; what it finds lies beside the results, and is nobody's default yet."""
    if not (script := ROOT / "scripts" / "tune.py").exists():
        raise NotRunError("scripts/tune.py is not there")
    budget_s = 120.0 if context.level == "quick" else 400.0
    left_s = context.deadline - time.monotonic() - RESERVE_S
    argv = [sys.executable, "-P", str(script), "--budget-s", f"{min(budget_s, left_s):.0f}"]
    argv += ["--out", str(context.args.out / "tuned")]
    return [Job("tune", argv, case_timeout_s=budget_s + 60, tells=False)]


def bits(_: Context) -> list[Job]:
    """Which results hardware and libraries make equal to the last bit."""
    argv = python("gpu.bits", "--group", "questions")
    restricted = [*argv, "--case", "cuBLASLt", "--suffix", ", without split-K"]
    return [Job("questions", argv), Job("without split-K", restricted, env=NO_SPLIT_K)]


def sanitizer(context: Context) -> list[Job]:
    """Bad addresses and races, on small runs; what the interpreter cannot see."""
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(SANITIZER))
    if path is None:
        raise NotRunError("compute-sanitizer is not installed")
    runs = ["decode", "decode-fused", "prefill", "write_kv", "sample"]
    runs += ["rms_norm", "gated_activation", "log_softmax_top"] if context.level == "full" else []
    # Without torch's cache of freed memory, as within it every address looks allocated; calls that torch tries and that
    # may fail are not what is looked for.
    memcheck = ["--tool", "memcheck", "--report-api-errors", "no"]
    tools = {
        "memcheck": (memcheck, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        "racecheck": (["--tool", "racecheck"], {}),
    }
    jobs = []
    for tool, (options, env) in tools.items():
        for run in runs:
            argv = [path, "--error-exitcode", "9", *options, *python("gpu.sanitized", run)]
            jobs.append(Job(f"{tool}: {run}", argv, case_timeout_s=300, tells=False, env=env))
    return jobs


@dataclass(frozen=True)
class Section:
    """Jobs, and how many of them may run at once; what is timed runs alone."""

    jobs: Callable[[Context], list[Job]]
    at_once: Callable[[Context], int] = lambda _: 1
    needs_gpu: bool = True
    by_level: bool = False
    """Whether cases of a name are larger ones with --full: then those of --quick do not count for it."""
    again: bool = False
    """Whether --resume runs it again: on another machine, whose card may be a little quicker, and which has compiled
    nothing."""


SECTIONS: Final = {
    "predictions": Section(predictions, needs_gpu=False),
    "ceilings": Section(ceilings, again=True),
    "compile": Section(compiling, again=True),
    "bench": Section(bench),
    "step": Section(step),
    "engines": Section(engines, by_level=True),
    "engine": Section(engine, lambda _: 2, by_level=True),
    "invariance": Section(invariance, lambda _: 2, by_level=True),
    "tests": Section(tests, lambda context: max(1, context.num_workers - 2), by_level=True),
    "kv": Section(kv),
    "memory": Section(memory),
    "bits": Section(bits),
    "loading": Section(loading),
    "sanitizer": Section(sanitizer, lambda _: 4),
    "tune": Section(tune, by_level=True),
    "static": Section(static, needs_gpu=False, by_level=True),
}
"""First what decides whether a wanted figure is met, as each of its cases is compared before it is timed, and last what
can be had without a GPU: what time does not allow is left out at the end."""
