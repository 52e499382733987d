#!/usr/bin/env python3
"""This script runs everything that wants an NVIDIA GPU, in one command and within a time. It does not know how anything
is measured.

    python scripts/gpu_suite.py --full --budget-s 540 --out results
    python scripts/gpu_suite.py --full --budget-s 540 --out results --resume     # what the first left over
    python scripts/gpu_suite.py --quick --only ceilings,step

Results are in OUT/suite.json after every case, and in OUT/suite.html at the end. Every section runs in processes of its
own: one that dies takes only its case with it. Without a GPU only the static part runs. The exit status is 1 where a
test or a comparison failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
LINKS: Final = ROOT / ".typing"
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu.children import Job, run_job  # noqa: E402
from gpu.page import make_page, make_table  # noqa: E402
from gpu.store import Store, source_hash  # noqa: E402

FOLDERS: Final = ("engine", "kernels", "tests", "benchmarks", "scripts")
NO_SPLIT_K: Final = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
INVARIANCE: Final = "tests/kernels/test_attention_invariance.py"
ENGINE: Final = "tests/equivalence/test_triton.py"
TESTS_PER_PROCESS: Final = 60
STEP_MODELS: Final = {"quick": ("llama-3.1-8b",), "normal": ("llama-3.1-8b",)}
"""Whose whole steps are timed, by how much is; with --full all three."""
ALL_MODELS: Final = ("llama-3.1-8b", "qwen3-0.6b", "qwen3-8b")
SECTION_S: Final = 540.0
"""A section that takes longer goes on in the next run with --resume."""
RESERVE_S: Final = 8.0
"""Kept back for the last files; a section is not begun with less than twice of it."""
REPORTED_ARCHS: Final = (100, 90, 80)
SANITIZER: Final = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


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
        return "quick" if self.args.quick else "full" if self.args.full else "normal"

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
    jobs = [Job("tests", pytest(context, ENGINE))] if (ROOT / ENGINE).exists() else []
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


SECTIONS: Final = {
    "static": Section(static, needs_gpu=False),
    "predictions": Section(predictions, needs_gpu=False),
    "ceilings": Section(ceilings),
    "compile": Section(compiling),
    "tests": Section(tests, lambda context: max(1, context.num_workers - 2)),
    "invariance": Section(invariance, lambda _: 2),
    "engine": Section(engine, lambda _: 2),
    "step": Section(step),
    "bench": Section(bench),
    "engines": Section(engines),
    "kv": Section(kv),
    "memory": Section(memory),
    "loading": Section(loading),
    "bits": Section(bits),
    "tune": Section(tune),
    "sanitizer": Section(sanitizer, lambda _: 4),
}
"""In the order of their value: what time does not allow is left out at the end."""


def run_section(name: str, section: Section, context: Context) -> None:
    """Run one section as far as time allows and enter how it ended."""
    store, begin = context.store, time.monotonic()

    def report(case: str, facts: dict[str, Any]) -> None:
        store.add(name, case, facts)

    if context.store.is_done(name):
        return
    if section.needs_gpu and context.machine["gpu"] is None:
        return store.close(name, "not run", "no GPU", 0.0)
    if context.deadline - begin < RESERVE_S:
        return store.close(name, "not run", "no time left", 0.0)
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        jobs = section.jobs(context)
    except (NotRunError, subprocess.TimeoutExpired) as error:
        return store.close(name, "not run", str(error), time.monotonic() - begin)
    except Exception:  # the others shall run all the same
        report(name, {"status": "crashed", "reason": traceback.format_exc()})
        return store.close(name, "not run", "it could not be prepared", time.monotonic() - begin)
    finished, deadline = store.finished(name), min(context.deadline, begin + SECTION_S)
    with ThreadPoolExecutor(section.at_once(context)) as pool:
        left = sum(pool.map(lambda job: run_job(job, report, finished, deadline), jobs))
    reason = f"no time left for {left} cases, or more" if left else None
    store.close(name, "partial" if left else "done", reason, time.monotonic() - begin)


def prepare_environment() -> None:
    """Let children import octavo from the tree: two links say where its packages are."""
    for package in ("engine", "kernels"):
        link = LINKS / "octavo" / package
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(ROOT / package)
    paths = [str(LINKS), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def probe() -> dict[str, Any]:
    """Ask a child what this machine is: the parent never touches the GPU."""
    done = subprocess.run(python("gpu.probe"), capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise SystemExit(f"torch cannot be asked for a GPU:\n{done.stderr[-2000:]}")
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return machine


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def sections(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in SECTIONS]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
        return names

    parser.add_argument("--only", type=sections, default=list(SECTIONS), help="sections, with commas between")
    parser.add_argument("--skip", type=sections, default=[], help="sections to leave out")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few benchmarks, the small tier of the tests")
    size.add_argument("--full", action="store_true", help="every benchmark")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="stop cleanly before (default: %(default).0f)")
    default = Path(os.environ.get("OUT") or "gpu-suite-out")
    parser.add_argument("--out", type=Path, default=default, help="where results go (default: $OUT, or %(default)s)")
    parser.add_argument("--model", help="a checkpoint to generate from: on both backends, beside others")
    parser.add_argument("--kernel", default="", help="static: only kernels whose name contains this")
    parser.add_argument("--resume", action="store_true", help="keep what OUT has from the same sources and machine")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections asked for."""
    begin = time.monotonic()
    args = parse(argv)
    args.out, started = args.out.resolve(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if args.model and Path(args.model).exists():
        args.model = str(Path(args.model).resolve())
    os.chdir(ROOT)
    prepare_environment()
    machine = probe()
    if machine["gpu"] is None:
        print("no NVIDIA GPU is visible: only what is compiled and predicted runs here", flush=True)
    else:
        os.environ["TRITON_INTERPRET"] = "0"  # the interpreter is for machines without one
    versions = {name: machine["packages"][name] for name in ("torch", "triton")}
    identity = {"source": source_hash(ROOT, FOLDERS), **versions, "gpu": machine["gpu"] and machine["gpu"]["name"]}
    run = {"started": started, "identity": identity, "machine": machine, "options": vars(args) | {"out": args.out.name}}
    store = Store(args.out / "suite.json", run, resume=args.resume)
    with tempfile.TemporaryDirectory() as folder:
        context = Context(args, machine, store, Path(folder), begin + args.budget_s - RESERVE_S)
        for name, section in SECTIONS.items():
            if name in args.only and name not in args.skip:
                run_section(name, section, context)
            elif not store.is_done(name):
                store.close(name, "not run", "not asked for", 0.0)
    (args.out / "suite.html").write_text(make_page(store.data), encoding="utf-8")
    print(make_table(store.data))
    print(f"{args.out / 'suite.json'}, {args.out / 'suite.html'}")
    return 1 if store.num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
