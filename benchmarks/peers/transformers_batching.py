"""This module holds transformers' continuous batching as an engine beside ours. It does not know what is compared.

Its defaults are kept: attention is what it picks where flash attention is installed, else SDPA; `facts` says which, as
that decides much. What is set is what our engine has too: sequences and tokens of a step, room for keys and values.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Final

import torch

from .engine_runs import Answers, Workload
from .transformers_weights import build

__all__ = ["NAME", "TransformersRuns", "start"]

NAME: Final = "transformers"
PAGE: Final = 256
"""Tokens of its blocks, by its own default."""
POLL_S: Final = 0.05


def start(workload: Workload, checkpoint: Any) -> TransformersRuns:
    """Start it on our weights."""
    return TransformersRuns(workload, checkpoint)


class TransformersRuns:
    """Its manager, whose thread runs the model while this one sends and receives."""

    def __init__(self, workload: Workload, checkpoint: Any) -> None:
        import transformers
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._timeout_s = workload.timeout_s
        self._model = build(checkpoint, getattr(torch, workload.dtype), workload.device)
        self._greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        known = {each.name for each in dataclasses.fields(ContinuousBatchingConfig)}
        wanted = {
            "page_size" if "page_size" in known else "block_size": PAGE,
            "num_blocks": workload.max_num_seqs * -(-workload.max_model_len // PAGE) + 2,
            "max_batch_tokens": workload.max_num_batched_tokens,
            "max_requests_per_batch": workload.max_num_seqs,
            "allow_block_sharing": False,
        }
        settings = {name: value for name, value in wanted.items() if name in known}
        if not self._has_room(ContinuousBatchingConfig(**settings)):
            settings = {"allow_block_sharing": False, "max_batch_tokens": workload.max_num_batched_tokens}
            self._prepare(ContinuousBatchingConfig(**settings))
        resolved = getattr(self._manager, "continuous_batching_config", None)
        self.facts = {
            "version": transformers.__version__,
            "attention": str(self._model.config._attn_implementation),
            "cuda_graphs": str(getattr(resolved, "use_cuda_graph", None)),
            "asynchronous": str(getattr(resolved, "use_async_batching", None)),
            "settings": settings,
        }
        self._manager.start()

    def _has_room(self, config: Any) -> bool:
        """Prepare it with the room that we have; return whether there is so much, and what it wants beside it."""
        try:
            self._prepare(config)
        except (MemoryError, ValueError, torch.OutOfMemoryError):
            return False
        return True

    def _prepare(self, config: Any) -> None:
        """Make its manager, and what it makes before the first request: its cache, graphs."""
        self._manager = self._model.init_continuous_batching(
            generation_config=self._greedy, continuous_batching_config=config
        )
        self._manager.warmup()

    def offline(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answers:
        return self._run(prompts, num_tokens, [0.0] * len(prompts), stream=False)

    def online(self, prompts: Sequence[Sequence[int]], num_tokens: int, arrivals: Sequence[float]) -> Answers:
        return self._run(prompts, num_tokens, arrivals, stream=True)

    def _run(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, arrivals: Sequence[float], *, stream: bool
    ) -> Answers:
        found, places = Answers.none(len(prompts)), dict[str, int]()
        order = sorted(range(len(prompts)), key=arrivals.__getitem__)
        num_arrived = num_ended = 0
        start = time.perf_counter()
        while num_ended < len(prompts):
            now = time.perf_counter() - start
            if now > self._timeout_s + arrivals[order[-1]]:
                raise TimeoutError(f"{num_ended} of {len(prompts)} answers after {now:.0f} s")
            while num_arrived < len(order) and arrivals[order[num_arrived]] <= now:
                place = order[num_arrived]
                request = self._manager.add_request(list(prompts[place]), max_new_tokens=num_tokens, streaming=stream)
                if request is None:
                    raise RuntimeError("its thread takes no more requests")
                places[request] = place
                num_arrived += 1
            waits = POLL_S if num_arrived == len(order) else min(POLL_S, max(0.0, arrivals[order[num_arrived]] - now))
            result = self._manager.get_result(timeout=max(waits, 1e-4))
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("its thread has ended")
                continue
            now, place = time.perf_counter() - start, places[result.request_id]
            if result.error is not None:
                raise RuntimeError(f"a request failed: {result.error}")
            if stream and math.isnan(found.first_s[place]) and result.generated_tokens:
                found.first_s[place] = now
            if result.is_finished():
                found.token_ids[place], found.end_s[place] = list(result.generated_tokens), now
                num_ended += 1
        found.seconds = time.perf_counter() - start
        return found

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10.0, hard_stop=True)
        self._manager.destroy()
        del self._manager, self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
