"""This module times an engine whose keys and values are stored in other dtypes. It does not know how they are.

    PYTHONPATH=.typing:benchmarks python -P -m gpu.kv --model llama-3.1-8b --ceilings FILE

For each dtype, decode steps of a long context, and answers to many prompts from the first to the last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import numpy as np
from octavo.engine import LLM, SamplingParams

from .lines import Lines
from .steps import Engine, Size, add_options, measure, read_ceilings

__all__ = ["DTYPES", "end_to_end"]

DTYPES: Final = ("auto", "fp8", "int8")
SIZES: Final = {"tiny": Size(2, 40)}
USUAL: Final = Size(64, 4096)
NUM_TOKENS: Final = 64


def end_to_end(llm: LLM, size: Size) -> dict[str, Any]:
    """Answer as many prompts as run together, of a quarter of the length; return new tokens per second."""
    rng, width = np.random.default_rng(1), llm.engine.model_config.vocab_size
    num_tokens = min(NUM_TOKENS, size.context)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    prompts = [rng.integers(width, size=max(1, size.context // 4)).tolist() for _ in range(size.batch_size)]
    llm.generate(prompts[:1], params)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs), "an answer is too short"
    return {"end_to_end_tokens_per_s": round(size.batch_size * num_tokens / seconds, 1)}


def run(engine: Engine, dtype: str, size: Size, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Measure one dtype."""
    llm = engine.get({"kv_cache_dtype": dtype})
    bytes_per_token = llm.engine.resolved.kv_bytes_per_token
    return measure(llm, size, ceilings) | end_to_end(llm, size) | {"kv_bytes_per_token": bytes_per_token}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()
    size, ceilings = SIZES.get(args.model, USUAL), read_ceilings(args)
    engine = Engine(args.model, (size,), device=args.device, dtype=args.dtype)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"{args.model}/{size}/{dtype}": partial(run, engine, dtype, size, ceilings) for dtype in DTYPES
    }
    Lines.from_options(args).run(cases)


if __name__ == "__main__":
    main()
