"""This module holds what a whole engine is asked to do beside others: answer prompts that are all there, or that arrive
one by one. It does not know which engines there are, nor what is made of their times.

A peer engine is a module with NAME and `start(workload, checkpoint) -> EngineRuns`; it raises ImportError where its
library is not here, and Unsuitable where it cannot run what is asked.
"""

from __future__ import annotations

import gc
import importlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from octavo.engine import LLM, SamplingParams

__all__ = ["ENGINES", "Answers", "EngineRuns", "OctavoRuns", "Workload", "start"]

ENGINES: Final = ("transformers_batching", "vllm_offline")
CHECKED: Final = 16
"""Prompts whose answers are held against our own logits, token by token."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What all engines get; greedy, and every answer as long as it is told to be."""

    model: str
    """A folder with a config.json, a bundled name, or a checkpoint."""
    settings: dict[str, Any]
    """How our engine is told to load it."""
    device: str
    dtype: str
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int = 2048
    timeout_s: float = 120.0
    """A peer that has not answered everything by then is not waited for any longer."""
    scratch: Path = field(default_factory=Path)
    """A folder for files that one engine has to write for another."""

    @property
    def kv_cache_tokens(self) -> int:
        """Room for every sequence at full length, in blocks of up to 256 tokens."""
        return self.max_num_seqs * (-(-self.max_model_len // 256) * 256)


@dataclass(slots=True)
class Answers:
    """What came of some prompts; seconds from the beginning."""

    token_ids: list[list[int]]
    first_s: list[float]
    """When each had its first token; nan where that was not looked at."""
    end_s: list[float]
    seconds: float = 0.0

    @classmethod
    def none(cls, num: int) -> Answers:
        """Return the answers to prompts of which none has been asked yet."""
        return cls([[] for _ in range(num)], [math.nan] * num, [math.nan] * num)


class EngineRuns(Protocol):
    """An engine that has started."""

    facts: dict[str, Any]
    """What a reader has to know of it: version, attention, settings that it chose."""

    def offline(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answers:
        """Answer prompts that are all there at once."""
        ...

    def online(self, prompts: Sequence[Sequence[int]], num_tokens: int, arrivals: Sequence[float]) -> Answers:
        """Answer prompts that arrive so many seconds after the beginning, and note every first token."""
        ...

    def close(self) -> None:
        """Let it go, and its memory."""
        ...


def start(name: str, workload: Workload, checkpoint: Any) -> EngineRuns:
    """Start a peer by its module's name."""
    runs: EngineRuns = importlib.import_module(f".{name}", __package__).start(workload, checkpoint)
    return runs


class OctavoRuns:
    """Our engine, with what it chooses by itself."""

    def __init__(self, workload: Workload, **settings: Any) -> None:
        room = {
            "max_num_seqs": workload.max_num_seqs,
            "max_model_len": workload.max_model_len,
            "max_num_batched_tokens": workload.max_num_batched_tokens,
            "kv_cache_tokens": workload.kv_cache_tokens,
            "generation_config": "none",
            "prefix_caching": False,  # as the others': every round asks the same
        }
        given = {"device": workload.device, "dtype": workload.dtype}
        self.llm = LLM(workload.model, **given, **(room | workload.settings | settings))
        resolved = self.llm.engine.resolved
        names = ("backend", "dtype", "block_size", "graphs", "overlap")
        self.facts = {name: getattr(resolved, name) for name in names if hasattr(resolved, name)}

    def offline(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Answers:
        return self._run(prompts, num_tokens, [0.0] * len(prompts), stream=False)

    def online(self, prompts: Sequence[Sequence[int]], num_tokens: int, arrivals: Sequence[float]) -> Answers:
        return self._run(prompts, num_tokens, arrivals, stream=True)

    def _run(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, arrivals: Sequence[float], *, stream: bool
    ) -> Answers:
        """Run requests as they arrive: a step is not interrupted by one."""
        llm, found = self.llm, Answers.none(len(prompts))
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        running: dict[str, int] = {}
        start = time.perf_counter()
        try:
            for place in self._served(arrivals, running, found, start, stream=stream):
                running[llm.add(list(prompts[place]), params, stream=stream)] = place
        finally:
            for request_id in running:
                llm.abort(request_id)
        found.seconds = time.perf_counter() - start
        return found

    def _served(
        self, arrivals: Sequence[float], running: dict[str, int], found: Answers, start: float, *, stream: bool
    ) -> Iterator[int]:
        """Run steps until every prompt is answered; yield each as it arrives, for the caller to add it to `running`."""
        llm, waiting = self.llm, deque(sorted(range(len(arrivals)), key=arrivals.__getitem__))
        while running or waiting:
            now = time.perf_counter() - start
            while waiting and arrivals[waiting[0]] <= now:
                yield waiting.popleft()
            if not running:
                time.sleep(arrivals[waiting[0]] - now)
                continue
            for output in llm.step():
                now, place = time.perf_counter() - start, running[output.request_id]
                if stream and math.isnan(found.first_s[place]):
                    found.first_s[place] = now
                if output.finished:
                    (answer,) = output.outputs
                    assert answer.error is None, f"our engine failed: {answer.error}"
                    found.token_ids[place], found.end_s[place] = list(answer.token_ids), now
                    del running[output.request_id]

    def behind(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return, for every token of some answers, how much less likely it was to us than the likeliest, in nats.

        Our engine reads prompt and answer as one prompt, so that each token is judged behind the very tokens that the
        other engine had before it: where that chose as we would, or nearly so, this is 0, or nearly.
        """
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=1, detokenize=False)
        whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        found = []
        for prompt, output in zip(prompts, self.llm.generate(whole, params), strict=True):
            assert output.prompt_logprobs is not None, f"no logprobs: {output.outputs[0].error}"
            entries = [entry for entry in output.prompt_logprobs[len(prompt) :] if entry is not None]
            found.append([entry.top_logprobs[0] - entry.logprob for entry in entries])
        return found

    def close(self) -> None:
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
