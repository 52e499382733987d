# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds what changes logits before a token is chosen. It does not know how one is.

Every kernel writes into a float32 copy, touches only the entries that are listed, and rounds as torch does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_dtype
from ..common.launch import cdiv
from .params import SampleParams

__all__ = ["edit_logits"]

_BLOCK = 1024


@triton.jit(do_not_specialize_on_alignment=["p_rows"])
def _forbid_kernel(
    p_x, p_rows, p_bitmask, STRIDE: tl.constexpr, MASK_STRIDE: tl.constexpr, NUM_IDS: tl.constexpr, BLOCK: tl.constexpr
):
    """x[rows[m], id] = -inf where bit id of bitmask[m] is not set.

    One program handles BLOCK ids of one m. Grid: (m, cdiv(NUM_IDS, BLOCK)).
    """
    i_entry = tl.program_id(0).to(tl.int64)
    o_id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_id = o_id < NUM_IDS
    i_row = tl.load(p_rows + i_entry).to(tl.int64)
    b_word = tl.load(p_bitmask + i_entry * MASK_STRIDE + o_id // 32, mask=m_id, other=-1)  # [BLOCK]
    m_forbidden = m_id & (((b_word >> (o_id % 32)) & 1) == 0)
    tl.store(p_x + i_row * STRIDE + o_id, tl.full((BLOCK,), float("-inf"), tl.float32), mask=m_forbidden)


@triton.jit(do_not_specialize=["num_entries"], do_not_specialize_on_alignment=["p_rows", "p_token_ids", "p_values"])
def _entries_kernel(
    p_x, p_rows, p_token_ids, p_values, num_entries, STRIDE: tl.constexpr, NUM_IDS: tl.constexpr, BLOCK: tl.constexpr
):
    """x[rows[m], token_ids[m]] += values[m]; without values, = -inf.

    One program handles BLOCK entries. Grid: (cdiv(num_entries, BLOCK),).
    """
    o_entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_entry = o_entry < num_entries
    b_rows = tl.load(p_rows + o_entry, mask=m_entry, other=0).to(tl.int64)  # [BLOCK]
    b_ids = tl.load(p_token_ids + o_entry, mask=m_entry, other=NUM_IDS).to(tl.int64)  # [BLOCK]
    m_entry &= (b_ids >= 0) & (b_ids < NUM_IDS)
    p_entry = p_x + b_rows * STRIDE + b_ids
    if p_values is None:
        b_x = tl.full((BLOCK,), float("-inf"), tl.float32)
    else:
        b_x = tl.load(p_entry, mask=m_entry, other=0.0) + tl.load(p_values + o_entry, mask=m_entry, other=0.0)
    tl.store(p_entry, b_x, mask=m_entry)


@triton.jit(
    do_not_specialize=["capacity"],
    do_not_specialize_on_alignment=["p_rows", "p_repetition", "p_presence", "p_frequency", "p_state_rows"],
)
def _penalise_kernel(
    p_x,
    p_rows,
    p_repetition,
    p_presence,
    p_frequency,
    p_state_rows,
    p_seen_ids,
    p_seen_counts,
    p_num_seen,
    capacity,
    STRIDE: tl.constexpr,
    NUM_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x = (x > 0 ? x / repetition : x · repetition) - frequency · count - presence · [count > 0], of seen ids.

    One program handles BLOCK seen ids of one penalised row; programs past its num_seen end at once. Grid:
    (m, cdiv(capacity, BLOCK)).
    """
    i_entry = tl.program_id(0).to(tl.int64)
    i_state = tl.load(p_state_rows + i_entry).to(tl.int64)
    num_seen = tl.load(p_num_seen + i_state)
    o_seen = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_seen = o_seen < num_seen
    if tl.program_id(1) * BLOCK < num_seen:
        b_ids = tl.load(p_seen_ids + i_state * capacity + o_seen, mask=m_seen, other=NUM_IDS)  # [BLOCK]
        b_counts = tl.load(p_seen_counts + i_state * capacity + o_seen, mask=m_seen, other=0)  # [BLOCK]
        m_seen &= (b_ids >= 0) & (b_ids < NUM_IDS)
        p_entry = p_x + tl.load(p_rows + i_entry).to(tl.int64) * STRIDE + b_ids
        b_x = tl.load(p_entry, mask=m_seen, other=0.0)  # [BLOCK]
        repetition = tl.load(p_repetition + i_entry)
        b_x = tl.where(b_x > 0, tl.math.div_rn(b_x, repetition), b_x * repetition)
        b_x -= tl.load(p_frequency + i_entry) * b_counts.to(tl.float32)
        b_x -= tl.where(b_counts > 0, tl.load(p_presence + i_entry), 0.0)
        tl.store(p_entry, b_x, mask=m_seen)


def edit_logits(x: Tensor, params: SampleParams, num_ids: int) -> None:
    """Change logits in place, [n, at least num_ids] float32, as allowed, banned, bias and penalties say.

    Raises:
        ValueError: the bitmask of allowed ids has too few words, or is not of int32.
    """
    stride = x.stride(0)
    if params.allowed is not None and len(params.allowed.rows):
        rows, bitmask = map(Tensor.contiguous, params.allowed)
        check_dtype("allowed.bitmask", bitmask, torch.int32)
        if bitmask.shape[1] < cdiv(num_ids, 32):
            raise ValueError(f"allowed.bitmask has {bitmask.shape[1]} words; {num_ids} ids need {cdiv(num_ids, 32)}")
        grid = len(rows), cdiv(num_ids, _BLOCK)
        _forbid_kernel[grid](
            x, rows, bitmask, STRIDE=stride, MASK_STRIDE=bitmask.stride(0), NUM_IDS=num_ids, BLOCK=_BLOCK
        )
    for entries in (params.banned, params.bias):
        if entries is not None and len(entries.rows):
            rows, token_ids, *values = map(Tensor.contiguous, entries)
            grid_entries = (cdiv(len(rows), 128),)
            _entries_kernel[grid_entries](
                x, rows, token_ids, values[0] if values else None, len(rows), STRIDE=stride, NUM_IDS=num_ids, BLOCK=128
            )
    penalties = params.penalties
    if penalties is not None and penalties.seen_ids.shape[1] and len(penalties.rows):
        capacity = penalties.seen_ids.shape[1]
        _penalise_kernel[len(penalties.rows), cdiv(capacity, _BLOCK)](
            x,
            *map(Tensor.contiguous, penalties),
            capacity,
            STRIDE=stride,
            NUM_IDS=num_ids,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,  # torch rounds the product, then the difference
        )
