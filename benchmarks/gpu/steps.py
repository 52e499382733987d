"""This module times the decode steps of a whole engine beside the floor of what they have to do. It does not know how
the engine works inside.

    PYTHONPATH=.typing:benchmarks python -P -m gpu.steps --model llama-3.1-8b --ceilings FILE

A case is one model, so many sequences of a length, and one way to run the engine. Prompts are computed first; then
steps that do nothing but decode are timed in windows, from an idle device to an idle device.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from octavo.engine import LLM, SamplingParams
from octavo.engine.config import setting_names
from octavo.engine.errors import CapacityError, ConfigError
from octavo.engine.tools.roofline import StepWork

from .floors import Floor, measured_gpu, step_floors
from .lines import Lines, NotRunError, StartError
from .models import find

__all__ = ["CASES", "VARIANTS", "Engine", "Size", "measure", "take_apart"]

VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "graphs and overlap": {"graphs": True, "overlap": True},
    "eager": {"graphs": False, "overlap": False},
    "graphs": {"graphs": True, "overlap": False},
    "overlap": {"graphs": False, "overlap": True},
}
"""Ways to run an engine, the one that a GPU gets by default first."""
FEW_WAYS: Final = ("graphs and overlap", "eager")
"""Those of a quick run, as an engine is started for each."""
BUDGET_TOKENS: Final = 8192
NUM_STEPS: Final = 16
"""Of a window; the median of the windows counts."""
NUM_WINDOWS: Final = 3
NUM_WARMUP: Final = 6
MAX_PREFILL_STEPS: Final = 2000
SLEEP_CYCLES: Final = 120_000_000
"""Some 60 ms: while the device waits the host queues a whole step, so that moments on the device are its own."""
PARTS: Final = {
    "attention of decodes": "attention",
    "attention of prompts": "attention",
    "head": "head and sampling",
    "sample": "head and sampling",
}
"""Parts of a profile that are one part of the floor."""


class Size(NamedTuple):
    """What runs: so many sequences of so many tokens each."""

    batch_size: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.context}"


CASES: Final[dict[str, dict[str, tuple[Size, ...]]]] = {
    "quick": {"llama-3.1-8b": (Size(1, 4096), Size(64, 2048), Size(256, 512))},
    "normal": {
        "llama-3.1-8b": (Size(1, 512), Size(1, 32_768), Size(64, 2048), Size(64, 4096), Size(256, 512), Size(256, 1024))
    },
    "full": {
        "llama-3.1-8b": (
            Size(1, 512),
            Size(1, 32_768),
            Size(64, 2048),
            Size(64, 4096),
            Size(256, 512),
            Size(256, 1024),
        ),
        "qwen3-0.6b": (Size(1, 4096), Size(64, 2048), Size(256, 1024)),
        "qwen3-8b": (Size(1, 4096), Size(64, 2048), Size(256, 512)),
    },
    "tiny": {"tiny": (Size(1, 40), Size(3, 20))},
}
"""By level and model. Keys and values of the largest batch take 34 GiB of Llama-3.1-8B's, beside 15 GiB of weights."""


class Engine:
    """One engine at a time: the next way to run it takes the last one's place.

    Args:
        name: of a model in `models.py`, or a checkpoint.
        sizes: what it must have room for.
        settings: on top of the way to run it: device, dtype.
    """

    def __init__(self, name: str, sizes: tuple[Size, ...], **settings: Any) -> None:
        self._name, self._sizes, self._settings = name, sizes, settings
        self._way: dict[str, Any] | None = None
        self._llm: LLM | None = None

    def get(self, way: Mapping[str, Any]) -> LLM:
        """Return the engine that runs this way.

        Raises:
            NotRunError: it lacks a setting, or memory, or refuses.
        """
        names = setting_names()
        way = {name: value for name, value in way.items() if name in names or value is not False}  # not there: off
        missing = way.keys() - names.keys()
        if missing:
            raise NotRunError(f"this engine has no setting {', '.join(sorted(missing))}")
        if self._llm is None or way != self._way:
            self.close()
            try:
                self._llm, self._way = self._start(way), way
            except (CapacityError, ConfigError) as error:
                raise NotRunError(str(error)) from error
        return self._llm

    def _start(self, way: Mapping[str, Any]) -> LLM:
        room = {
            "max_num_seqs": max(size.batch_size for size in self._sizes),
            "max_num_batched_tokens": BUDGET_TOKENS,
            "prefix_caching": False,
            "max_model_len": max(map(num_tokens, self._sizes)),
            # Each sequence's last block may be nearly empty.
            "kv_cache_tokens": max(size.batch_size * (num_tokens(size) + 64) for size in self._sizes),
        }
        with tempfile.TemporaryDirectory() as folder:
            model, found = find(Path(folder), self._name)
            return LLM(model, **found, **(room | self._settings | way))

    def close(self) -> None:
        """Let the engine go, and its memory."""
        self._llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def num_answers(size: Size) -> int:
    """Return how many tokens each sequence may generate: some do while others' prompts are still computed."""
    prefill_steps = -(-size.batch_size * size.context // max(1, BUDGET_TOKENS - size.batch_size)) + 2
    return prefill_steps + NUM_WARMUP + NUM_STEPS * NUM_WINDOWS + 16


def num_tokens(size: Size) -> int:
    """Return how long a sequence may get."""
    return size.context + num_answers(size)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


@contextmanager
def decoding(llm: LLM, size: Size, seed: int = 0) -> Iterator[None]:
    """Run prompts until every sequence of a batch decodes, and yield; afterwards end them all."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0.0, max_tokens=num_answers(size), ignore_eos=True, detokenize=False)
    width = llm.engine.model_config.vocab_size
    ids = [llm.add(rng.integers(width, size=size.context).tolist(), params) for _ in range(size.batch_size)]
    try:
        calm = 0
        for _ in range(MAX_PREFILL_STEPS):
            before = llm.stats
            llm.step()
            now = llm.stats
            same = now.num_prefill_tokens == before.num_prefill_tokens and now.num_waiting == 0
            calm = calm + 1 if same and now.num_running == size.batch_size else 0
            if calm == NUM_WARMUP:
                break
        assert calm == NUM_WARMUP, f"only {llm.stats.num_running} of {size.batch_size} sequences decode"
        yield
        assert llm.stats.num_running == size.batch_size, "sequences ended while steps were timed"
    finally:
        for request_id in ids:
            llm.abort(request_id)
        while llm.engine.core.has_unfinished:
            llm.step()


def work_now(llm: LLM, size: Size, first_output: int, ahead: float) -> StepWork:
    """Return the work of a step: every sequence reads its prompt and what it has generated since.

    Args:
        first_output: tokens that the engine had generated before the batch.
        ahead: steps from now.
    """
    generated = llm.stats.num_output_tokens - first_output
    seq_lens = round(size.batch_size * (size.context + ahead) + generated)
    return StepWork(size.batch_size, size.batch_size, size.batch_size, seq_lens, seq_lens)


def measure(
    llm: LLM, size: Size, ceilings: Mapping[str, float], *, clock: Callable[[], float] = time.perf_counter
) -> Any:
    """Time decode steps; return what they took, the floor, and how much of the time that explains."""
    device, outputs = llm.engine.resolved.device, llm.stats.num_output_tokens
    seconds: list[float] = []
    works: list[StepWork] = []
    with decoding(llm, size):
        for _ in range(NUM_WINDOWS):
            works.append(work_now(llm, size, outputs, NUM_STEPS / 2))
            synchronize(device)
            start = clock()
            for _ in range(NUM_STEPS):
                llm.step()
            synchronize(device)
            seconds.append((clock() - start) / NUM_STEPS)
    step_s, work = statistics.median(seconds), works[len(works) // 2]
    facts: dict[str, Any] = {
        "status": "measured",
        "us": round(step_s * 1e6, 2),
        "windows_us": [round(each * 1e6, 2) for each in seconds],
        "tokens_per_s": round(size.batch_size / step_s, 1),
    }
    floors = floors_of(llm, work, ceilings)
    if floors:
        floor_s = sum(floor.seconds for floor in floors.values())
        facts |= {"floor_us": round(floor_s * 1e6, 2), "fraction": round(floor_s / step_s, 4)}
    return facts


def floors_of(llm: LLM, work: StepWork, ceilings: Mapping[str, float]) -> dict[str, Floor]:
    """Return the floors of a step's parts, or nothing where the ceilings were not measured."""
    if not {"copy_bytes_per_s", "matmul_flops_per_s"} <= set(ceilings):
        return {}
    resolved, cache = llm.engine.resolved, llm.engine.config.cache
    stored = None if cache.kv_cache_dtype == "auto" else cache.kv_cache_dtype
    gpu = measured_gpu(ceilings, resolved.dtype)
    return step_floors(llm.engine.model_config, gpu, work, dtype=resolved.dtype, kv_cache_dtype=stored)


def take_apart(llm: LLM, size: Size, ceilings: Mapping[str, float], *, num_steps: int = 5) -> dict[str, Any]:
    """Time the parts of a few eager steps by events on the device; on a CPU by the host's clock.

    Returns:
        Per part what it took and its floor, the largest loss first; what has no floor is all loss.
    """
    from octavo.engine.tools.profile.probes import attached
    from octavo.engine.tools.profile.spans import Spans

    device, outputs = llm.engine.resolved.device, llm.stats.num_output_tokens
    on_gpu = device != "cpu"
    make_event: Any = (lambda: torch.cuda.Event(enable_timing=True)) if on_gpu else None
    spans = Spans(make_event)
    sums: dict[str, list[float]] = {}
    with decoding(llm, size), attached(llm, spans):
        floors = floors_of(llm, work_now(llm, size, outputs, num_steps / 2), ceilings)
        for _ in range(num_steps):
            synchronize(device)
            if on_gpu:
                torch.cuda._sleep(SLEEP_CYCLES)
            llm.step()
            synchronize(device)
            for name, part in spans.take()[1].items():
                own = sums.setdefault(PARTS.get(name, name), [])
                own.append(part.device_s if on_gpu else part.seconds)
    took = {name: 1e6 * sum(each) / num_steps for name, each in sums.items()}
    rows = [
        {"part": name, "us": round(us, 2), "floor_us": round(1e6 * floors[name].seconds, 2) if name in floors else 0.0}
        for name, us in took.items()
    ]
    rows.sort(key=lambda row: row["us"] - row["floor_us"], reverse=True)
    return {
        "status": "measured",
        "us": round(sum(took.values()), 2),
        "parts": rows,
        "by": "device" if on_gpu else "host",
    }


def make_cases(
    engine: Engine,
    model: str,
    sizes: tuple[Size, ...],
    ways: Mapping[str, Mapping[str, Any]],
    ceilings: Mapping[str, float],
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the cases of one model: way by way, as an engine is started for each, the parts with the eager one."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, way in ways.items():
        measures: dict[str, Any] = {name: measure} | ({"parts": take_apart} if way == VARIANTS["eager"] else {})
        sharing = [f"{model}/{size}/{what}" for what in measures for size in sizes]
        for what, how in measures.items():
            for size in sizes:
                cases[f"{model}/{size}/{what}"] = partial(_run, how, engine, way, size, ceilings, sharing)
    return cases


def _run(
    how: Any,
    engine: Engine,
    way: Mapping[str, Any],
    size: Size,
    ceilings: Mapping[str, float],
    sharing: list[str],
) -> dict[str, Any]:
    try:
        llm = engine.get(way)
    except NotRunError:
        raise
    except Exception as error:
        raise StartError(sharing) from error
    found: dict[str, Any] = how(llm, size, ceilings)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every module that runs whole engines asks for."""
    Lines.add_options(parser)
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape by its name, or a checkpoint")
    parser.add_argument("--level", choices=CASES, default="normal")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ceilings", type=Path, help="JSON of gpu.ceilings' rates, for floors")


def read_ceilings(args: argparse.Namespace) -> dict[str, float]:
    """Return the rates that were measured in the same run; nothing where they were not."""
    return json.loads(args.ceilings.read_text(encoding="utf-8")) if args.ceilings else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()
    sizes = CASES[args.level].get(args.model) or CASES["quick"]["llama-3.1-8b"]
    engine = Engine(args.model, sizes, device=args.device, dtype=args.dtype)
    ways = {name: way for name, way in VARIANTS.items() if args.level != "quick" or name in FEW_WAYS}
    Lines.from_options(args).run(make_cases(engine, args.model, sizes, ways, read_ceilings(args)))


if __name__ == "__main__":
    main()
