# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds `log_softmax_top` as Triton kernels. It does not know what is done with log-probabilities.

A chunk's mass is counted in units of 2⁻⁵⁰ of its own largest term, in integers, whose sum has no order; chunks lie at
fixed places and are added in float64. So a row has the same bits in every batch, and a long tail loses nothing: what
one token may lose is 2⁻⁵⁰ of its chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_shape
from ..common.launch import next_power_of_2
from .params import LogprobOutput
from .rank_triton import (
    LOG2E,
    LOWEST,
    best_rank,
    check_logits,
    config,
    is_bad,
    kth_rank,
    load_logits,
    rank,
    ranked_value,
)

__all__ = ["log_softmax_top"]


@triton.jit(do_not_specialize_on_alignment=["p_token_ids"])
def _sum_kernel(
    p_logits,
    p_token_ids,
    p_best,
    p_mass,
    p_counts,
    STRIDE: tl.constexpr,
    NUM_IDS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """best = max x as a rank, mass = Σ exp(x - max x) · 2⁵⁰, count = how many x ≥ x[token_id], of one chunk.

    One program handles BLOCK logits of one row. Grid: (n, NUM_CHUNKS).
    """
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = p_logits + i_row * STRIDE
    o_id = i_chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_x = load_logits(p_row, o_id, i_chunk * BLOCK, NUM_IDS, BLOCK)  # [BLOCK]
    best = best_rank(b_x, o_id)
    top = ranked_value(best)
    # A chunk of -inf alone has no mass: -inf less -inf would be NaN, which is no integer.
    b_exp = tl.where(b_x == float("-inf"), 0.0, tl.math.exp2((b_x - top) * LOG2E))
    o_part = i_row * NUM_CHUNKS + i_chunk
    tl.store(p_best + o_part, best)
    tl.store(p_mass + o_part, tl.sum((b_exp * 2.0**50).to(tl.int64), 0))
    if p_token_ids is not None:
        chosen = tl.load(p_row + tl.load(p_token_ids + i_row)).to(tl.float32)
        m_before = (b_x >= chosen) & (o_id < NUM_IDS)
        tl.store(p_counts + o_part, tl.sum(m_before.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_top"])
def _top_kernel(
    p_logits,
    p_best,
    p_mass,
    p_top,
    p_total,
    p_ranks,
    num_top,
    STRIDE: tl.constexpr,
    NUM_IDS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST_SHIFT: tl.constexpr,
):
    """top = max x; total = Σ exp(x - top); ranks of the num_top tokens that come first, in order of their ids.

    One program handles one row. Grid: (n,).
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_chunk = tl.arange(0, BLOCK_CHUNKS)
    m_chunk = o_chunk < NUM_CHUNKS
    o_part = i_row * NUM_CHUNKS + o_chunk
    b_best = tl.load(p_best + o_part, mask=m_chunk, other=LOWEST)  # [BLOCK_CHUNKS]
    b_mass = tl.load(p_mass + o_part, mask=m_chunk, other=0)  # [BLOCK_CHUNKS]
    best = tl.max(b_best, 0)
    top = tl.where(is_bad(best), float("nan"), ranked_value(best))
    b_scale = tl.where(m_chunk, tl.math.exp2((ranked_value(b_best) - top) * LOG2E), 0.0)
    tl.store(p_top + i_row, top)
    tl.store(p_total + i_row, tl.sum(b_mass.to(tl.float64) * b_scale.to(tl.float64), 0) * 2.0**-50)
    if num_top > 0:
        p_row = p_logits + i_row * STRIDE
        bound = tl.zeros((), tl.int64) + LOWEST
        if num_top < NUM_IDS:
            bound = kth_rank(p_row, num_top, NUM_IDS, BLOCK, LAST_SHIFT)
        num_before = tl.zeros((), tl.int32)
        for i_start in range(0, NUM_IDS, BLOCK):
            o_id = i_start + tl.arange(0, BLOCK)  # [BLOCK]
            b_rank = rank(load_logits(p_row, o_id, i_start, NUM_IDS, BLOCK), o_id)
            m_top = (b_rank >= bound) & (o_id < NUM_IDS)
            o_place = num_before + tl.cumsum(m_top.to(tl.int32), 0) - 1  # [BLOCK]
            tl.store(p_ranks + i_row * num_top + o_place, b_rank, mask=m_top)
            num_before += tl.sum(m_top.to(tl.int32), 0)


def log_softmax_top(logits: Tensor, num_top: int, token_ids: Tensor | None = None) -> LogprobOutput:
    """See `octavo.kernels.log_softmax_top`."""
    x = check_logits(logits)
    num_rows, num_ids = x.shape
    if not 0 <= num_top <= num_ids:
        raise ValueError(f"num_top is {num_top}; allowed: 0 to {num_ids}")
    if token_ids is not None:
        check_shape("token_ids", token_ids, (num_rows,))
        token_ids = token_ids.contiguous()
    settings = config(num_ids=num_ids, dtype=x.dtype)
    parts = num_rows, settings.num_chunks
    best = torch.empty(parts, dtype=torch.int64, device=x.device)
    mass = torch.empty_like(best)
    counts = None if token_ids is None else torch.empty(parts, dtype=torch.int32, device=x.device)
    top = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    total = torch.empty((num_rows, 1), dtype=torch.float64, device=x.device)
    ranks = torch.empty((num_rows, num_top), dtype=torch.int64, device=x.device)
    shape = {"STRIDE": x.stride(0), "NUM_IDS": num_ids, "NUM_CHUNKS": settings.num_chunks, "BLOCK": settings.block}
    if num_rows:
        _sum_kernel[num_rows, settings.num_chunks](
            x, token_ids, best, mass, counts, **shape, num_warps=settings.scan_warps, enable_fp_fusion=True
        )
        _top_kernel[(num_rows,)](
            x,
            best,
            mass,
            top,
            total,
            ranks,
            num_top,
            **shape,
            BLOCK_CHUNKS=next_power_of_2(settings.num_chunks),
            LAST_SHIFT=settings.last_shift,
            num_warps=settings.row_warps,
            enable_fp_fusion=True,
        )
    # A few small launches on [n, num_top]: float64's logarithm, and the order of tokens that are already chosen.
    log_total = total.log()
    top_ids = (1 << 31) - 1 - (ranks.sort(-1, descending=True).values & (1 << 31) - 1)

    def logprobs(token_ids: Tensor) -> Tensor:
        return (x.gather(-1, token_ids).double() - top.double() - log_total).to(torch.float32)

    if token_ids is None or counts is None:
        return LogprobOutput(logprobs(top_ids), top_ids, None, None)
    values = logprobs(token_ids[:, None]).squeeze(-1)
    return LogprobOutput(logprobs(top_ids), top_ids, values, counts.sum(-1))
