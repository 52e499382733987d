#!/usr/bin/env python3
"""This script runs everything that wants an NVIDIA GPU, in one command and within a time. It does not know what that
is, which `benchmarks/gpu/sections.py` says, nor how it is measured.

    python scripts/gpu_suite.py --quick --budget-s 400 --out results             # a little of everything
    python scripts/gpu_suite.py --full --budget-s 540 --out results --resume     # what that has left out; and once more
    python scripts/gpu_suite.py --quick --only ceilings,step

Results are in OUT/suite.json after every case, and in OUT/suite.html after every section. Every section runs in
processes of its own: one that dies takes only its case with it. Without a GPU only what is compiled and predicted runs.
The exit status is 1 where a test or a comparison failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu.children import run_job
from gpu.page import make_page, make_table
from gpu.sections import RESERVE_S, ROOT, SECTIONS, Context, NotRunError, Section, level, python
from gpu.store import Store, source_hash

LINKS: Final = ROOT / ".typing"
FOLDERS: Final = ("engine", "kernels", "tests", "benchmarks", "scripts")
SECTION_S: Final = 540.0
"""A section that takes longer goes on in the next run with --resume."""


def run_section(name: str, section: Section, context: Context) -> None:
    """Run one section as far as time allows and enter how it ended."""
    store, begin = context.store, time.monotonic()

    def report(case: str, facts: dict[str, Any]) -> None:
        store.add(name, case, facts)

    if store.is_done(name) and not section.again:
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
    finished, deadline = [] if section.again else store.finished(name), min(context.deadline, begin + SECTION_S)
    with ThreadPoolExecutor(section.at_once(context)) as pool:
        left = sum(pool.map(lambda job: run_job(job, report, finished, deadline), jobs))
    reason = f"no time left for {left} cases, or more" if left else None
    store.close(name, "partial" if left else "done", reason, time.monotonic() - begin)


def write_page(store: Store, path: Path) -> None:
    """Write the page as far as results go; what goes wrong with it ends no run."""
    try:
        path.write_text(make_page(store.data), encoding="utf-8")
    except Exception:
        traceback.print_exc()


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
    options = vars(args) | {"out": args.out.name}
    run = {"started": started, "identity": identity, "level": level(args), "machine": machine, "options": options}
    by_level = [name for name, section in SECTIONS.items() if section.by_level]
    store = Store(args.out / "suite.json", run, resume=args.resume, by_level=by_level)
    if store.put_aside is not None:
        print(f"{store.put_aside} has what was there: of other sources, versions or another GPU, it does not count")
    with tempfile.TemporaryDirectory() as folder:
        context = Context(args, machine, store, Path(folder), begin + args.budget_s - RESERVE_S)
        for name, section in SECTIONS.items():
            if name in args.only and name not in args.skip:
                run_section(name, section, context)
                write_page(store, args.out / "suite.html")
            elif not store.is_done(name):
                store.close(name, "not run", "not asked for", 0.0)
    write_page(store, args.out / "suite.html")
    print(make_table(store.data))
    print(f"{args.out / 'suite.json'}, {args.out / 'suite.html'}")
    return 1 if store.num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
