"""Micro benchmarks of the sampler: one step of 32 rows over the logits of a vocabulary of 49,152."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine.runner.sampler import Sampler
from octavo.engine.sampling_params import SamplingParams

NUM_ROWS, VOCAB_SIZE = 32, 49_152

CASES = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top_k and top_p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_sample(case: str, benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((NUM_ROWS, VOCAB_SIZE), generator=generator) * 3
    sampler = Sampler(NUM_ROWS, VOCAB_SIZE)
    for row in range(NUM_ROWS):
        sampler.add(row, SamplingParams(**CASES[case]), prompt_token_ids=range(100), seed=row)
    rows, positions = np.arange(NUM_ROWS), np.full(NUM_ROWS, 100)
    with torch.inference_mode():
        drawn = benchmark(sampler.sample, logits, rows, positions)
    assert drawn.failed is None
    assert ((drawn.token_ids >= 0) & (drawn.token_ids < VOCAB_SIZE)).all()
