#!/usr/bin/env python3
"""This script looks for launch settings that beat the launchers' own choice, on a GPU and within a time. It does not
know how a kernel works.

    python scripts/tune.py --budget-s 400 --out tuned           # again with the same --out: goes on
    python scripts/tune.py --dry-run                            # no GPU: what the candidates compile to, untimed

Results are in OUT/sm_90.json, a table as in kernels/tuned, where whoever trusts it copies it; OUT/tune.json says why
each candidate was refused. The rule: a candidate must compile without spills and fit, then be right on every case, then
be among the three quickest of a first round. In a second round, taking turns with the default, the lower end of the
median ratio's 95 % interval must be above 1.02 in the geometric mean over the cases, and nowhere below 0.99.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
LINKS: Final = ROOT / ".typing"
for package in ("engine", "kernels"):
    if not (link := LINKS / "octavo" / package).exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(ROOT / package)
sys.path[:0] = [str(LINKS), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import triton  # noqa: E402
from gpu.cases import LLAMA, Bench, make_inputs  # noqa: E402
from gpu.checking import check_attention  # noqa: E402
from gpu.kernels import our_calls  # noqa: E402
from gpu.store import source_hash  # noqa: E402
from gpu.timing import Clock, CudaClock  # noqa: E402
from octavo.kernels import use_backend  # noqa: E402
from octavo.kernels.aot.compile import compile_all, default_cache  # noqa: E402
from octavo.kernels.aot.driver import Launch, recording  # noqa: E402
from octavo.kernels.aot.targets import GPUS  # noqa: E402
from octavo.kernels.common.tuned import FOLDER, SETTINGS, key, read_table, trying  # noqa: E402
from octavo.kernels.spec import Case, load_specs  # noqa: E402
from torch import Tensor  # noqa: E402

NUM_FINALISTS: Final = 3
MIN_GAIN: Final = 1.02
MAX_LOSS: Final = 0.99
RESERVE_S: Final = 5.0
KERNELS: Final = {"decode": "decode_kernel", "prefill": "_prefill"}

Settings = dict[str, int]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One entry of the table: its kernel, its key, and the cases that stand for all that it serves."""

    kernel: str
    key: str
    benches: tuple[Bench, ...]

    @property
    def candidates(self) -> list[Settings]:
        """Every combination of what the kernel takes."""
        space = SETTINGS[self.kernel]
        return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


@dataclass(frozen=True)
class Bout:
    """One case, ready to run under whatever settings are in force; `check` raises AssertionError where it is wrong."""

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], object]


def jobs() -> list[Job]:
    """Return what is tuned, the most wanted first."""
    k = 1024
    decode = {"64x4096": [(1, 4 * k)] * 64, "1x32768": [(1, 32 * k)], "256x512": [(1, 512)] * 256}
    prefill = {"8192": [(8 * k, 8 * k)], "2048-over-30720": [(2 * k, 32 * k)], "8x1024": [(k, k)] * 8}
    found = []
    for head_dim in (128, 64):
        for kernel, cases, more in (("decode", decode, {}), ("prefill", prefill, {"plain": True})):
            spec = load_specs()[f"paged_attention_{kernel}"]
            values = LLAMA | {"head_dim": head_dim}
            benches = tuple(
                Bench(spec, Case(name, {**values, "seqs": tuple(seqs)}, "bfloat16", "bench"))
                for name, seqs in cases.items()
            )
            found.append(Job(kernel, key(kernel, head_dim=head_dim, dtype="bfloat16", cache_bits=16, **more), benches))
    return found


def label(settings: Mapping[str, int]) -> str:
    """Return settings in a word."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def launches(job: Job, settings: Settings, target: str) -> list[Launch]:
    """Return the variants of the kernel that the cases launch, and a step that verifies drafts, which holds more."""
    verify = Case("verify", {**job.benches[0].case.values, "seqs": ((8, 600),) * 4}, "bfloat16", "bench")
    with trying(job.key, settings), recording(GPUS[target]) as found:
        for bench in (*job.benches, Bench(job.benches[0].spec, verify)):
            our_calls(bench, make_inputs(bench, torch.device("meta")))["octavo"]()
    return [launch for launch in found if launch.kernel == KERNELS[job.kernel]]


def refusal(facts: Sequence[Facts], target: str) -> str | None:
    """Return why a candidate is not even timed; None: it may be."""
    for fact in facts:
        if fact["spills"]:
            return f"{fact['spills']} spills"
        if fact["ctas_per_sm"] < 1 or fact["shared_bytes"] + 1024 > GPUS[target].shared_bytes:
            return f"{fact['shared_bytes']} bytes of shared memory do not fit"
    return None


def compiled(job: Job, target: str, workers: int, deadline: float) -> Iterator[tuple[Settings, list[Facts] | str]]:
    """Yield each candidate with what its variants compile to, or why they do not; ends early where time does."""
    wanted = [(settings, launches(job, settings, target)) for settings in job.candidates]
    known: dict[Launch, Facts] = {}
    try:
        distinct = dict.fromkeys(launch for _, own in wanted for launch in own)
        for launch, facts in compile_all(distinct, cache=default_cache(), num_workers=workers):
            known[launch] = facts
            if time.monotonic() > deadline:
                break
    except Exception as error:  # one of them cannot be compiled: below it is the one that fails
        print(f"{job.key}: {type(error).__name__} while compiling", file=sys.stderr)
    for settings, own in wanted:
        rest = [launch for launch in own if launch not in known]
        if rest and time.monotonic() > deadline:
            continue
        try:
            known |= compile_all(rest, cache=default_cache(), num_workers=1)
        except Exception as error:
            yield settings, f"does not compile: {str(error)[:200]}"
        else:
            yield settings, [known[launch] for launch in own]


def lower_end(default: Sequence[float], other: Sequence[float]) -> float:
    """Return the lower end of a 95 % interval of the median of default / other, by neighbours in time (a sign test)."""
    ratios = sorted(a / b for a, b in zip(default, other, strict=True))
    return ratios[max(0, math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))]


def mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def contest(
    name: str,
    candidates: Sequence[Settings],
    bouts: Sequence[Bout],
    clock: Clock,
    note: Callable[[str, str], object] = lambda _candidate, _what: None,
    is_late: Callable[[], bool] = lambda: False,
) -> Facts:
    """Let candidates compete with the default over all cases.

    Args:
        name: the entry's key.
        candidates: those that compile.
        bouts: the cases.
        clock: takes the time.
        note: told of a candidate before it runs and when it is refused, so that a crash can be laid to it.
        is_late: whether to go no further.

    Returns:
        `status`: "won", "default" or "out of time"; where won `settings`, `gain` and microseconds by case.
    """
    calls: dict[str, dict[str, Callable[[], object]]] = {bout.name: {} for bout in bouts}
    chosen: dict[str, Settings | None] = {"default": None} | {label(one): one for one in candidates}
    for word, settings in chosen.items():
        if is_late():
            return {"status": "out of time"}
        note(word, "begun")
        try:
            ready = {bout.name: _ready(name, settings, bout, clock) for bout in bouts}
        except Exception as error:
            if settings is None:
                raise
            note(word, f"{type(error).__name__}: {str(error)[:200]}")
            continue
        for bout_name, call in ready.items():
            calls[bout_name][word] = call
    note("default", "begun")
    first = {bout: clock.samples(own) for bout, own in calls.items()}
    words = [word for word in calls[bouts[0].name] if word != "default"]
    gains = {word: mean([median(own["default"]) / median(own[word]) for own in first.values()]) for word in words}
    finalists = sorted(words, key=lambda word: -gains[word])[:NUM_FINALISTS]
    best: Facts = {"status": "default", "first_round": dict(sorted(gains.items(), key=lambda item: -item[1]))}
    for word in finalists:
        if is_late():
            break
        second = {bout: clock.samples({one: own[one] for one in ("default", word)}) for bout, own in calls.items()}
        ends = [lower_end(own["default"], own[word]) for own in second.values()]
        gain = mean(ends)
        if gain > max(MIN_GAIN, best.get("gain", 0.0)) and min(ends) >= MAX_LOSS:
            us = {bout: round(median(own[word]) * 1e6, 2) for bout, own in second.items()}
            default_us = {bout: round(median(own["default"]) * 1e6, 2) for bout, own in second.items()}
            best |= {"status": "won", "settings": chosen[word], "gain": gain, "us": us, "default_us": default_us}
    return best


def _ready(name: str, settings: Settings | None, bout: Bout, clock: Clock) -> Callable[[], object]:
    """Return a replay of a case under some settings, compared with the reference."""
    if settings is None:
        bout.check(bout.run())
        return clock.graphed(bout.run)
    with trying(name, settings):
        bout.check(bout.run())
        return clock.graphed(bout.run)


def make_bout(bench: Bench) -> Bout:
    """Draw a case's inputs on the GPU."""
    inputs = make_inputs(bench, torch.device("cuda"))
    call = our_calls(bench, inputs)["octavo"]

    def run() -> Tensor:
        out = call()
        assert isinstance(out, Tensor)
        return out

    return Bout(bench.case.name, run, lambda out: check_attention(bench, inputs, out))


class State:
    """What is known so far, as a file that is whole at every moment."""

    def __init__(self, path: Path, identity: Facts) -> None:
        self._path = path
        self.data: Facts = {"identity": identity, "jobs": {}}
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if earlier.get("identity") == identity:
                self.data = earlier

    def job(self, name: str) -> Facts:
        """Return what is known of an entry; a candidate that only ever began has taken its process with it."""
        found: Facts = self.data["jobs"].setdefault(name, {"status": "not run", "refused": {}})
        for word, what in found["refused"].items():
            if what == "begun":
                found["refused"][word] = "crashed"
        return found

    def save(self) -> None:
        """Write the file."""
        write(self._path, self.data)


def write(path: Path, data: Facts) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def tune(args: argparse.Namespace, target: str, identity: Facts, clock: Clock, deadline: float) -> None:
    """Run every job that is left, as far as time allows, and write the table after each."""
    state, table = State(args.out / "tune.json", identity), args.out / f"{target}.json"
    source = table if table.exists() else FOLDER / table.name
    entries = read_table(source) if source.exists() else {}
    for job in jobs():
        known = state.job(job.key)
        if known["status"] in ("won", "default"):
            continue
        print(f"{job.key}: {len(job.candidates)} candidates", file=sys.stderr, flush=True)
        candidates = []
        for settings, found in compiled(job, target, args.workers, deadline):
            reason = found if isinstance(found, str) else refusal(found, target)
            if reason is None and known["refused"].get(label(settings)) is None:
                candidates.append(settings)
            elif reason is not None:
                known["refused"][label(settings)] = reason

        def note(word: str, what: str, known: Facts = known) -> None:
            # What has been begun and gone on from is not kept: only what a crash leaves behind.
            begun = [one for one, said in known["refused"].items() if said == "begun"]
            for one in begun:
                del known["refused"][one]
            known["refused"][word] = what
            state.save()

        bouts = [make_bout(bench) for bench in job.benches]
        known |= contest(job.key, candidates, bouts, clock, note, lambda: time.monotonic() > deadline)
        known["refused"].pop("default", None)
        state.save()
        if known["status"] == "won":
            measured = {"command": "python scripts/tune.py", "gpu": identity["gpu"], "versions": identity["versions"]}
            measured |= {"date": time.strftime("%Y-%m-%d"), "us": known["us"], "default_us": known["default_us"]}
            entries[job.key] = {"settings": known["settings"], "measured": measured}
        write(table, {"arch": int(target[3:]), "entries": dict(sorted(entries.items()))})
        print(f"{job.key}: {known['status']} {known.get('settings', '')} {known.get('gain', '')}", flush=True)
        if known["status"] == "out of time":
            return


def dry_run(args: argparse.Namespace, target: str, deadline: float) -> None:
    """Print what each candidate compiles to."""
    for job in jobs():
        if args.only not in job.key:
            continue
        print(job.key)
        for settings, found in compiled(job, target, args.workers, deadline):
            if isinstance(found, str):
                print(f"  {label(settings)}: {found}")
                continue
            words = "; ".join(
                f"{fact['regs']} registers, {fact['shared_bytes']} B shared, {fact['ctas_per_sm']} per SM"
                for fact in found
            )
            print(f"  {label(settings)}: {refusal(found, target) or 'candidate'} ({words})", flush=True)
    print("nothing was timed")


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, or say what would be tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=400.0, help="stop cleanly before (default: %(default).0f)")
    parser.add_argument("--out", type=Path, default=Path("tuned"), help="where results go (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and what they compile to")
    parser.add_argument("--target", default="sm_90", choices=GPUS, help="for --dry-run (default: %(default)s)")
    parser.add_argument("--only", default="", help="for --dry-run: only entries whose key contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.budget_s - RESERVE_S
    if args.dry_run:
        dry_run(args, args.target, deadline)
        return 0
    if not torch.cuda.is_available():
        print("no GPU is visible: nothing can be timed here; --dry-run lists the candidates", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major * 10 + minor}"
    if target not in GPUS:
        print(f"the GPU is {target}; known: {', '.join(GPUS)}", file=sys.stderr)
        return 2
    identity = {
        "source": source_hash(ROOT, ("kernels",)),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": str(torch.__version__), "triton": triton.__version__},
    }
    use_backend("triton")
    tune(args, target, identity, CudaClock(), deadline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
