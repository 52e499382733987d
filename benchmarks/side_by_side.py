"""Whole engines side by side in one run: the same weights, prompts, lengths and dtype for all, greedily.

    python benchmarks/side_by_side.py --model tiny --device cpu
    python benchmarks/side_by_side.py --model llama-3.1-8b            # random weights of its shape, on a GPU
    python benchmarks/side_by_side.py --model FOLDER --dtype bfloat16

Offline: all prompts are there at once, new tokens per second count, engines take turns. At a rate: requests arrive one
by one, the same moments for all; the time to the first token and between tokens counts. A peer's figures are reported
only if every token it chose was, to our engine behind the same tokens, the likeliest or nearly so.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import peers.engine_runs as runs
import torch
from gpu.lines import Lines, NotRunError, StartError
from gpu.models import find
from octavo.engine.errors import CapacityError, ConfigError
from octavo.engine.loader import resolve_model
from octavo.engine.tools.workload import gamma_arrivals
from peers import Unsuitable
from peers.engine_runs import Answers, EngineRuns, OctavoRuns, Workload

NEAR_TIE: Final = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.5}
"""Nats between the token that an engine chose and our likeliest: what rounding explains in a deep model."""


ROUNDS_S: Final = 90.0
"""No further round is begun after that long: a slow peer's are long enough to count alone."""


class Scale(NamedTuple):
    """How much is asked."""

    num_prompts: int
    shortest: int
    longest: int
    num_tokens: int
    max_num_seqs: int
    rates: tuple[float, ...]
    """Requests per second."""
    num_rounds: int = 3
    online_s: float = 15.0
    """About how long requests arrive at each rate."""


SCALES: Final = {
    "tiny": Scale(6, 5, 40, 8, 4, (40.0,), num_rounds=2, online_s=0.2),
    "quick": Scale(128, 32, 1024, 128, 128, (8.0,), num_rounds=2, online_s=8.0),
    "normal": Scale(256, 32, 1024, 128, 256, (2.0, 8.0, 16.0)),
    "full": Scale(256, 32, 1024, 128, 256, (1.0, 4.0, 16.0), online_s=20.0),
}
"""Two engines with the weights and the room of the largest have to fit beside each other, and a peer without paged
attention has to end a round in time: longer or more prompts are for neither."""


class Engines:
    """Ours and the others, each started when it is first needed and kept."""

    def __init__(self, workload: Workload, checkpoint: Any) -> None:
        self.workload, self._checkpoint = workload, checkpoint
        self._ours: OctavoRuns | None = None
        self._others: dict[str, EngineRuns] = {}
        self.reasons: dict[str, str] = {}
        """Why a peer takes no part."""

    @property
    def ours(self) -> OctavoRuns:
        """Our engine."""
        if self._ours is None:
            self._ours = OctavoRuns(self.workload)
        return self._ours

    def others(self) -> dict[str, EngineRuns]:
        """Return the peers that can run, by name."""
        _ = self.ours  # first, so that its share of the memory is taken
        for name in runs.ENGINES:
            if name in self._others or name in self.reasons:
                continue
            tell(f"starting {name}")
            try:
                self._others[name] = runs.start(name, self.workload, self._checkpoint)
            except ImportError as error:
                self.reasons[name] = f"not here: {error}"
            except Unsuitable as error:
                self.reasons[name] = str(error)
            except Exception:  # somebody else's library, in whatever state it is
                self.reasons[name] = traceback.format_exc(limit=-3)[-900:]
                free_memory()
        return dict(self._others)

    def drop(self, name: str, reason: str) -> None:
        """Let a peer go that did not do what it was asked, so that it does not run on beside the others."""
        self.reasons[name] = reason
        try:
            self._others.pop(name).close()
        except Exception as error:  # it is gone all the same
            self.reasons[name] += f"; and closing it: {error}"

    def close(self) -> None:
        """Let all go."""
        for peer in self._others.values():
            peer.close()
        self._others.clear()
        if self._ours is not None:
            self._ours.close()
            self._ours = None


def free_memory() -> None:
    """Give back what a failed start held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tell(text: str) -> None:
    """Say on stderr what is running, as it takes a while."""
    print(f"  {text} ...", file=sys.stderr, flush=True)


def make_prompts(scale: Scale, num: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return prompts of random tokens: most short, few long, in no order."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(math.log(scale.shortest), math.log(scale.longest), num)).round().astype(int)
    return [rng.integers(vocab_size, size=length).tolist() for length in lengths]


def judge(
    ours: OctavoRuns,
    prompts: Sequence[Sequence[int]],
    answers: Answers,
    expected: Answers,
    num_tokens: int,
    limit: float,
) -> dict[str, Any]:
    """Hold some of an engine's answers against our own logits.

    Returns:
        How many answers equal ours; of the tokens looked at, how many were not our likeliest, and by how much.

    Raises:
        AssertionError: an answer is too short, or a token is further off than near-ties explain.
    """
    lengths = {len(answer) for answer in answers.token_ids}
    assert lengths == {num_tokens}, f"answers have {sorted(lengths)} tokens, not {num_tokens}: not reported"
    checked = slice(0, runs.CHECKED)
    gaps = ours.behind(prompts[checked], answers.token_ids[checked])
    worst = max(max(each) for each in gaps)
    assert worst <= limit, f"a token is {worst:.3g} nats behind our likeliest, more than {limit}: not reported"
    pairs = zip(answers.token_ids, expected.token_ids, strict=True)
    return {
        "num_equal": sum(one == other for one, other in pairs),
        "num_answers": len(answers.token_ids),
        "num_tokens_checked": sum(map(len, gaps)),
        "num_near_ties": sum(gap > 0 for each in gaps for gap in each),
        "worst_gap": round(worst, 6),
    }


def attempt(engines: Engines, name: str, run: Callable[[EngineRuns], Answers], peer: EngineRuns) -> Answers | None:
    """Return a peer's answers; None where it could not give them, and is gone."""
    try:
        return run(peer)
    except TimeoutError as error:
        engines.drop(name, f"out of time: {error}")
    except Exception:  # somebody else's library, in whatever state it is
        engines.drop(name, traceback.format_exc(limit=-3)[-900:])
    return None


def take_turns(
    engines: Engines, prompts: list[list[int]], num_tokens: int, run: Callable[[EngineRuns], Answers], num_rounds: int
) -> tuple[dict[str, list[Answers]], dict[str, dict[str, Any]], list[str]]:
    """Let all engines answer, round by round, and judge the first round's answers.

    Returns:
        The answers of each engine and round, what is known of each peer, and what is wrong.
    """
    found: dict[str, list[Answers]] = {"octavo": []}
    about: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    limit, begin = NEAR_TIE[engines.workload.dtype], time.monotonic()
    for number in range(num_rounds):
        if number and time.monotonic() - begin > ROUNDS_S:
            break
        tell(f"octavo, round {number + 1} of {num_rounds}")
        found["octavo"].append(run(engines.ours))
        if number == 0:
            about["octavo"] = judge(engines.ours, prompts, found["octavo"][0], found["octavo"][0], num_tokens, limit)
        for name, peer in engines.others().items():
            tell(f"{name}, round {number + 1} of {num_rounds}")
            answers = attempt(engines, name, run, peer)
            if answers is None:
                continue
            try:
                judged = judge(engines.ours, prompts, answers, found["octavo"][number], num_tokens, limit)
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
                engines.drop(name, str(error))
                continue
            found.setdefault(name, []).append(answers)
            about.setdefault(name, judged | {"about": peer.facts})
    return {name: each for name, each in found.items() if name not in engines.reasons}, about, wrong


def result(
    engines: Engines, figures: dict[str, dict[str, Any]], about: Mapping[str, dict[str, Any]], wrong: list[str]
) -> dict[str, Any]:
    """Return a case's facts: ours, and beside them the others' or why there are none."""
    ours = figures.pop("octavo")
    beside = {name: {"reason": reason} for name, reason in engines.reasons.items()}
    beside |= {name: each | about[name] for name, each in figures.items()}
    facts = {"status": "failed", "reason": "; ".join(wrong)} if wrong else {"status": "measured"}
    return facts | {**ours, **about["octavo"], "about": engines.ours.facts, "beside": beside}


def offline(engines: Engines, scale: Scale, vocab_size: int) -> dict[str, Any]:
    """All prompts at once; the median of rounds that follow each other."""
    prompts = make_prompts(scale, scale.num_prompts, vocab_size, seed=1)
    warm = make_prompts(scale, min(scale.num_prompts, scale.max_num_seqs), vocab_size, seed=2)
    engines.ours.offline(warm, 4)
    for name, peer in engines.others().items():
        tell(f"warming {name}")
        attempt(engines, name, lambda peer: peer.offline(warm, 4), peer)
    answers, about, wrong = take_turns(
        engines, prompts, scale.num_tokens, lambda each: each.offline(prompts, scale.num_tokens), scale.num_rounds
    )
    total = scale.num_prompts * scale.num_tokens
    figures: dict[str, dict[str, Any]] = {}
    for name, rounds in answers.items():
        rates = [total / each.seconds for each in rounds]
        figures[name] = {
            "tokens_per_s": round(statistics.median(rates), 2),
            "rounds": [round(rate, 2) for rate in rates],
        }
        if name != "octavo":
            pairs = zip(answers["octavo"], rounds, strict=True)
            figures[name]["ratio"] = round(statistics.median(them.seconds / us.seconds for us, them in pairs), 4)
    lengths = {"num_prompts": len(prompts), "num_prompt_tokens": sum(map(len, prompts)), "num_new_tokens": total}
    return result(engines, figures, about, wrong) | lengths


def online(engines: Engines, scale: Scale, vocab_size: int, rate: float) -> dict[str, Any]:
    """Requests that arrive at a rate, at the same moments for all."""
    num = max(4, round(rate * scale.online_s))
    prompts = make_prompts(scale, num, vocab_size, seed=3)
    arrivals = gamma_arrivals(num, rate, 1.0, 0).tolist()
    answers, about, wrong = take_turns(
        engines, prompts, scale.num_tokens, lambda each: each.online(prompts, scale.num_tokens, arrivals), 1
    )
    figures = {name: latencies(rounds[0], arrivals, scale.num_tokens) for name, rounds in answers.items()}
    return result(engines, figures, about, wrong) | {"num_prompts": num, "requests_per_s": rate}


def latencies(answers: Answers, arrivals: Sequence[float], num_tokens: int) -> dict[str, float]:
    """Return the percentiles of the time to the first token, and of the time of each after it, in milliseconds."""
    first, end = np.array(answers.first_s), np.array(answers.end_s)
    waits = {"ttft": first - np.array(arrivals), "tpot": (end - first) / max(1, num_tokens - 1)}
    found = {
        f"{name}_ms_p{part}": round(1e3 * float(np.percentile(seconds, part)), 3)
        for name, seconds in waits.items()
        for part in (50, 90, 99)
    }
    return found | {"seconds": round(answers.seconds, 3)}


def make_workload(args: argparse.Namespace, scale: Scale, scratch: Path) -> tuple[Workload, Any]:
    """Return what all engines get, and the checkpoint it comes from."""
    model, settings = find(scratch, args.model)
    checkpoint = resolve_model(model, **settings)
    dtype = args.dtype
    if dtype == "auto":
        dtype = "float32" if args.device == "cpu" else checkpoint.model_config.dtype
    return (
        Workload(
            model,
            settings,
            args.device,
            dtype,
            max_num_seqs=scale.max_num_seqs,
            max_model_len=min(checkpoint.model_config.max_position, scale.longest + scale.num_tokens + 2),
            timeout_s=args.timeout_s,
            scratch=scratch,
        ),
        checkpoint,
    )


def line(name: str, facts: Mapping[str, Any]) -> str:
    """Return one case as a reader wants it."""
    if facts["status"] not in ("measured", "failed") or "beside" not in facts:
        return f"{name}: {facts['status']}: {facts.get('reason', '')}"
    shown = []
    for engine, each in {"octavo": facts, **facts["beside"]}.items():
        if "tokens_per_s" in each:
            ratio = f" (octavo: {each['ratio']:.2f} times that)" if "ratio" in each else ""
            shown.append(f"{engine} {each['tokens_per_s']:.0f} tokens/s{ratio}")
        elif "ttft_ms_p50" in each:
            first, token = each["ttft_ms_p50"], each["tpot_ms_p50"]
            shown.append(f"{engine} first token {first:.1f} ms, then {token:.2f} ms each (medians)")
        else:
            shown.append(f"{engine}: {each['reason'].strip().splitlines()[-1][:100]}")
    return f"{name}: " + "; ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Lines.add_options(parser)
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape by its name, or a checkpoint")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("auto", *NEAR_TIE), default="auto")
    parser.add_argument("--level", choices=SCALES, help="how much (default: tiny on a CPU, else normal)")
    parser.add_argument("--timeout-s", type=float, default=200.0, help="how long a peer may take for one round")
    args = parser.parse_args()
    scale = SCALES[args.level or ("tiny" if args.device == "cpu" else "normal")]
    lines = Lines.from_options(args)
    label, begin = Path(args.model).name, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workload, checkpoint = make_workload(args, scale, Path(folder))
        engines = Engines(workload, checkpoint)
        vocab_size = checkpoint.model_config.vocab_size

        def told(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            try:
                _ = engines.ours
            except (CapacityError, ConfigError) as error:
                raise NotRunError(str(error)) from error
            except Exception as error:
                raise StartError(cases) from error
            facts = measure()
            if not facts["beside"]:
                raise NotRunError("there is nothing to compare with")
            print(line(name, facts), file=sys.stderr, flush=True)
            return facts | {"dtype": workload.dtype}

        cases = {f"{label}/offline": partial(offline, engines, scale, vocab_size)}
        for rate in scale.rates:
            cases[f"{label}/{rate:g} requests per second"] = partial(online, engines, scale, vocab_size, rate)
        try:
            lines.run({name: partial(told, name, measure) for name, measure in cases.items()})
        finally:
            engines.close()  # else a peer's thread would outlive this one
    tell(f"{time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
