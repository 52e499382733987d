"""This module runs texts through the engine's own scheduler and runner, each token forced. It does not know what is
right.

Nothing of a step is imitated: the scheduler decides it, the runner gathers it, the decoder runs it. Only the sampler is
replaced, by one that says what the text says, and a tap stands before the decoder to keep what passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from ...core import EngineCore
from ...layers.attention import AttentionMetadata
from ...models.decoder import Decoder, LayerCache
from ...runner.kv_cache import allocate_kv_cache, allocate_like
from ...runner.model_runner import ModelRunner
from ...runner.sampler import Draw, SampledTokens, Sampler
from ...sampling_params import SamplingParams
from ...scheduler import Scheduler
from ...step import SchedulerOutput
from .conditions import Condition
from .texts import Text

__all__ = ["ForcedRun", "Step", "state_names"]

IntArray = npt.NDArray[np.integer[Any]]


def state_names(num_layers: int) -> list[str]:
    """Return what the hidden states of a `Step` are, in their order."""
    return ["embedding", *(f"layer {layer}" for layer in range(num_layers)), "final norm"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step as it was run: T tokens."""

    work: SchedulerOutput
    token_ids: torch.Tensor
    """[T] int64 as the decoder got them."""
    metadata: AttentionMetadata
    """As the decoder got it."""
    texts: IntArray
    """[T] index of each token's text."""
    positions: IntArray
    """[T] where it stands in its text, by the scheduler's account."""
    states: list[torch.Tensor]
    """[T, H] each: see `state_names`."""
    logits: torch.Tensor | None
    """[num_sampled, vocab_size] as the sampler got them."""

    @property
    def sampled_rows(self) -> IntArray:
        """[num_sampled] the token rows that `logits` belong to."""
        return (np.cumsum(self.work.num_scheduled_tokens) - 1)[self.work.sampled]


class _Tap:
    """Stands in for a decoder and keeps what goes in and out of it."""

    def __init__(self, decoder: Decoder) -> None:
        self.config, self.dtype, self.device = decoder.config, decoder.dtype, decoder.device
        self._decoder = decoder
        self.seen: tuple[torch.Tensor, AttentionMetadata, list[torch.Tensor]] | None = None

    def forward(
        self, token_ids: torch.Tensor, metadata: AttentionMetadata, cache: Sequence[LayerCache], capture: Sequence[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        num_layers = self.config.num_layers
        hidden, states = self._decoder.forward(
            token_ids, metadata, cache, [*range(num_layers), num_layers + 1, num_layers]
        )
        self.seen = token_ids, metadata, states
        return hidden, []

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._decoder.logits(hidden_states)


class _ForcedSampler(Sampler):
    """Samples what stands in the texts; a sequence's seed says which text is its own."""

    def __init__(self, texts: Sequence[Text], max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        super().__init__(max_num_seqs, vocab_size, device=device)
        self._texts = texts
        self.text_of: dict[int, int] = {}
        """Row -> text."""
        self.logits: torch.Tensor | None = None

    def add(self, row: int, params: SamplingParams, *, seed: int, **_others: Any) -> None:
        self.text_of[row] = seed

    def launch(self, logits: torch.Tensor, rows: IntArray, positions: IntArray) -> Draw:
        self.logits = logits
        texts = [self._texts[self.text_of[row]].token_ids for row in rows.tolist()]
        # What comes after a text's end is sampled by nobody and run by nobody.
        token_ids = [(*ids, 0)[at] for ids, at in zip(texts, positions.tolist(), strict=True)]
        return cast(Draw, _ForcedDraw(torch.tensor(token_ids, dtype=torch.int32), logits.device))


class _ForcedDraw:
    def __init__(self, token_ids: torch.Tensor, device: torch.device) -> None:
        self._known = token_ids
        self.token_ids = token_ids.to(device)

    def wait(self) -> SampledTokens:
        return SampledTokens(self._known.numpy(), None, {}, None, {})


class ForcedRun:
    """One pass of all texts under one condition.

    Args:
        decoder: the model.
        texts: what to feed.
        condition: how to cut it up.
        max_model_len: longest sequence, in tokens.
        invariant: as the decoder was built.
        like: a cache that stores keys and values as they are to be stored; None: in the decoder's dtype.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[Text],
        condition: Condition,
        *,
        max_model_len: int,
        invariant: bool,
        like: Sequence[LayerCache] | None = None,
    ) -> None:
        self.condition = condition
        config, num_blocks, block_size = decoder.config, condition.num_blocks, condition.block_size
        if like is not None:
            self.cache = allocate_like(like, config, num_blocks=num_blocks, block_size=block_size)
        else:
            self.cache = allocate_kv_cache(
                config, num_blocks=num_blocks, block_size=block_size, dtype=decoder.dtype, device=decoder.device
            )
        self.scheduler = Scheduler(condition.limits(decoder.config.vocab_size, max_model_len), time.monotonic)
        self._texts = texts
        self._tap = _Tap(decoder)
        self._sampler = _ForcedSampler(texts, condition.max_num_seqs, decoder.config.vocab_size, decoder.device)
        self._runner = ModelRunner(
            cast(Decoder, self._tap),
            self.cache,
            self._sampler,
            max_num_seqs=condition.max_num_seqs,
            max_model_len=max_model_len,
            block_size=condition.block_size,
            invariant=invariant,
        )

    def steps(self, on_scheduled: Callable[[SchedulerOutput], object] = lambda _work: None) -> Iterator[Step]:
        """Run all texts and yield each step once it has been run.

        Args:
            on_scheduled: called with each step before it is run.
        """
        for number in range(self.condition.rounds):
            self._add_texts(number)
            while self.scheduler.has_unfinished:
                work = self.scheduler.schedule()
                assert work is not None, "there are unfinished texts and nothing can run"
                on_scheduled(work)
                output = self._runner.execute(work).wait()
                yield self._step(work)
                self.scheduler.update(work, output)

    def _add_texts(self, number: int) -> None:
        core = EngineCore(self.scheduler, self._runner)
        for index, text in enumerate(self._texts):
            num_prompt = max(1, len(text.token_ids) - self.condition.num_forced)
            num_sampled = len(text.token_ids) - num_prompt + 1
            params = SamplingParams(temperature=0.0, seed=index, max_tokens=num_sampled, ignore_eos=True)
            core.add_request(f"{number}/{index}", text.token_ids[:num_prompt], params)

    def _step(self, work: SchedulerOutput) -> Step:
        assert self._tap.seen is not None, "the runner has not run the decoder"
        token_ids, metadata, states = self._tap.seen
        counts = work.num_scheduled_tokens
        texts = np.repeat([self._sampler.text_of[row] for row in work.rows.tolist()], counts)
        starts = np.cumsum(counts) - counts
        positions = np.arange(work.num_tokens) + np.repeat(work.num_computed_tokens - starts, counts)
        logits, self._sampler.logits = self._sampler.logits, None
        return Step(work, token_ids, metadata, texts, positions, states, logits if len(work.sampled) else None)
