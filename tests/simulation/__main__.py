"""This module holds the simulator's command line. It does not know what is simulated.

python -m tests.simulation --seeds 360 --start 0     many seeds, with progress and speed
python -m tests.simulation --seed 17                 one of them, again
"""

from __future__ import annotations

import argparse
import sys
import time

from .scenario import Scenario
from .simulator import Failure, run, shrink


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description="Simulate scheduler and block pool."
    )
    parser.add_argument("--seeds", type=int, default=60, help="how many seeds")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run only this one")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a drawn scenario")
    args = parser.parse_args()
    seeds = [args.seed] if args.seed is not None else range(args.start, args.start + args.seeds)
    begin = shown = time.perf_counter()
    num_steps = num_failures = 0
    for done, seed in enumerate(seeds, 1):
        result = run(Scenario.from_seed(seed).with_settings(args.set))
        if isinstance(result, Failure):
            num_failures += 1
            print(f"\nFAILED  {result}\nshrunk  {shrink(result)}", flush=True)
            print("put the seed into tests/simulation/regressions.txt, with a word on what it was")
        else:
            num_steps += result
        now = time.perf_counter()
        if now - shown > 1.0 or done == len(seeds):
            shown, took = now, now - begin
            print(
                f"{done}/{len(seeds)} seeds, {num_steps} steps, {num_failures} failures, "
                f"{num_steps / took:.0f} steps/s, {60 * done / took:.0f} seeds/min",
                flush=True,
            )
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
