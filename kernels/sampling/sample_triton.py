# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds `sample` as Triton kernels. It does not know which rows belong to whom.

The logits are read once, in chunks, for each chunk's best token without and with noise; a second launch merges a row's
chunks. That is all for a greedy row and for one that draws from all tokens. A row with filters takes the token drawn
from all as a candidate: the tokens that min_p, top_k and top_p keep are a prefix of the ranking, so either the
candidate is among them, or the best score among those ranked before it is the next to try.

Probability mass is counted in units of 2⁻³⁵ of the most probable token's, as in the reference, but in integers, so that
its sums are exact in any order. Each term may differ from the reference's by what two float32 exponentials do, a few
2⁻²⁴ of itself: a token is judged otherwise only where the mass before it is that near to top_p.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_dtype, check_shape
from ..common.launch import cdiv, next_power_of_2
from .edit_triton import edit_logits
from .noise import KEY_STARTS
from .params import SampleOutput, SampleParams
from .rank_triton import (
    LOG2E,
    LOWEST,
    Config,
    best_rank,
    check_logits,
    config,
    is_bad,
    kth_rank,
    load_logits,
    race,
    rank,
    ranked_id,
    ranked_value,
    row_key,
)

__all__ = ["sample"]

_KEY0, _KEY1 = map(tl.constexpr, KEY_STARTS)
_MAX_FLOAT = tl.constexpr(3.4028234663852886e38)
_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float64,
    "min_p": torch.float64,
    "seed": torch.int64,
    "choice": torch.int32,
    "position": torch.int64,
}
"""What the kernels take, per row."""


@triton.jit
def _inverse(temperature):
    """Return 1 / temperature, finite: 0 · inf would be NaN where the temperature is subnormal."""
    return tl.minimum(tl.math.div_rn(1.0, temperature), _MAX_FLOAT)


# Numbers of single rows are read one by one: their tensors may begin anywhere, as a slice of a step's does.
@triton.jit(do_not_specialize_on_alignment=["p_temperature", "p_seed", "p_choice", "p_position"])
def _scan_kernel(
    p_logits,
    p_copy,
    p_best,
    p_scores,
    p_temperature,
    p_seed,
    p_choice,
    p_position,
    STRIDE: tl.constexpr,
    COPY_STRIDE: tl.constexpr,
    NUM_IDS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """best = argmax(x) and score = argmax of the race of (x - max x) / temperature, of one chunk, as ranks.

    One program handles BLOCK logits of one row. Grid: (n, NUM_CHUNKS).
    """
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_id = i_chunk * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_x = load_logits(p_logits + i_row * STRIDE, o_id, i_chunk * BLOCK, NUM_IDS, BLOCK)  # [BLOCK]
    best = best_rank(b_x, o_id)
    tl.store(p_best + i_row * NUM_CHUNKS + i_chunk, best)
    if p_copy is not None:
        tl.store(p_copy + i_row * COPY_STRIDE + o_id, b_x, mask=o_id < COPY_STRIDE)
    if p_temperature is not None:
        temperature = tl.load(p_temperature + i_row)
        if temperature > 0:
            key0 = row_key(p_seed, p_choice, p_position, i_row, _KEY0)
            key1 = row_key(p_seed, p_choice, p_position, i_row, _KEY1)
            # The row's maximum is not known yet; what is missing is one factor for the whole chunk.
            b_z = (b_x - ranked_value(best)) * _inverse(temperature)  # [BLOCK]
            b_score = tl.where(b_x == float("-inf"), 0.0, race(b_z, key0, key1, o_id))
            tl.store(p_scores + i_row * NUM_CHUNKS + i_chunk, best_rank(b_score, o_id))


@triton.jit
def _mass(b_z):
    """Return exp(z) for z ≤ 0 in units of 2⁻³⁵: int64."""
    b_exp = tl.math.exp2(b_z * LOG2E)
    return ((b_exp + 2.0**-12 - 2.0**-12) * 2.0**35).to(tl.int64)


@triton.jit
def _mass_before(p_row, candidate, top, inverse, bound, log_min_p, NUM_IDS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mass of the kept tokens that rank before the candidate, and of all kept tokens: int64."""
    before = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.int64)
    for i_start in range(0, NUM_IDS, BLOCK):
        o_id = i_start + tl.arange(0, BLOCK)  # [BLOCK]
        b_x = load_logits(p_row, o_id, i_start, NUM_IDS, BLOCK)
        b_rank = rank(b_x, o_id)
        b_z = (b_x - top) * inverse
        b_mass = tl.where((b_rank >= bound) & (b_z >= log_min_p), _mass(b_z), 0)
        total += tl.sum(b_mass, 0)
        before += tl.sum(tl.where(b_rank > candidate, b_mass, 0), 0)
    return before, total


@triton.jit
def _best_before(
    p_row, candidate, top, inverse, bound, log_min_p, key0, key1, NUM_IDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the best score of the kept tokens that rank before the candidate, as a rank; below 0: there are none."""
    best = tl.zeros((), tl.int64) + LOWEST
    for i_start in range(0, NUM_IDS, BLOCK):
        o_id = i_start + tl.arange(0, BLOCK)  # [BLOCK]
        b_x = load_logits(p_row, o_id, i_start, NUM_IDS, BLOCK)
        b_rank = rank(b_x, o_id)
        b_z = (b_x - top) * inverse
        m_before = (b_rank > candidate) & (b_rank >= bound) & (b_z >= log_min_p)
        b_score = tl.where(m_before, race(b_z, key0, key1, o_id), float("-inf"))
        best = tl.maximum(best, best_rank(b_score, o_id))
    return best


@triton.jit
def _draw_kept(
    p_row,
    i_candidate,
    top,
    inverse,
    bound,
    log_min_p,
    top_p,
    key0,
    key1,
    NUM_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the token of the best score among those that all filters keep, given that of the best score of all.

    Args:
        top: the row's largest logit.
        inverse: 1 / temperature.
        bound: the least rank that top_k keeps.
        log_min_p: the least (x - top) / temperature that min_p keeps.
    """
    x = tl.load(p_row + i_candidate).to(tl.float32)
    candidate = rank(x, i_candidate)
    is_kept = (candidate >= bound) & ((x - top) * inverse >= log_min_p)
    is_open = (top_p < 1.0) | (is_kept == 0)
    while is_open:
        is_inside = is_kept
        if is_kept:  # so top_p is below 1
            before, total = _mass_before(p_row, candidate, top, inverse, bound, log_min_p, NUM_IDS, BLOCK)
            # Both sides are the float64 numbers that the reference compares.
            is_inside = before.to(tl.float64) < top_p * total.to(tl.float64)
        if is_inside == 0:
            best = _best_before(p_row, candidate, top, inverse, bound, log_min_p, key0, key1, NUM_IDS, BLOCK)
            is_inside = ranked_value(best) < 0.0
            i_candidate = tl.where(is_inside, i_candidate, ranked_id(best))
            candidate = rank(tl.load(p_row + i_candidate).to(tl.float32), i_candidate)
            is_kept = candidate >= bound  # by construction
        is_open = (top_p < 1.0) & (is_inside == 0)
    return i_candidate


@triton.jit(
    do_not_specialize_on_alignment=[
        "p_temperature", "p_top_k", "p_top_p", "p_seed", "p_choice", "p_position", "p_token_ids", "p_failed",
    ]
)  # fmt: skip
def _choose_kernel(
    p_logits,
    p_best,
    p_best_before,
    p_scores,
    p_temperature,
    p_top_k,
    p_top_p,
    p_log_min_p,
    p_seed,
    p_choice,
    p_position,
    p_token_ids,
    p_failed,
    STRIDE: tl.constexpr,
    NUM_IDS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST_SHIFT: tl.constexpr,
):
    """token_id = argmax over the chunks of a row, then, where the row has filters, among the tokens that they keep.

    One program handles one row. Grid: (n,).
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_chunk = tl.arange(0, BLOCK_CHUNKS)
    m_chunk = o_chunk < NUM_CHUNKS
    o_part = i_row * NUM_CHUNKS + o_chunk
    b_best = tl.load(p_best + o_part, mask=m_chunk, other=LOWEST)  # [BLOCK_CHUNKS]
    best = tl.max(b_best, 0)
    top = ranked_value(best)
    failed = is_bad(best) | (top == float("-inf"))
    if p_best_before is not None:
        # What the model said is judged before anything was changed: a ban must not hide a NaN.
        failed = failed | is_bad(tl.max(tl.load(p_best_before + o_part, mask=m_chunk, other=LOWEST), 0))
    tl.store(p_failed + i_row, failed)
    i_token = ranked_id(best)
    if p_temperature is not None:
        temperature = tl.load(p_temperature + i_row)
        if (temperature > 0) & (failed == 0):
            inverse = _inverse(temperature)
            b_score = tl.load(p_scores + o_part, mask=m_chunk, other=LOWEST)  # [BLOCK_CHUNKS]
            b_factor = tl.math.exp2((ranked_value(b_best) - top) * inverse * LOG2E)
            b_score = tl.where(m_chunk, rank(ranked_value(b_score) * b_factor, ranked_id(b_score)), LOWEST)
            i_token = ranked_id(tl.max(b_score, 0))
            if (p_top_k is not None) or (p_top_p is not None) or (p_log_min_p is not None):
                p_row = p_logits + i_row * STRIDE
                bound = tl.zeros((), tl.int64) + LOWEST
                log_min_p = tl.full((), float("-inf"), tl.float32)
                top_p = tl.full((), 1.0, tl.float64)
                if p_log_min_p is not None:
                    log_min_p = tl.load(p_log_min_p + i_row)
                if p_top_p is not None:
                    top_p = tl.load(p_top_p + i_row).to(tl.float64)
                if p_top_k is not None:
                    top_k = tl.load(p_top_k + i_row).to(tl.int32)
                    if (top_k > 0) & (top_k < NUM_IDS):
                        bound = kth_rank(p_row, top_k, NUM_IDS, BLOCK, LAST_SHIFT)
                key0 = row_key(p_seed, p_choice, p_position, i_row, _KEY0)
                key1 = row_key(p_seed, p_choice, p_position, i_row, _KEY1)
                i_token = _draw_kept(
                    p_row,
                    i_token,
                    top,
                    inverse,
                    bound,
                    log_min_p,
                    top_p,
                    key0,
                    key1,
                    NUM_IDS,
                    BLOCK,
                )
    tl.store(p_token_ids + i_row, i_token.to(tl.int64))


def _scan(
    x: Tensor, num_ids: int, settings: Config, params: SampleParams, copy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the best rank of each chunk, without and, unless only copying, with noise: [n, num_chunks] int64."""
    best = torch.empty((len(x), settings.num_chunks), dtype=torch.int64, device=x.device)
    scores = torch.empty_like(best)
    drawn = params.temperature is not None and copy is None
    _scan_kernel[len(x), settings.num_chunks](
        x,
        copy,
        best,
        scores,
        *((params.temperature, params.seed, params.choice, params.position) if drawn else (None,) * 4),
        STRIDE=x.stride(0),
        COPY_STRIDE=0 if copy is None else copy.stride(0),
        NUM_IDS=num_ids,
        NUM_CHUNKS=settings.num_chunks,
        BLOCK=settings.block,
        num_warps=settings.scan_warps,
        enable_fp_fusion=True,
    )
    return best, scores


def _side_by_side(params: SampleParams, num_rows: int) -> SampleParams:
    """Return the parameters with every per-row tensor contiguous.

    Raises:
        ValueError: names the parameter, what it is and what is allowed.
    """
    per_row: dict[str, Tensor] = {}
    for name, dtype in _DTYPES.items():
        if (x := getattr(params, name)) is not None:
            check_shape(name, x, (num_rows,))
            check_dtype(name, x, dtype)
            per_row[name] = x.contiguous()
    return replace(params, **per_row)  # type: ignore[arg-type]


def sample(logits: Tensor, params: SampleParams, *, out: SampleOutput | None = None) -> SampleOutput:
    """See `octavo.kernels.sample`."""
    x = check_logits(logits)
    num_rows, vocab_size = x.shape
    params = _side_by_side(params, num_rows)
    num_ids = vocab_size if params.num_valid_ids is None else min(params.num_valid_ids, vocab_size)
    if out is None:
        out = SampleOutput(
            torch.empty(num_rows, dtype=torch.int64, device=x.device),
            torch.empty(num_rows, dtype=torch.bool, device=x.device),
        )
    for name, result, dtype in (("out.token_ids", out.token_ids, torch.int64), ("out.failed", out.failed, torch.bool)):
        check_shape(name, result, (num_rows,))
        if result.dtype != dtype or not result.is_contiguous():
            raise ValueError(f"{name} is {result.dtype} with strides {result.stride()}; expected contiguous {dtype}")
    if num_rows == 0:
        return out
    before = None
    if params.changes_logits:
        copy = torch.empty((num_rows, cdiv(num_ids, 16) * 16), dtype=torch.float32, device=x.device)
        before, _ = _scan(x, num_ids, config(num_ids=num_ids, dtype=x.dtype), params, copy)
        edit_logits(copy, params, num_ids)
        x = copy
    settings = config(num_ids=num_ids, dtype=x.dtype)
    best, scores = _scan(x, num_ids, settings, params, None)
    drawn = params.temperature is not None
    _choose_kernel[(num_rows,)](
        x,
        best,
        before,
        scores,
        params.temperature,
        params.top_k if drawn else None,
        params.top_p if drawn else None,
        params.min_p.log().to(torch.float32) if drawn and params.min_p is not None else None,
        params.seed if drawn else None,
        params.choice if drawn else None,
        params.position if drawn else None,
        out.token_ids,
        out.failed,
        STRIDE=x.stride(0),
        NUM_IDS=num_ids,
        NUM_CHUNKS=settings.num_chunks,
        BLOCK_CHUNKS=next_power_of_2(settings.num_chunks),
        BLOCK=settings.block,
        LAST_SHIFT=settings.last_shift,
        num_warps=settings.row_warps,
        # 16 warps get at most 128; left to itself the compiler takes 64 for some filters, and spills.
        maxnreg=128,
        enable_fp_fusion=True,
    )
    return out
