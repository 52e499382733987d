"""Plant every bug and print which check catches it: `python -m tests.mutation [part of a name]`."""

from __future__ import annotations

import sys
import time

from .mutants import healthy, killer, mutants


def main(part: str = "") -> int:
    """Return 0 where every bug is caught and no healthy op is accused."""
    survivors, accused = 0, 0
    for mutant in healthy():
        caught = killer(mutant)
        accused += caught is not None
        print(f"{'PASS ' if caught is None else 'FALSE'} {mutant.name:40} {caught or ''}")
    chosen = [mutant for mutant in mutants() if part in mutant.name]
    for mutant in chosen:
        start = time.perf_counter()
        caught = killer(mutant)
        survivors += caught is None
        seconds = time.perf_counter() - start
        verdict = "ALIVE" if caught is None else "dead "
        print(f"{verdict} {mutant.name:40} {seconds:5.1f} s  {(caught or mutant.meaning)[:120]}")
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs caught, {accused} false alarms")
    return int(survivors + accused > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
