"""This module holds requests that come and go beside a run. It does not know what the run is about."""

from __future__ import annotations

import random

from octavo.engine.llm import LLM, GenerationProgress
from octavo.engine.sampling_params import SamplingParams


class Storm:
    """Adds requests beside a run and aborts them at random moments."""

    def __init__(self, llm: LLM, rng: random.Random, prompts: list[list[int]]) -> None:
        self._core = llm.engine.core
        self._rng = rng
        self._prompts = prompts
        self._alive: list[str] = []
        self.num_aborted = 0

    def __call__(self, progress: GenerationProgress) -> None:
        if progress.num_finished < progress.num_requests:
            for _ in range(self._rng.randint(0, 4)):
                request_id = f"storm-{self.num_aborted + len(self._alive)}"
                params = SamplingParams(max_tokens=50, n=self._rng.randint(1, 2))
                self._core.add_request(request_id, self._rng.choice(self._prompts), params, stream=True)
                self._alive.append(request_id)
        self._rng.shuffle(self._alive)
        num_kept = 0 if progress.num_finished == progress.num_requests else self._rng.randint(0, 6)
        for request_id in self._alive[num_kept:]:
            self._core.abort(request_id)
            self.num_aborted += 1
        del self._alive[num_kept:]
