"""This module holds vLLM as an engine beside ours, where it is installed. It does not know what is compared.

It reads weights from files alone, so ours are written once, under transformers' names.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import time
from collections.abc import Sequence
from typing import Any, Final

import torch

from .engine_runs import Answers, Workload
from .layouts import Unsuitable
from .transformers_weights import build

__all__ = ["NAME", "VllmRuns", "start"]

NAME: Final = "vLLM"
MEMORY: Final = 0.45
"""Of the GPU's memory: ours is on it, too."""


def start(workload: Workload, checkpoint: Any) -> VllmRuns:
    """Start it on our weights."""
    import vllm

    if workload.device == "cpu":
        raise Unsuitable("it is compared on a GPU alone")
    folder = workload.scratch / "vllm"
    if not (folder / "config.json").exists():
        # On the same kind of device, as random weights depend on it.
        build(checkpoint, getattr(torch, workload.dtype), workload.device).save_pretrained(folder)
        gc.collect()
        torch.cuda.empty_cache()
    return VllmRuns(vllm, str(folder), workload)


class VllmRuns:
    """Its engine in this process, step by step."""

    def __init__(self, vllm: Any, folder: str, workload: Workload) -> None:
        self._vllm = vllm
        self._llm = vllm.LLM(
            folder,
            dtype=workload.dtype,
            skip_tokenizer_init=True,
            max_model_len=workload.max_model_len,
            max_num_seqs=workload.max_num_seqs,
            max_num_batched_tokens=workload.max_num_batched_tokens,
            gpu_memory_utilization=MEMORY,
            enable_prefix_caching=False,
        )
        self._num_requests = 0
        self.facts = {"version": importlib.metadata.version("vllm")}

    def offline(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answers:
        return self.online(prompts, num_tokens, [0.0] * len(prompts))

    def online(self, prompts: Sequence[Sequence[int]], num_tokens: int, arrivals: Sequence[float]) -> Answers:
        engine, found = self._llm.llm_engine, Answers.none(len(prompts))
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        order, places = sorted(range(len(prompts)), key=arrivals.__getitem__), dict[str, int]()
        num_arrived, num_ended, start = 0, 0, time.perf_counter()
        while num_ended < len(prompts):
            now = time.perf_counter() - start
            while num_arrived < len(order) and arrivals[order[num_arrived]] <= now:
                place = order[num_arrived]
                request = str(self._num_requests)
                engine.add_request(request, {"prompt_token_ids": list(prompts[place])}, params)
                places[request] = place
                self._num_requests, num_arrived = self._num_requests + 1, num_arrived + 1
            if num_arrived == num_ended:
                time.sleep(arrivals[order[num_arrived]] - now)
                continue
            for output in engine.step():
                now, place = time.perf_counter() - start, places[output.request_id]
                if math.isnan(found.first_s[place]) and output.outputs[0].token_ids:
                    found.first_s[place] = now
                if output.finished:
                    found.token_ids[place], found.end_s[place] = list(output.outputs[0].token_ids), now
                    num_ended += 1
        found.seconds = time.perf_counter() - start
        return found

    def close(self) -> None:
        del self._llm
        gc.collect()
        torch.cuda.empty_cache()
