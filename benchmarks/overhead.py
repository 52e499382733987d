"""This module holds what the engine costs on the host for each step, over a device that computes nothing.

    python benchmarks/overhead.py [--json benchmarks/results/cpu/overhead.json]
    python benchmarks/overhead.py --seqs 256 --step-ms 5 --told streamed --front process

The device of `null_device.py` takes 0, 1 or 5 ms for a step; scheduling, building the batch, the sampler's bookkeeping,
taking over tokens, text and stop strings are the engine's own. Steps are measured in which every sequence decodes one
token, with prompts of 256 tokens before it. Each figure is a median over the steps of a run; of several rounds the one
with the least work counts, as what else the machine does makes them slower and nothing makes them faster:

    schedule   which rows run, and which blocks they get
    execute    the runner's part until everything is launched; expanding the rows is in it, one launch on a GPU
    collect    an output made of what the device left behind
    update     tokens taken over, rows ended, news told
    text       news turned into text, stop strings looked for (in a process of its own: the front does it elsewhere)
    other      the loop around these, and in a process of its own the messages to the front
    work       all of it: the time of a step less that in which the host waits for the device
    cpu        the same by the CPU's clock of the engine's thread, as a mean: other load on the machine is not in it
    waits      part of the time in which the device has nothing to do, because the host has not launched the next step

With overlap the next step is scheduled and launched while the device runs this one, so it waits only where the work of
a step takes longer than the device. Launching the model is not in the work: on a GPU that is one replay of a captured
step, or hundreds of launches where a step is not captured. Nor are steps in which prompts are read or sequences end.
No figure is told of a run with a wrong token or a wrong text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from null_device import NUM_IDS, StepLog, expected_tokens, log_of, null_llm, set_device, write_checkpoint
from octavo.engine.async_llm import AsyncLLM
from octavo.engine.config import EngineConfig
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import RequestOutput
from octavo.engine.text import Tokenizer
from octavo.engine.tools.bench.machine import machine

ROWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
}
TOLD: dict[str, dict[str, Any]] = {
    "at the end": {},
    "streamed": {},
    "stop strings": {"stop": ["\n\n###", "<|never|>"]},
}
WARM_STEPS = 10
BATCHED_TOKENS = 8192
WANTED_WAITS = 0.03
WANTED_WORK_US = {256: 1500.0, 1024: 5000.0}


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    num_seqs: int
    rows: str
    told: str
    front: str
    step_ms: float
    overlap: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step costs, in microseconds; `waits` is a fraction of the time."""

    schedule: float
    execute: float
    collect: float
    update: float
    text: float
    other: float
    work: float
    work_p99: float
    cpu: float
    waits: float


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of a run: prompts without a block in common, outputs of one length."""

    prompts: list[list[int]]
    seeds: list[int]
    params: list[SamplingParams]
    num_tokens: int

    @classmethod
    def of(cls, case: Case, args: argparse.Namespace, seed: int) -> Load:
        rng = np.random.default_rng(seed)
        prompts = rng.integers(0, NUM_IDS, (case.num_seqs, args.prompt_tokens)).tolist()
        # The first sequences decode while the last prompts still run.
        num_tokens = num_output_tokens(case.num_seqs, args)
        seeds = [0 if case.rows == "greedy" else 1 + i for i in range(case.num_seqs)]
        settings = ROWS[case.rows] | TOLD[case.told] | {"max_tokens": num_tokens, "ignore_eos": True}
        return cls(prompts, seeds, [SamplingParams(**settings, seed=each) for each in seeds], num_tokens)

    def check(self, answers: list[RequestOutput], tokenizer: Tokenizer) -> None:
        """Refuse to tell figures of an engine that is wrong."""
        expected = expected_tokens(self.prompts, self.seeds, self.num_tokens).tolist()
        for answer, token_ids in zip(answers, expected, strict=True):
            choice = answer.outputs[0]
            if choice.token_ids != token_ids:
                raise SystemExit(f"{answer.request_id} has wrong tokens; nothing is reported")
            if choice.text != tokenizer.decode(token_ids):
                raise SystemExit(f"{answer.request_id} has a wrong text; nothing is reported")


def num_output_tokens(num_seqs: int, args: argparse.Namespace) -> int:
    num_prefill_steps = -(-num_seqs * args.prompt_tokens // (BATCHED_TOKENS - num_seqs))
    return int(args.steps) + WARM_STEPS + 2 * num_prefill_steps + 8


def config_for(folder: Path, num_seqs: int, overlap: bool, args: argparse.Namespace) -> EngineConfig:
    num_tokens = args.prompt_tokens + num_output_tokens(num_seqs, args)
    return EngineConfig.from_settings(
        {
            "model": str(folder),
            "load_format": "dummy",
            "device": "cpu",
            "max_num_seqs": num_seqs,
            "max_num_batched_tokens": BATCHED_TOKENS,
            "kv_cache_tokens": (num_seqs + 1) * (num_tokens + 128),
            "overlap": overlap,
        }
    )


def cost_of(log: StepLog, start: int, case: Case, num_steps: int) -> Cost:
    """Return what the steady steps cost, of those from `start` on."""
    steady = np.flatnonzero((log.num_seqs[start:] == case.num_seqs) & (log.num_tokens[start:] == case.num_seqs)) + start
    steady = steady[WARM_STEPS : WARM_STEPS + num_steps]
    if len(steady) < num_steps or steady[-1] - steady[0] != num_steps - 1:
        raise SystemExit(f"{case}: only {len(steady)} steps in which all sequences decode")
    first, stop = int(steady[0]), int(steady[-1]) + 1
    now, before = slice(first, stop), slice(first - 1, stop - 1)
    work_s = log.ended_at_s[now] - log.ended_at_s[before] - log.asleep_s[now]
    cpu_s = log.cpu_at_s[now] - log.cpu_at_s[before] - log.asleep_cpu_s[now]
    begun_at_s = log.begun_at_s[now]
    idle_s = np.maximum(np.diff(begun_at_s) - case.step_ms * 1e-3, 0.0)
    parts = (log.schedule_s, log.execute_s, log.collect_s, log.update_s, log.text_s)
    told = [1e6 * float(np.median(part[now])) for part in parts]
    work = 1e6 * float(np.median(work_s))
    return Cost(
        *told,
        other=work - sum(told),
        work=work,
        work_p99=1e6 * float(np.quantile(work_s, 0.99)),
        cpu=1e6 * float(cpu_s.mean()),
        waits=float(idle_s.sum() / (begun_at_s[-1] - begun_at_s[0])),
    )


class Here:
    """Runs loads on an engine in this process."""

    def __init__(self, folder: Path, num_seqs: int, overlap: bool, args: argparse.Namespace) -> None:
        path = folder / f"here-{num_seqs}-{overlap}.log"
        path.unlink(missing_ok=True)
        set_device(folder, 0.0, path)
        self._llm = null_llm(config_for(folder, num_seqs, overlap, args))
        self.log = log_of(self._llm.engine)
        self.tokenizer = self._llm.tokenizer

    def run(self, case: Case, load: Load) -> list[RequestOutput]:
        llm: Any = self._llm
        llm.engine.core.runner.step_s = case.step_ms * 1e-3
        streamed = case.told == "streamed"
        ids = [llm.add(*each, stream=streamed) for each in zip(load.prompts, load.params, strict=True)]
        answers: dict[str, RequestOutput] = {}
        num_finished = 0
        while num_finished < len(ids):
            changed = llm.step()
            # Nothing is looked at while steps are measured: an answer is one object that grows.
            if len(answers) < len(ids):
                answers |= {answer.request_id: answer for answer in changed}
            if len(answers) == len(ids) and (not changed or changed[-1].finished):
                num_finished = sum(answer.finished for answer in answers.values())
        return [answers[request_id] for request_id in ids]

    def close(self) -> None:
        pass


class Process:
    """Runs loads on an engine in a process of its own, with a front that takes what comes and does nothing with it."""

    def __init__(self, folder: Path, num_seqs: int, overlap: bool, args: argparse.Namespace, step_ms: float) -> None:
        path = folder / f"process-{num_seqs}-{overlap}-{step_ms}.log"
        self.log = StepLog(path)
        set_device(folder, step_ms * 1e-3, path)
        self._loop = asyncio.new_event_loop()
        self._llm = self._loop.run_until_complete(
            AsyncLLM.start(config_for(folder, num_seqs, overlap, args), engine_factory="null_device:null_engine")
        )
        assert self._llm.tokenizer is not None
        self.tokenizer = self._llm.tokenizer

    def run(self, case: Case, load: Load) -> list[RequestOutput]:
        async def read(prompt: list[int], params: SamplingParams) -> RequestOutput:
            streamed = case.told == "streamed"
            last = [each async for each in self._llm.generate(prompt, params, stream=streamed, push=lambda _: True)]
            return last[-1]

        async def read_all() -> list[RequestOutput]:
            return await asyncio.gather(*map(read, load.prompts, load.params))

        return self._loop.run_until_complete(read_all())

    def close(self) -> None:
        self._loop.run_until_complete(self._llm.shutdown())
        self._loop.close()


def measure(args: argparse.Namespace) -> Iterator[tuple[Case, Cost]]:
    """Yield each case with its best round; one engine for all cases that can share it."""
    with tempfile.TemporaryDirectory(prefix="octavo-overhead-") as name:
        folder = write_checkpoint(Path(name))
        for front, num_seqs, overlap in product(args.front, args.seqs, args.overlap):
            for step_group in [[each] for each in args.step_ms] if front == "process" else [args.step_ms]:
                with _engine(front, folder, num_seqs, overlap, step_group[0], args) as engine:
                    cases = [
                        Case(num_seqs, rows, told, front, step_ms, overlap)
                        for step_ms, rows, told in product(step_group, args.rows, args.told)
                    ]
                    yield from _rounds(engine, cases, args)


@contextmanager
def _engine(
    front: str, folder: Path, num_seqs: int, overlap: bool, step_ms: float, args: argparse.Namespace
) -> Iterator[Here | Process]:
    engine: Here | Process
    if front == "here":
        engine = Here(folder, num_seqs, overlap, args)
    else:
        engine = Process(folder, num_seqs, overlap, args, step_ms)
    try:
        yield engine
    finally:
        engine.close()


def _rounds(engine: Here | Process, cases: list[Case], args: argparse.Namespace) -> Iterator[tuple[Case, Cost]]:
    costs: dict[Case, list[Cost]] = {case: [] for case in cases}
    for number in range(args.rounds):
        for case in cases:
            print(f"\r  round {number + 1}: {label(case)}".ljust(78), end="", file=sys.stderr, flush=True)
            load = Load.of(case, args, seed=number * len(cases) + cases.index(case))
            start = int(np.count_nonzero(engine.log.num_seqs))
            load.check(engine.run(case, load), engine.tokenizer)
            costs[case].append(cost_of(engine.log, start, case, args.steps))
    print("\r".ljust(79) + "\r", end="", file=sys.stderr, flush=True)
    for case, each in costs.items():
        yield case, min(each, key=lambda cost: cost.work)


def label(case: Case) -> str:
    overlap = "overlap" if case.overlap else "no overlap"
    return f"{case.num_seqs} seqs, {case.rows}, {case.told}, {case.front}, {case.step_ms:g} ms, {overlap}"


def heading() -> str:
    names = [each.name.replace("work_", "") for each in fields(Cost)]
    return f"{'seqs':>5} {'rows':<8}{'told':<13}{'front':<8}{'step':>5} {'overlap':<7}" + "".join(
        f"{name:>9}" for name in names
    )


def line(case: Case, cost: Cost) -> str:
    *values, waits = astuple(cost)
    overlap = "yes" if case.overlap else "no"
    return (
        f"{case.num_seqs:>5} {case.rows:<8}{case.told:<13}{case.front:<8}{case.step_ms:>5g} {overlap:<7}"
        + "".join(f"{value:>9,.0f}" for value in values)
        + (f"{waits:>9.1%}" if case.step_ms else f"{'-':>9}")
    )


def verdicts(found: list[tuple[Case, Cost]]) -> Iterator[str]:
    """Yield how the worst cases compare with what is wanted."""
    for num_seqs, wanted_us in WANTED_WORK_US.items():
        costs = [(cost.work, case) for case, cost in found if case.num_seqs == num_seqs and case.front == "here"]
        if costs:
            work, case = max(costs, key=lambda each: each[0])
            yield f"{num_seqs} sequences: at most {work:,.0f} us of work (wanted {wanted_us:,.0f}): {label(case)}"
    waits = [
        (cost.waits, case) for case, cost in found if (case.num_seqs, case.step_ms, case.overlap) == (256, 5, True)
    ]
    if waits:
        most, case = max(waits, key=lambda each: each[0])
        yield f"with overlap the device waits at most {most:.2%} of the time (wanted {WANTED_WAITS:.0%}): {label(case)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=["greedy", "sampled"])
    parser.add_argument("--told", choices=TOLD, nargs="+", default=["at the end", "streamed"])
    parser.add_argument("--front", choices=("here", "process"), nargs="+", default=["here"])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0.0, 1.0, 5.0], help="the device's time")
    parser.add_argument("--overlap", choices=("yes", "no"), nargs="+", default=["no", "yes"])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150, help="measured in each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    args.overlap = [each == "yes" for each in args.overlap]
    print("microseconds of the host per step; step: the device's time in ms; waits: the device's, for the host")
    print(heading())
    found = []
    for case, cost in measure(args):
        found.append((case, cost))
        print(line(case, cost), flush=True)
    for verdict in verdicts(found):
        print(verdict)
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        facts = machine("cpu") | {"python": platform.python_version(), "numpy": np.__version__, "load": os.getloadavg()}
        rows = [asdict(case) | {"us": asdict(cost)} for case, cost in found]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": facts, "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
