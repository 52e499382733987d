"""Plant every bug and print which check catches it: `python -m tests.mutation [part of a name] [--tier=all]`."""

from __future__ import annotations

import argparse
import os
import sys
import time

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from . import kernels, mutants
from .mutants import Mutant, killer


def _verdict(mutant: Mutant) -> tuple[str | None, str]:
    """Return the check that caught a bug, None where none did, and what to say of it."""
    start = time.perf_counter()
    try:
        caught = killer(mutant)
        text = caught or mutant.meaning
    except Exception as crash:
        caught, text = None, f"crashes only: {crash!r}"
    return caught, f"{mutant.name:52} {time.perf_counter() - start:5.1f} s  {text[:120]}"


def main(part: str = "", tier: str = "test") -> int:
    """Return 0 where every bug is caught and no healthy op is accused."""
    survivors, accused = 0, 0
    sound = [mutant for mutant in (*mutants.healthy(), *kernels.healthy()) if tier == "all" or part in mutant.name]
    for mutant in sound:
        caught, text = _verdict(mutant)
        wrong = caught is not None or "crashes only" in text
        accused += wrong
        print(f"{'FALSE' if wrong else 'PASS '} {text}", flush=True)
    chosen = mutants.mutants() + (kernels.mutants() if part or tier == "all" else kernels.a_handful())
    chosen = [mutant for mutant in chosen if part in mutant.name]
    for mutant in chosen:
        caught, text = _verdict(mutant)
        survivors += caught is None
        print(f"{'ALIVE' if caught is None else 'dead '} {text}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs caught, {accused} false alarms")
    return int(survivors + accused > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("part", nargs="?", default="", help="of the names of the bugs to plant")
    parser.add_argument("--tier", choices=("test", "all"), default="test", help="test: a handful of the kernels' bugs")
    arguments = parser.parse_args()
    sys.exit(main(arguments.part, arguments.tier))
