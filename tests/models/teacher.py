"""This module holds teacher forcing: logits at every position of given texts, through the cache, in chosen chunks. It
does not know a reference to compare with.

The decoder, the runner's input batch and its attention metadata are the engine's own; only the scheduler is replaced by
a list of chunk lengths, and the sampler by the tokens that are there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from octavo.engine.loader import resolve_model
from octavo.engine.models.decoder import Decoder
from octavo.engine.runner.attention_metadata import build_attention_metadata
from octavo.engine.runner.input_batch import InputBatch
from octavo.engine.runner.kv_cache import allocate_kv_cache
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler.batch import batch_order
from octavo.engine.step import NewSequence, SchedulerOutput

CPU = torch.device("cpu")


def load_decoder(model: Path | str, *, invariant: bool = False, **changes: Any) -> Decoder:
    """Load a model in float32, with fields of its `ModelConfig` changed: what a wrong reading of its config gives."""
    checkpoint = resolve_model(str(model))
    config = replace(checkpoint.model_config, **changes)
    return Decoder(
        config,
        checkpoint.load_weights,
        dtype=torch.float32,
        device=CPU,
        max_model_len=config.max_position,
        invariant=invariant,
    )


def whole(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the chunks of texts that run in one piece."""
    return [[len(text)] for text in texts]


def random_chunks(texts: Sequence[Sequence[int]], rng: random.Random, longest: int = 40) -> list[list[int]]:
    """Cut each text into random pieces."""
    chunks = []
    for text in texts:
        pieces: list[int] = []
        while (left := len(text) - sum(pieces)) > 0:
            pieces.append(min(left, rng.choice((1, 2, 15, 16, 17, rng.randint(1, longest)))))
        chunks.append(pieces)
    return chunks


@torch.inference_mode()
def teacher_forced_logits(
    decoder: Decoder,
    texts: Sequence[Sequence[int]],
    chunks: Sequence[Sequence[int]] | None = None,
    *,
    block_size: int = 16,
    rng: random.Random | None = None,
    invariant: bool = False,
) -> list[torch.Tensor]:
    """Run texts side by side, one chunk of each per step.

    Args:
        decoder: the model.
        texts: token ids.
        chunks: for each text the lengths of its pieces; None: in one piece.
        block_size: tokens per block.
        rng: shuffles the physical blocks; None: ascending.
        invariant: as the decoder was built.

    Returns:
        Per text, [num_tokens, vocab_size] float32.
    """
    chunks = whole(texts) if chunks is None else chunks
    assert [sum(pieces) for pieces in chunks] == [len(text) for text in texts], "chunks must cover the texts"
    lengths = [-(-len(text) // block_size) for text in texts]
    blocks = list(range(1, sum(lengths) + 1))
    if rng is not None:
        rng.shuffle(blocks)
    cache = allocate_kv_cache(
        decoder.config, num_blocks=len(blocks), block_size=block_size, dtype=torch.float32, device=CPU
    )
    for layer in cache:
        # Whatever is read without having been written shows.
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    batch = InputBatch(len(texts), max(map(len, texts)), block_size)
    done = np.zeros(len(texts), dtype=np.int32)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for turn in range(max(map(len, chunks))):
        counts = np.array([pieces[turn] if turn < len(pieces) else 0 for pieces in chunks], dtype=np.int32)
        new = [blocks[sum(lengths[:row]) : sum(lengths[: row + 1])] for row in range(len(texts))] if turn == 0 else []
        step = _step(turn, texts, done, counts, new)
        batch.apply(step)
        inputs = batch.gather(step)
        metadata = build_attention_metadata(
            step,
            inputs,
            decoder.config,
            block_size=block_size,
            invariant=invariant,
        )
        hidden, _ = decoder.forward(inputs.token_ids, metadata, cache)
        for row, part in zip(step.rows, hidden.split(step.num_scheduled_tokens.tolist()), strict=True):
            found[row].append(decoder.logits(part))
        done += counts
    return [torch.cat(parts) for parts in found]


def _step(
    turn: int,
    texts: Sequence[Sequence[int]],
    done: np.ndarray,
    counts: np.ndarray,
    new_blocks: list[list[int]],
) -> SchedulerOutput:
    order, num_decodes = batch_order(counts)
    running = counts[order]
    none = np.empty(0, dtype=np.int32)
    new = tuple(
        NewSequence(row, np.array(text, dtype=np.int32), len(text), SamplingParams(), 0, 0, frozenset())
        for row, text in enumerate(texts if turn == 0 else ())
    )
    table = [(row, column, block) for row, ids in enumerate(new_blocks) for column, block in enumerate(ids)]
    rows, columns, ids = np.array(table, dtype=np.int32).T if table else (none, none, none)
    return SchedulerOutput(
        step=turn,
        removed_rows=none,
        new_sequences=new,
        rows=order.astype(np.int32),
        num_computed_tokens=done[order],
        num_scheduled_tokens=running,
        num_tokens=int(running.sum()),
        num_decodes=num_decodes,
        num_decode_tokens=int(running[:num_decodes].sum()),
        sampled=none,
        block_rows=rows,
        block_columns=columns,
        block_ids=ids,
    )
