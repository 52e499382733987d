"""This module holds the engine's loop: schedule, execute, update. It does not know text, HTTP or which device runs.

It is the only place where a scheduler and a runner meet. What may never be added here: a loop over requests, a tensor,
a reading of the clock outside the injected one.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from .errors import EngineDeadError
from .request import Request
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .step import EngineOutput, ModelRunner

__all__ = ["EngineCore"]

MAX_FAILED_STEPS = 3
"""Steps that may fail in a row before the engine gives up."""


class EngineCore:
    """Runs many sequences together, one step at a time.

    Args:
        scheduler: decides what runs.
        runner: runs it.
        seed: where seeds of requests without one come from.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, *, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._rng = Random(seed)
        self._num_failed_steps = 0
        self._num_arrived = 0

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = False,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Queue a request: `params.n` sequences over one prompt.

        Args:
            request_id: unique among the requests that are not finished.
            prompt_token_ids: token ids below the width of the logits.
            params: `max_tokens` of None means up to the engine's limit.
            stream: report each token as it comes, instead of all at the end.
            priority: smaller is earlier, under the priority policy.
            cache_salt: share prefix blocks only with requests of equal salt.

        Raises:
            RequestError: the request can never run, or its id is taken.
        """
        limits = self.scheduler.limits
        params.validate_for(
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            prompt_token_ids=prompt_token_ids,
        )
        tokens = np.asarray(prompt_token_ids, dtype=np.int32)
        room = limits.max_model_len - len(tokens)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        stops = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops |= limits.eos_token_ids
        seed = self._rng.getrandbits(63) if params.seed is None else params.seed
        self._num_arrived += 1
        self.scheduler.add(
            [
                Request(
                    request_id=request_id,
                    index=index,
                    token_ids=tokens,
                    num_prompt_tokens=len(tokens),
                    max_num_tokens=len(tokens) + max_tokens,
                    params=params,
                    seed=seed,
                    stop_token_ids=stops,
                    priority=priority,
                    arrival=self._num_arrived,
                    cache_salt=cache_salt,
                    stream=stream,
                )
                for index in range(params.n)
            ]
        )

    def abort(self, request_id: str) -> list[EngineOutput]:
        """End every sequence of a request now and free its blocks; an unknown or finished id is not an error."""
        return self.scheduler.abort(request_id)

    def finish(self, request_id: str, index: int, num_output_tokens: int) -> EngineOutput | None:
        """End one sequence at a stop string the front has found, keeping its first `num_output_tokens` tokens."""
        return self.scheduler.finish(request_id, index, num_output_tokens)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.has_unfinished

    def step(self) -> list[EngineOutput]:
        """Run one step and return the news of those sequences that have any.

        Raises:
            EngineDeadError: several steps in a row have failed.
        """
        work = self.scheduler.schedule()
        if work is None:
            return self.scheduler.take_news()
        try:
            output = self.runner.execute(work).wait()
        except Exception as error:
            self._num_failed_steps += 1
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                raise EngineDeadError(f"{MAX_FAILED_STEPS} steps failed in a row, last with {error!r}") from error
            return self.scheduler.fail(work, f"the step that ran this request failed: {error!r}")
        self._num_failed_steps = 0
        return self.scheduler.update(work, output)


