"""This module holds decode steps as captured graphs, one for each of a few batch sizes. It does not know the scheduler.

A graph is launched at once, with nothing left of the Python that launched its hundreds of kernels one by one; but what
it does is fixed: shapes, addresses, and every number that Python has had a say in. So everything that differs from step
to step is read from tensors that stay where they are: `DecodeStep` sees nothing else. A step is padded to the next
batch size with rows of -1, which write nothing, see one null slot, and whose results nobody reads. Attention's plan is
made inside, on the device. The head is outside: only rows that sample pay for it, and no logits are kept by size.

Sequences that begin with the same blocks read them one by one here: which ones do differs from step to step.

On a CPU a stand-in repeats what was captured, so that buckets, padding and whatever must not be captured are the same.
The few lines that capture on a GPU have not run on one yet.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from octavo.kernels import expand_rows
from octavo.kernels.attention import SPLIT_TOKENS, plan_paged_attention
from torch import Tensor

from ..layers.attention import AttentionMetadata, AttentionSlice
from ..models.decoder import Decoder, LayerCache
from ..step import SchedulerOutput
from .input_batch import InputBatch, Uploaded

__all__ = ["CAPTURED", "DecodeGraphs", "DecodeStep", "bucket_sizes"]

CAPTURED: Final = "captured"
NEW_BLOCKS: Final = 4096
"""Blocks that may join tables in one captured step: more do only where many long prefixes are found at once."""

_log = logging.getLogger("octavo.engine")

Run = Callable[[], Tensor]


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to capture, ascending: 1, 2, 4, 8, and from 16 on two for each doubling."""
    sizes = {1, 2, 4, 8, *(size << k for size in (16, 24) for k in range(13))}
    return [*sorted(size for size in sizes if size < max_num_seqs), max_num_seqs]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """All that a captured step is made of: tensors that stay where they are, and numbers that never change."""

    model: Decoder
    cache: Sequence[LayerCache]
    last_token_ids: Tensor
    block_tables: Tensor
    max_kv_splits: int
    """Splits of `SPLIT_TOKENS` that sequences have together, but for one each."""
    invariant: bool

    def __call__(self, rows: Tensor, num_computed_tokens: Tensor, cu_seqlens_q: Tensor, token_ids: Tensor) -> Tensor:
        """Return the hidden states [bucket, H] of one token for each row; the arguments are those of `expand_rows`."""
        bucket, config, block_size = len(rows), self.model.config, self.cache[0].k.shape[2]
        batch = expand_rows(
            rows, num_computed_tokens, cu_seqlens_q, token_ids, self.last_token_ids, self.block_tables,
            block_size=block_size, num_columns=self.block_tables.shape[1],
        )  # fmt: skip
        plan = plan_paged_attention(
            cu_seqlens_q, batch.seq_lens, batch.block_table, op="decode", num_tokens=bucket, max_query_len=1,
            num_q_heads=config.num_q_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            block_size=block_size, max_splits=bucket + self.max_kv_splits, invariant=self.invariant,
        )  # fmt: skip
        decode = AttentionSlice(cu_seqlens_q, batch.seq_lens, batch.block_table, plan)
        metadata = AttentionMetadata(batch.positions, batch.slot_mapping, bucket, decode, prefill=None)
        return self.model.forward(batch.token_ids, metadata, self.cache)[0]


class DecodeGraphs:
    """Decode steps by bucket, captured when they are first wanted or all at once.

    Args:
        model, cache: what runs.
        batch: whose tables are read.
        max_num_seqs: the largest bucket.
        invariant: see `plan_paged_attention`.
    """

    def __init__(
        self, model: Decoder, cache: Sequence[LayerCache], batch: InputBatch, *, max_num_seqs: int, invariant: bool
    ) -> None:
        num_slots = (cache[0].k.shape[0] - 1) * batch.block_size
        self._step = DecodeStep(
            model, cache, batch.last_token_ids, batch.block_tables, num_slots // SPLIT_TOKENS, invariant
        )
        self._batch = batch
        self._device = model.device
        self._buckets = bucket_sizes(max_num_seqs)
        room = batch.room(max_num_seqs, NEW_BLOCKS)
        self._inputs = torch.zeros(room, dtype=torch.int32, device=self._device)
        self._capture = _CudaCapture() if self._device.type == "cuda" else _Repeated
        self._replays: dict[int, Run] = {}
        self.counts: Counter[str] = Counter()
        """Steps so far: `CAPTURED`, or by why they were not."""

    def bucket(self, step: SchedulerOutput, *, wants_states: bool) -> int | None:
        """Return the size to pad a step to; None: it cannot be a captured one, which is logged once for each reason.

        Args:
            wants_states: more is asked for than what the sampled tokens come from.
        """
        num_seqs = len(step.rows)
        if step.num_tokens > num_seqs:
            reason = "rows with more than one token"
        elif wants_states:
            reason = "hidden states or logprobs of a prompt"
        elif len(step.block_ids) > NEW_BLOCKS:
            reason = f"more than {NEW_BLOCKS:,} new blocks"
        elif int((step.num_computed_tokens // SPLIT_TOKENS).sum()) > self._step.max_kv_splits:
            reason = "shared blocks: more keys than the pool has slots"
        else:
            self.counts[CAPTURED] += 1
            return self._buckets[int(np.searchsorted(self._buckets, num_seqs))]
        if not self.counts[reason]:
            _log.info("step %d is run op by op, not as a captured graph: %s; not told again", step.step, reason)
        self.counts[reason] += 1
        return None

    def run(self, step: SchedulerOutput, bucket: int) -> tuple[Tensor, Uploaded]:
        """Run a step; return its hidden states, to be read before the next is run, and what was uploaded of it.

        Returns:
            [num_seqs, H], and the step, padded.
        """
        replay = self._replays.get(bucket) or self._captured(bucket)
        uploaded = self._batch.upload(step, bucket, self._inputs)
        return replay()[: len(step.rows)], uploaded

    def capture_all(self, on_progress: Callable[[int, int], object] = lambda _done, _total: None) -> str:
        """Capture every bucket, the largest first, whose memory the others then use; return what that took, in words.

        Args:
            on_progress: called with (buckets captured, buckets in all).
        """
        start, free_bytes = time.monotonic(), _free_bytes(self._device)
        for done, bucket in enumerate(reversed(self._buckets), start=1):
            self._captured(bucket)
            on_progress(done, len(self._buckets))
        taken, seconds = (free_bytes - _free_bytes(self._device)) / 2**20, time.monotonic() - start
        return f"{len(self._buckets)} batch sizes up to {self._buckets[-1]}, {taken:,.0f} MiB, {seconds:.1f} s"

    @torch.inference_mode()
    def _captured(self, bucket: int) -> Run:
        """Capture a bucket over nothing but padding: a number of the step that wants it could only be wrong."""
        zeros, cu_seqlens_q = np.zeros(bucket, dtype=np.int32), np.arange(bucket + 1, dtype=np.int32)
        inputs = self._batch.staging.upload(zeros - 1, zeros, cu_seqlens_q, zeros, out=self._inputs)
        self._replays[bucket] = replay = self._capture(lambda: self._step(*inputs))
        return replay


class _Repeated:
    """Stands in for a captured graph on a CPU: the same call again, into the same memory."""

    def __init__(self, run: Run) -> None:
        self._run, self._out = run, run()

    def __call__(self) -> Tensor:
        return self._out.copy_(self._run())


class _CudaCapture:
    """Captures graphs that share their memory, which is sound as no two of them run at the same time."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # what libraries set up at their first call is not captured
        torch.cuda.current_stream().wait_stream(self._stream)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Another thread's CUDA calls, a front's say, are none of this capture's business.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = run()
        finally:
            torch.cuda.set_stream(stream)  # a capture that cannot be ended leaves its own in force

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
