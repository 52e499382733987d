"""This module holds the calls of ops that an engine makes, shaped as it makes them. It does not know any kernel.

The tensors are on the "meta" device: they have a shape and an address (a multiple of 16, as an allocator's are, plus a
view's offset) and hold nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import (
    copy_blocks,
    expand_rows,
    gated_activation,
    layer_norm,
    log_softmax_top,
    paged_attention_decode,
    paged_attention_prefill,
    plan_paged_attention,
    plan_write_kv,
    rms_norm,
    sample,
    ungated_activation,
    write_kv,
)
from ..attention import SPLIT_TOKENS, SharedPrefixes
from ..batch import ExpandedRows
from ..common.checks import check_choice
from ..dispatch import OPS
from ..sampling import AllowedTokens, BannedTokens, LogitBias, Penalties, SampleOutput, SampleParams
from .targets import Model

__all__ = ["Call", "Settings", "engine_calls", "missing_ops"]

MAX_DECODE_QUERY_LEN = 16
"""Rows of one sequence that the decode op takes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine's configuration adds to its model's sizes."""

    block_size: int = 64
    cache: Literal["auto", "int8", "e4m3"] = "auto"
    invariant: bool = False
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    max_model_len: int = 32_768
    num_blocks: int = 16_384

    def __post_init__(self) -> None:
        """Refuse what no engine is set to; raises ValueError."""
        check_choice("cache_dtype", self.cache, ("auto", "int8", "e4m3"))
        for name in ("block_size", "max_num_batched_tokens", "max_num_seqs", "max_model_len", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an op: `label` says what is special about it."""

    op: str
    label: str
    run: Callable[[], object]


def missing_ops() -> list[str]:
    """Return the ops that have no kernel."""
    return [op for op, modules in OPS.items() if "triton" not in modules]


def sizes(limit: int) -> list[int]:
    """Return sizes in which a launcher or Triton may see a difference: small ones, powers of two and what is beside."""
    around = {(1 << k) + beside for k in range(24) for beside in (-1, 0, 1)}
    return sorted(n for n in around | set(range(1, 18)) | {limit} if 1 <= n <= limit)


def _few(limit: int) -> list[int]:
    return sorted({1, min(2, limit), limit})


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return a tensor that holds nothing."""
    return torch.empty(shape, dtype=dtype, device="meta")


def engine_calls(model: Model, settings: Sequence[Settings]) -> Iterator[Call]:
    """Yield every kind of call that engines of these settings make, at every size that may make a difference.

    Ops without a kernel are left out.
    """
    limits = dict.fromkeys((one.max_num_batched_tokens, one.max_num_seqs) for one in settings)
    for call in itertools.chain(
        *(_model_calls(model, *limit) for limit in limits), *(_cache_calls(model, one) for one in settings)
    ):
        if "triton" in OPS[call.op]:
            yield call


def norm_call(model: Model, num_tokens: int, *, residual: bool) -> Call:
    """Return the norm of a layer, after an addition or not."""
    dtype = getattr(torch, model.dtype)
    x, weight = empty(num_tokens, model.hidden_size, dtype=dtype), empty(model.hidden_size, dtype=dtype)
    other = empty(num_tokens, model.hidden_size, dtype=dtype) if residual else None
    label = "add and norm" if residual else "norm"
    if model.norm == "rms_norm":
        return Call("rms_norm", label, lambda: rms_norm(x, weight, eps=1e-5, residual=other))
    return Call("layer_norm", label, lambda: layer_norm(x, weight, weight, eps=1e-5, residual=other))


def activation_call(model: Model, num_tokens: int) -> Call:
    """Return the activation of an MLP."""
    dtype = getattr(torch, model.dtype)
    x = empty(num_tokens, model.intermediate_size * (2 if model.gated else 1), dtype=dtype)
    if model.gated:
        return Call("gated_activation", model.activation, lambda: gated_activation(x, model.activation))
    return Call("ungated_activation", model.activation, lambda: ungated_activation(x, model.activation))


def heads(model: Model, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as views of the fused projection's result."""
    counts = (model.num_q_heads, model.num_kv_heads, model.num_kv_heads)
    fused = empty(num_tokens, sum(counts) * model.head_dim, dtype=getattr(torch, model.dtype))
    q, k, v = fused.view(num_tokens, -1, model.head_dim).split(counts, dim=1)
    return q, k, v


def caches(model: Model, settings: Settings) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return k_cache, v_cache and the scale arguments of one layer."""
    shape = (settings.num_blocks, model.num_kv_heads, settings.block_size, model.head_dim)
    stored = {"auto": getattr(torch, model.dtype), "int8": torch.int8, "e4m3": torch.float8_e4m3fn}
    k_cache, v_cache = (empty(*shape, dtype=stored[settings.cache]) for _ in range(2))
    if settings.cache == "auto":
        return k_cache, v_cache, {}
    per_slot = settings.cache == "int8"
    return (
        k_cache,
        v_cache,
        {name: empty(*shape[:3], dtype=torch.float32) if per_slot else 0.05 for name in ("k_scale", "v_scale")},
    )


def write_call(model: Model, settings: Settings, num_tokens: int) -> Call:
    """Return the rotation and the cache write of a layer."""

    def run() -> None:
        q, k, v = heads(model, num_tokens)
        k_cache, v_cache, scales = caches(model, settings)
        slots, positions = (empty(num_tokens, dtype=torch.int64) for _ in range(2))
        rotary_dim = model.rotary_dim or model.head_dim
        table = empty(settings.max_model_len, rotary_dim, dtype=torch.float32) if model.rotary else None
        weight = empty(model.head_dim, dtype=q.dtype) if model.head_norm else None
        plan = plan_write_kv(
            slots, positions=positions, cos_sin=table, rope_style=model.rope_style, block_size=settings.block_size,
            num_kv_heads=model.num_kv_heads, dtype=q.dtype,
        )  # fmt: skip
        write_kv(
            q, k, v, k_cache, v_cache, slots, positions=positions, cos_sin=table, rope_style=model.rope_style,
            q_norm=weight, k_norm=weight, plan=plan, **scales,
        )  # fmt: skip

    return Call("write_kv", _cache_label(settings), run)


def copy_call(model: Model, settings: Settings, num_copies: int) -> Call:
    """Return a copy of blocks."""
    k_cache, v_cache, _ = caches(model, settings)
    ids = [empty(num_copies, dtype=torch.int64) for _ in range(2)]
    return Call("copy_blocks", _cache_label(settings), lambda: copy_blocks(k_cache, v_cache, *ids))


def expand_call(
    settings: Settings, *, num_seqs: int, num_tokens: int, num_columns: int, width: int, start: int = 0
) -> Call:
    """Return the expansion of a step's rows; all tensors lie `start` elements behind the beginning of others."""

    def run() -> None:
        def part(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return empty(start + math.prod(shape), dtype=dtype)[start:].view(shape)

        ids, positions, slots = (part(num_tokens, dtype=torch.int64) for _ in range(3))
        expand_rows(
            part(num_seqs), part(num_seqs), part(num_seqs + 1), part(num_tokens), part(settings.max_num_seqs),
            part(settings.max_num_seqs, width), block_size=settings.block_size, num_columns=num_columns,
            out=ExpandedRows(ids, positions, slots, part(num_seqs), part(num_seqs, num_columns)),
        )  # fmt: skip

    return Call("expand_rows", f"block {settings.block_size}", run)


def attention_call(
    model: Model,
    settings: Settings,
    op: Literal["prefill", "decode"],
    *,
    num_seqs: int,
    num_tokens: int,
    max_query_len: int,
    max_blocks_per_seq: int,
    start: int = 0,
    label: str = "",
    shared: bool = False,
) -> Call:
    """Return the attention of a layer, its rows behind `start` others of the step; all or none share a split."""

    def run() -> None:
        q, _, _ = heads(model, start + num_tokens)
        out = empty(start + num_tokens, model.num_q_heads, model.head_dim, dtype=q.dtype)
        k_cache, v_cache, scales = caches(model, settings)
        cu_seqlens_q, seq_lens, block_table = empty(num_seqs + 1), empty(num_seqs), empty(num_seqs, max_blocks_per_seq)
        plan = plan_paged_attention(
            cu_seqlens_q, seq_lens, block_table, op=op, num_tokens=num_tokens, max_query_len=max_query_len,
            num_q_heads=model.num_q_heads, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim,
            block_size=settings.block_size,
            max_splits=num_seqs * -(-max_blocks_per_seq * settings.block_size // SPLIT_TOKENS),
            invariant=settings.invariant,
            shared=SharedPrefixes(torch.zeros(num_seqs).int(), torch.ones(num_seqs).int()) if shared else None,
        )  # fmt: skip
        arguments: dict[str, Any] = dict(
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            block_table=block_table,
            scale=model.head_dim**-0.5,
            window=model.window,
            out=out[start:],
            **scales,
        )
        if op == "prefill":
            paged_attention_prefill(q[start:], k_cache, v_cache, worklist=plan, **arguments)
        else:
            paged_attention_decode(q[start:], k_cache, v_cache, plan=plan, **arguments)

    return Call(f"paged_attention_{op}", label or _cache_label(settings), run)


def _cache_label(settings: Settings) -> str:
    cache = "" if settings.cache == "auto" else f" {settings.cache}"
    return f"block {settings.block_size}{cache}{' invariant' if settings.invariant else ''}"


def _model_calls(model: Model, max_num_batched_tokens: int, max_num_seqs: int) -> Iterator[Call]:
    """Yield what does not depend on the cache."""
    for num_tokens in sizes(max_num_batched_tokens):
        yield norm_call(model, num_tokens, residual=False)
        yield norm_call(model, num_tokens, residual=True)
        yield activation_call(model, num_tokens)
    yield from _sampling_calls(model, max_num_seqs)


def _cache_calls(model: Model, settings: Settings) -> Iterator[Call]:
    width = _widths(settings)[-1]
    yield expand_call(settings, num_seqs=1, num_tokens=1, num_columns=width, width=width)
    for num_tokens in sizes(settings.max_num_batched_tokens):
        yield write_call(model, settings, num_tokens)
        yield copy_call(model, settings, num_tokens)
    yield from _prefill_calls(model, settings)
    yield from _decode_calls(model, settings)


def _widths(settings: Settings) -> list[int]:
    most = -(-settings.max_model_len // settings.block_size)
    return sorted({1, 2, 7, 16, most // 2 + 1, most})


def _prefill_calls(model: Model, settings: Settings) -> Iterator[Call]:
    # Triton looks at every argument by itself, so sizes of different arguments need not meet in every combination.
    places = itertools.cycle(itertools.product(_widths(settings), (0, 1, 16)))
    for num_tokens in sizes(settings.max_num_batched_tokens):
        for num_seqs in sorted({1, min(2, num_tokens), min(num_tokens, settings.max_num_seqs)}):
            width, start = next(places)
            yield attention_call(
                model, settings, "prefill", num_seqs=num_seqs, num_tokens=num_tokens, start=start,
                max_query_len=num_tokens - num_seqs + 1, max_blocks_per_seq=width,
            )  # fmt: skip


def _decode_calls(model: Model, settings: Settings) -> Iterator[Call]:
    for max_query_len in range(1, MAX_DECODE_QUERY_LEN + 1):
        label = _cache_label(settings) + (f" verify {max_query_len}" if max_query_len > 1 else "")
        few = max_query_len > 1  # what the number of sequences makes different, it does at one row each
        for num_seqs in _few(settings.max_num_seqs) if few else sizes(settings.max_num_seqs):
            for width in (1, 2, _widths(settings)[-1]):
                yield attention_call(
                    model, settings, "decode", num_seqs=num_seqs, num_tokens=num_seqs * max_query_len,
                    max_query_len=max_query_len, max_blocks_per_seq=width, label=label,
                )  # fmt: skip
        if settings.max_num_seqs > 1 and settings.max_model_len > SPLIT_TOKENS and not settings.invariant:
            yield attention_call(
                model, settings, "decode", num_seqs=2, num_tokens=2 * max_query_len, max_query_len=max_query_len,
                max_blocks_per_seq=_widths(settings)[-1], label=f"{label} shared", shared=True,
            )  # fmt: skip


def sample_call(model: Model, num_seqs: int, features: frozenset[str], start: int = 0) -> Call:
    """Return the sampling of a step whose rows ask for these features together, and lie behind `start` others."""

    def each(dtype: torch.dtype) -> Tensor:
        return empty(start + num_seqs, dtype=dtype)[start:]

    def rows(dtype: torch.dtype, *names: str) -> Tensor | None:
        return each(dtype) if features & set(names) else None

    index, number, seen = each(torch.int64), each(torch.float32), empty(num_seqs, 256)
    drawn = ("temperature", "top_k", "top_p", "min_p")
    params = SampleParams(
        num_valid_ids=model.num_valid_ids,
        temperature=rows(torch.float32, *drawn),
        top_k=rows(torch.int32, "top_k"),
        top_p=rows(torch.float64, "top_p"),
        min_p=rows(torch.float64, "min_p"),
        seed=rows(torch.int64, *drawn),
        choice=rows(torch.int32, *drawn),
        position=rows(torch.int64, *drawn),
        allowed=AllowedTokens(index, empty(num_seqs, -(-model.vocab_size // 32))) if "allowed" in features else None,
        banned=BannedTokens(index, index) if "banned" in features else None,
        bias=LogitBias(index, index, number) if "bias" in features else None,
        penalties=Penalties(index, number, number, number, index, seen, seen, empty(num_seqs))
        if "penalties" in features
        else None,
    )
    logits = empty(num_seqs, model.vocab_size, dtype=getattr(torch, model.dtype))
    label = ", ".join(sorted(features)) or "greedy"
    out = SampleOutput(each(torch.int64), each(torch.bool))
    return Call("sample", label, lambda: sample(logits, params, out=out))


def logprobs_call(model: Model, num_rows: int, num_top: int, start: int = 0) -> Call:
    """Return the log-probabilities of some rows, behind `start` others, over the ids that a tokenizer has."""
    logits = empty(num_rows, model.vocab_size, dtype=getattr(torch, model.dtype))[:, : model.num_valid_ids]
    chosen = empty(start + num_rows, dtype=torch.int64)[start:]
    return Call("log_softmax_top", f"top {num_top}", lambda: log_softmax_top(logits, num_top, chosen))


FILTERS = ("top_k", "top_p", "min_p")
ENTRIES = ("allowed", "banned", "bias", "penalties")


def _subsets(names: tuple[str, ...]) -> Iterator[frozenset[str]]:
    for size in range(len(names) + 1):
        yield from (frozenset(chosen) for chosen in itertools.combinations(names, size))


def _sampling_calls(model: Model, max_num_seqs: int) -> Iterator[Call]:
    drawn = [frozenset[str]()] + [filters | {"temperature"} for filters in _subsets(FILTERS)]
    for features in (base | entries for entries in _subsets(ENTRIES) for base in drawn):
        for num_seqs in _few(max_num_seqs)[:2]:
            yield sample_call(model, num_seqs, features)
    for num_seqs in sizes(max_num_seqs):
        yield sample_call(model, num_seqs, drawn[-1])
        for num_top in (0, 1, 5, 20):
            yield logprobs_call(model, num_seqs, num_top)
