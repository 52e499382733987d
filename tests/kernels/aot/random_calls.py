"""This program runs ops at random sizes on a GPU that is not there and prints which variants leave the listed set.

With --despecialize it first forgets, one by one, which arguments Triton is told not to specialise on, and prints how
many variants leave the set for each of them.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

from octavo.kernels.aot import calls
from octavo.kernels.aot.calls import Call, Settings
from octavo.kernels.aot.driver import Launch, recording
from octavo.kernels.aot.keys import list_variants
from octavo.kernels.aot.targets import GPUS, MODELS, Model
from octavo.kernels.dispatch import OPS

TARGET = "sm_90"


def random_calls(model: Model, settings: Settings, rng: random.Random) -> Iterator[Call]:
    """Yield the calls of one step."""

    def size(limit: int) -> int:
        """Draw small sizes, multiples of 16 and others about as often."""
        n = rng.choice(
            (rng.randint(1, min(limit, 20)), 16 * rng.randint(1, max(limit // 16, 1)), rng.randint(1, limit))
        )
        return min(n, limit)

    num_tokens, num_seqs = size(settings.max_num_batched_tokens), size(settings.max_num_seqs)
    width = size(-(-settings.max_model_len // settings.block_size))
    yield calls.norm_call(model, num_tokens, residual=rng.random() < 0.5)
    yield calls.activation_call(model, num_tokens)
    yield calls.write_call(model, settings, num_tokens)
    yield calls.copy_call(model, settings, num_tokens)
    start = rng.choice((0, rng.randint(1, 20)))
    yield calls.expand_call(
        settings, num_seqs=min(num_seqs, num_tokens), num_tokens=num_tokens, num_columns=width, start=start,
        width=width + rng.choice((0, 1, 16)),
    )  # fmt: skip
    max_query_len = rng.choice((1, rng.randint(1, 16)))
    yield calls.attention_call(
        model, settings, "decode", num_seqs=num_seqs, max_query_len=max_query_len, max_blocks_per_seq=width,
        num_tokens=rng.randint(max(num_seqs, max_query_len), num_seqs * max_query_len + max_query_len),
        shared=rng.random() < 0.5,
    )  # fmt: skip
    num_seqs = min(num_seqs, num_tokens)
    yield calls.attention_call(
        model, settings, "prefill", num_seqs=num_seqs, num_tokens=num_tokens, max_blocks_per_seq=width,
        max_query_len=rng.randint(-(-num_tokens // num_seqs), num_tokens), start=rng.randint(0, 40),
    )  # fmt: skip
    names = (*calls.FILTERS, *calls.ENTRIES, "temperature")
    features = frozenset(name for name in names if rng.random() < 0.3)
    num_rows = size(settings.max_num_seqs)
    start = rng.choice((0, rng.randint(1, 20)))
    yield calls.sample_call(model, num_rows, features, start)
    yield calls.logprobs_call(model, num_rows, rng.choice((0, 1, 5, 20, rng.randint(0, 20))), start)


def launched(model: Model, settings: Settings, num_steps: int, seed: int) -> dict[Launch, None]:
    rng = random.Random(seed)
    with recording(GPUS[TARGET]) as seen:
        for call in itertools.chain.from_iterable(random_calls(model, settings, rng) for _ in range(num_steps)):
            if "triton" in OPS[call.op]:
                call.run()
    return seen


def despecialized(model: Model, settings: Settings, known: set[Launch], num_steps: int, seed: int) -> dict[str, int]:
    found = {}
    given: dict[tuple[str, str], set[str]] = {}  # kernel -> its arguments that are not left out everywhere
    for launch in known:
        given.setdefault((launch.module, launch.kernel), set()).update(launch.signature)
    for (module, name), names in sorted(given.items()):
        kernel: Any = getattr(importlib.import_module(module), name)
        for parameter in kernel.params:
            for rule in ("do_not_specialize", "do_not_specialize_on_alignment"):
                if getattr(parameter, rule) and parameter.name in names:
                    setattr(parameter, rule, False)
                    kernel.device_caches.clear()
                    found[f"{name}.{parameter.name}"] = len(launched(model, settings, num_steps, seed).keys() - known)
                    setattr(parameter, rule, True)
                    kernel.device_caches.clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--block-sizes", default="16,64")
    parser.add_argument("--despecialize", action="store_true")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"num_known": 0, "num_launched": 0, "unknown": [], "despecialized": {}}
    for name, block_size in itertools.product(arguments.models.split(","), arguments.block_sizes.split(",")):
        model, settings = MODELS[name], Settings(block_size=int(block_size))
        variants = list_variants(model, [settings], GPUS[TARGET])
        known = {variant.launch for variant in variants}
        seen = launched(model, settings, arguments.steps, arguments.seed)
        report["num_known"] += len(known)
        report["num_launched"] += len(seen)
        report["unknown"] += [f"{name}: {launch.kernel} {launch.signature}" for launch in seen if launch not in known]
        if arguments.despecialize:
            for place, count in despecialized(model, settings, known, arguments.steps, arguments.seed).items():
                report["despecialized"][place] = report["despecialized"].get(place, 0) + count
    print(json.dumps(report))


if __name__ == "__main__":
    main()
