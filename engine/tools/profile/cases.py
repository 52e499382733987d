"""This module holds which calls of which ops are looked at for a model: its sizes, at a typical prefill and decode. It
does not know how they are timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from octavo.kernels.aot.calls import Settings
from octavo.kernels.aot.targets import Model
from octavo.kernels.spec import Case, load_specs

from ..bench.checking import KernelCase

__all__ = ["FULL", "SMALL", "Shapes", "op_cases"]

MAX_POSITION = 8192


@dataclass(frozen=True, slots=True)
class Shapes:
    """How large the batches are."""

    prompt: int
    """Tokens of a prompt."""
    chunk: int
    """Tokens of a chunk behind three times as many."""
    num_seqs: int
    """Sequences that decode together."""
    context: int
    """Tokens each of them has."""
    long_context: int
    """Tokens of one that decodes alone."""


FULL = Shapes(prompt=2048, chunk=2048, num_seqs=64, context=2048, long_context=32_768)
"""For a GPU."""
SMALL = Shapes(prompt=256, chunk=128, num_seqs=8, context=512, long_context=4096)
"""For a CPU, where FULL would take minutes."""


def op_cases(model: Model, settings: Settings, shapes: Shapes) -> list[KernelCase]:
    """Return the calls to look at, one after the other as a step makes them.

    Args:
        model: sizes and dtype.
        settings: block size, and how the cache stores keys and values.
        shapes: the batches.
    """
    specs = load_specs()
    return [
        KernelCase(specs[op], Case(name, {key: value for key, value in values.items() if value}, model.dtype, "bench"))
        for op, name, values in _cases(model, settings, shapes)
    ]


def _cases(model: Model, settings: Settings, shapes: Shapes) -> Iterator[tuple[str, str, dict[str, Any]]]:
    heads = {
        "num_kv_heads": model.num_kv_heads,
        "group_size": model.num_q_heads // model.num_kv_heads,
        "head_dim": model.head_dim,
        "block_size": settings.block_size,
        "cache": None if settings.cache == "auto" else settings.cache,
    }
    rows = (shapes.num_seqs, shapes.prompt)
    for num_tokens in rows:
        norm = {"num_tokens": num_tokens, "hidden_size": model.hidden_size, "residual": True}
        yield model.norm, f"{num_tokens} tokens", norm
    for num_tokens in rows:
        yield (
            "write_kv",
            f"{num_tokens} tokens",
            {
                **heads,
                "num_tokens": num_tokens,
                "num_blocks": -(-num_tokens // settings.block_size) * 2 + 1,
                "max_position": MAX_POSITION,
                "rotary_dim": (model.rotary_dim or model.head_dim) if model.rotary else 0,
                "rope_style": model.rope_style,
                "norm": model.head_norm,
            },
        )
    attention = {**heads, "window": model.window}
    chunk, past = shapes.chunk, 3 * shapes.chunk
    for op, name, seqs in (
        ("prefill", f"a prompt of {shapes.prompt}", [(shapes.prompt, shapes.prompt)]),
        ("prefill", f"a chunk of {chunk} behind {past}", [(chunk, chunk + past)]),
        ("decode", f"{shapes.num_seqs} × {shapes.context}", [(1, shapes.context)] * shapes.num_seqs),
        ("decode", f"1 × {shapes.long_context}", [(1, shapes.long_context)]),
    ):
        yield f"paged_attention_{op}", name, {**attention, "seqs": tuple(seqs)}
    for num_tokens in rows:
        inner = {"num_tokens": num_tokens, "intermediate_size": model.intermediate_size, "kind": model.activation}
        yield "gated_activation" if model.gated else "ungated_activation", f"{num_tokens} tokens", inner
    if settings.cache == "auto":
        copied = {**heads, "num_copies": shapes.num_seqs, "num_blocks": 4 * shapes.num_seqs}
        yield "copy_blocks", f"{shapes.num_seqs} blocks", copied
    logits = {"num_seqs": shapes.num_seqs, "vocab_size": model.vocab_size, "num_valid_ids": model.num_valid_ids}
    yield "sample", f"{shapes.num_seqs} greedy", logits
    chat = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    yield "sample", f"{shapes.num_seqs} with top_k and top_p", {**logits, **chat}
    del logits["num_valid_ids"]
    yield "log_softmax_top", f"{shapes.num_seqs} with top 20", {**logits, "num_top": 20}
