"""This module compares the engine on the kernels with the engine on the torch backend, on one checkpoint. It does not
know the kernels.

    PYTHONPATH=.typing:benchmarks python -P -m gpu.engines --model FOLDER

Both generate greedily in float32; tokens must be equal up to a step at which the two likeliest are too close to call.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any, Final

import torch
from octavo.engine import LLM, SamplingParams
from workload import prompts as make_prompts

from .lines import Lines

NUM_PROMPTS: Final = 8
NUM_TOKENS: Final = 32
NEAR_TIE: Final = 1e-3


def generate(model: str, backend: str, dtype: str) -> list[Any]:
    """Return the answers of one backend, and leave no memory behind."""
    room = {"max_num_seqs": NUM_PROMPTS, "max_model_len": 512, "kv_cache_tokens": 512 * NUM_PROMPTS}
    llm = LLM(model, backend=backend, device="cuda", dtype=dtype, **room)
    prompts = make_prompts(llm.tokenizer, NUM_PROMPTS)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    answers = [output.outputs[0] for output in llm.generate(prompts, params)]
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return answers


def compare(ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """Assert that answers are equal up to near ties; return how many were cut short by one, and how far they were."""
    ties, apart = 0, 0.0
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for step, (token, expected) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
            first, second = other.logprobs[step].top_logprobs[:2]
            if token != expected:
                assert first - second < NEAR_TIE, f"prompt {number}, step {step}: {token}, not {expected}"
                ties += 1
                break
            apart = max(apart, abs(one.logprobs[step].logprob - other.logprobs[step].logprob))
    return {"num_prompts": len(ours), "num_near_ties": ties, "max_logprob_diff": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Lines.add_options(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    def run() -> dict[str, Any]:
        return compare(*(generate(args.model, backend, args.dtype) for backend in ("triton", "torch")))

    Lines.from_options(args).run({f"{Path(args.model).name}, {args.dtype}": run})


if __name__ == "__main__":
    main()
