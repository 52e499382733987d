"""Micro benchmarks of the sampler: one step of 32 rows over the logits of a vocabulary of 49,152; and what the host
alone does for a steady batch, with the device's part replaced by an op that returns at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine.runner.sampler import SampledTokens, Sampler
from octavo.engine.sampling_params import SamplingParams
from octavo.kernels import dispatch
from octavo.kernels.sampling import SampleOutput

NUM_ROWS, VOCAB_SIZE = 32, 49_152

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top_k and top_p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


def make_sampler(case: str, num_rows: int) -> Sampler:
    sampler = Sampler(num_rows, VOCAB_SIZE)
    for row in range(num_rows):
        sampler.add(row, SamplingParams(**CASES[case]), prompt_token_ids=range(100), seed=row)
    return sampler


@pytest.mark.parametrize("case", CASES)
def test_sample(case: str, benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((NUM_ROWS, VOCAB_SIZE), generator=generator) * 3
    sampler = make_sampler(case, NUM_ROWS)
    rows, positions = np.arange(NUM_ROWS), np.full(NUM_ROWS, 100)
    with torch.inference_mode():
        drawn = benchmark(sampler.sample, logits, rows, positions)
    assert drawn.failed is None
    assert ((drawn.token_ids >= 0) & (drawn.token_ids < VOCAB_SIZE)).all()


@pytest.mark.parametrize("num_rows", [1, 64, 256, 1024])
@pytest.mark.parametrize("case", ["greedy", "top_p"])
def test_host(case: str, num_rows: int, benchmark: Any) -> None:
    output = SampleOutput(torch.arange(num_rows), torch.zeros(num_rows, dtype=torch.bool))
    sampler, logits, positions = make_sampler(case, num_rows), torch.zeros(num_rows, 1), np.full(num_rows, 100)

    def step() -> SampledTokens:
        return sampler.launch(logits, np.arange(num_rows), positions).wait()

    with torch.inference_mode(), dispatch.override("sample", lambda *_, **__: output):
        drawn = benchmark(step)
    assert drawn.token_ids.tolist() == list(range(num_rows))
