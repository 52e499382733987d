"""This module holds the sampling ops in torch. It does not know which rows belong to whom.

No vocabulary is ever sorted. A row with top_k takes its candidates from a partial selection. A row without draws from
all tokens, and a token outside the nucleus is rejected: the nucleus is a prefix of the ranking, so tokens ranked after
a rejected one are outside too, and the best score among those ranked before it is the next to try.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .noise import GOLDEN, minus_gumbel, row_keys, token_codes
from .params import AllowedTokens, LogprobOutput, Penalties, SampleOutput, SampleParams

__all__ = ["log_softmax_top", "sample"]

CHUNK_ELEMENTS: Final = 1 << 18
"""Rows are worked on so many logits at a time: temporaries stay in the L2 cache, and in memory malloc keeps."""

SMALL_TOP_K: Final = 256
"""Selecting more than this is ten times slower, so one row that wants it must not slow the others."""

_NEGATIVE_INFINITY: Final = float("-inf")


def sample(logits: Tensor, params: SampleParams, *, out: SampleOutput | None = None) -> SampleOutput:
    """See `octavo.kernels.sample`; float64 logits are worked on in float64 (but for the noise)."""
    x = logits if params.num_valid_ids is None else logits[:, : params.num_valid_ids]
    if params.changes_logits:
        # Only a copy of the rows can be changed.
        step = _rows_at_a_time(x)
        starts = range(0, max(len(x), 1), step)
        parts = [_sample_rows(x[start : start + step], params.rows(start, start + step)) for start in starts]
        result = SampleOutput(*map(torch.cat, zip(*parts, strict=True)))
    else:
        result = _sample_rows(x, params)
    if out is None:
        return result
    out.token_ids.copy_(result.token_ids)
    out.failed.copy_(result.failed)
    return out


def _sample_rows(x: Tensor, params: SampleParams) -> SampleOutput:
    bad = None
    if params.changes_logits:
        # A ban must not hide a NaN: what the model said is checked before anything is changed.
        bad = x.amax(-1).isfinite().logical_not_()
        x = _change_logits(x, params)
    top, token_ids = x.max(-1)
    failed = top.isfinite().logical_not_()
    top = _at_least_float32(top)
    if bad is not None:
        failed |= bad
    if params.temperature is None:
        return SampleOutput(token_ids, failed)
    assert params.seed is not None
    assert params.choice is not None
    assert params.position is not None
    drawn = (params.temperature > 0).logical_and_(~failed)
    keys = row_keys(params.seed, params.choice, params.position)
    if params.top_k is None:
        groups = [(drawn, False)]
    else:
        limited = drawn & (params.top_k > 0) & (params.top_k < x.shape[1])
        small = params.top_k <= SMALL_TOP_K
        groups = [(drawn & ~limited, False), (limited & small, True), (limited & ~small, True)]
    for group, is_limited in groups:
        rows = group.nonzero().squeeze(-1)
        if is_limited and len(rows):
            token_ids[rows] = _draw_from_top(x, top, keys, params, rows)
        elif len(rows):
            chunks = torch.split(rows, _rows_at_a_time(x))
            token_ids[rows] = torch.cat([_draw_from_all(x, top, keys, params, chunk) for chunk in chunks])
    return SampleOutput(token_ids, failed)


def _rows_at_a_time(x: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // x.shape[1])


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows at ascending positions, in float32 at least; all of them without a copy."""
    return _at_least_float32(x if len(rows) == len(x) else x[rows])


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _change_logits(x: Tensor, params: SampleParams) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    if params.allowed is not None:
        x[params.allowed.rows] = x[params.allowed.rows].masked_fill_(_forbidden(params.allowed, x), _NEGATIVE_INFINITY)
    if params.banned is not None:
        rows, token_ids = params.banned
        valid = _exist(token_ids, x)
        x[rows[valid], token_ids[valid]] = _NEGATIVE_INFINITY
    if params.bias is not None:
        rows, token_ids, values = params.bias
        valid = _exist(token_ids, x)
        rows, token_ids = rows[valid], token_ids[valid]
        x[rows, token_ids] += values[valid].to(x.dtype)
    if params.penalties is not None:
        _penalise_(x, params.penalties)
    return x


def _exist(token_ids: Tensor, x: Tensor) -> Tensor:
    return (token_ids >= 0) & (token_ids < x.shape[1])


def _forbidden(allowed: AllowedTokens, x: Tensor) -> Tensor:
    """Return [m, vocab_size] bool, True where a bit is not set."""
    octets = allowed.bitmask.view(torch.uint8)  # little-endian: octet id div 8, bit id mod 8
    bits = octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=x.device)
    return bits.bitwise_and_(1).flatten(1)[:, : x.shape[1]] == 0


def _penalise_(x: Tensor, penalties: Penalties) -> None:
    num_seen = penalties.num_seen[penalties.state_rows]
    width = int(num_seen.max())
    m, at = (torch.arange(width, device=x.device) < num_seen[:, None]).nonzero(as_tuple=True)
    state_rows = penalties.state_rows[m]
    token_ids = penalties.seen_ids[state_rows, at].to(torch.int64)
    valid = _exist(token_ids, x)
    m, token_ids = m[valid], token_ids[valid]
    counts = penalties.seen_counts[state_rows, at][valid]
    rows = penalties.rows[m]
    logits = x[rows, token_ids]
    repetition = penalties.repetition.to(x.dtype)[m]
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits -= penalties.frequency.to(x.dtype)[m] * counts
    logits -= penalties.presence.to(x.dtype)[m] * (counts > 0)
    x[rows, token_ids] = logits


def _log_min_p(params: SampleParams, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return [r, 1] the least z = (logit − top) / temperature that min_p keeps; −inf where it is off."""
    return None if params.min_p is None else params.min_p[rows, None].log().to(dtype)


def _mass(z: Tensor) -> Tensor:
    """Return exp(z) for z ≤ 0, rounded to a multiple of 2⁻³⁵.

    Float64 sums of up to 2¹⁸ of them are exact, so whether a token is in the nucleus does not depend on any order.
    """
    return torch.exp(z).add_(2.0**-12).sub_(2.0**-12)


def _draw_from_all(x: Tensor, top: Tensor, keys: Tensor, params: SampleParams, rows: Tensor) -> Tensor:
    assert params.temperature is not None
    z = _take(x, rows) - top[rows, None]
    z /= params.temperature[rows, None].to(z.dtype)
    noise = minus_gumbel(keys[:, rows], token_codes(z.shape[1], z.device))
    log_min_p = _log_min_p(params, rows, z.dtype)
    if log_min_p is not None:
        z.masked_fill_(z < log_min_p, _NEGATIVE_INFINITY)
    score = torch.sub(z, noise, out=noise if z.dtype == torch.float32 else None)
    token_ids = score.max(-1).indices
    if params.top_p is not None:
        top_p = params.top_p[rows]
        bounded = (top_p < 1.0).nonzero().squeeze(-1)
        if len(bounded):
            z, score = _take(z, bounded), _take(score, bounded)
            token_ids[bounded] = _draw_from_nucleus(z, score, token_ids[bounded], top_p[bounded])
    return token_ids


def _draw_from_nucleus(z: Tensor, score: Tensor, token_ids: Tensor, top_p: Tensor) -> Tensor:
    """Return the token of the best score in each row's nucleus, given that of the best score of all.

    Args:
        z: [r, vocab_size], −inf where a token has been dropped.
        score: [r, vocab_size], changed.
        token_ids: [r] argmax of score.
        top_p: [r] below 1.
    """
    result = token_ids.clone()
    rows = torch.arange(len(z), device=z.device)
    mass = _mass(z)
    needed = top_p * mass.sum(-1, dtype=torch.float64)
    while True:
        # 1 for what ranks before the token (more probable, or as probable with a lower id), else 0; in float, since
        # comparing and selecting with bool tensors takes three times as long on a CPU.
        before = (z - z.gather(-1, token_ids[:, None])).sign_()
        for row, token_id in enumerate(token_ids.tolist()):
            before[row, :token_id] += 1.0
        before.clamp_(0.0, 1.0)
        mass_before = (before * mass).sum(-1, dtype=torch.float64)
        # The first in order has none before it, and stays whatever is needed: a top_p of 0 keeps one token.
        outside = ((mass_before >= needed) & (mass_before > 0.0)).nonzero().squeeze(-1)
        if not len(outside):
            return result
        z, mass, needed, rows = _take(z, outside), _take(mass, outside), needed[outside], rows[outside]
        score = _take(score, outside).masked_fill_(_take(before, outside) == 0.0, _NEGATIVE_INFINITY)
        token_ids = score.max(-1).indices
        result[rows] = token_ids


def _draw_from_top(x: Tensor, top: Tensor, keys: Tensor, params: SampleParams, rows: Tensor) -> Tensor:
    assert params.temperature is not None
    assert params.top_k is not None
    top_k = params.top_k[rows, None]
    width = int(top_k.max())
    ranked = [_ranked(_take(x, chunk), width) for chunk in torch.split(rows, _rows_at_a_time(x))]
    values, token_ids = map(torch.cat, zip(*ranked, strict=True))
    z = (values - top[rows, None]) / params.temperature[rows, None].to(values.dtype)
    keep = torch.arange(width, device=z.device) < top_k
    log_min_p = _log_min_p(params, rows, z.dtype)
    if log_min_p is not None:
        keep &= z >= log_min_p
    if params.top_p is not None:
        top_p = params.top_p[rows, None]
        reached = torch.where(keep, _mass(z), 0.0).cumsum(-1, dtype=torch.float64)
        keep[:, 1:] &= (reached[:, :-1] < top_p * reached[:, -1:]) | (top_p >= 1.0)
    noise = minus_gumbel(keys[:, rows], token_ids.to(torch.int32).mul_(GOLDEN - (1 << 32)))
    score = (z - noise).masked_fill_(~keep, _NEGATIVE_INFINITY)
    # The columns are in order of rank, so the lowest id among equal scores has to be looked for.
    return torch.where(score == score.amax(-1, keepdim=True), token_ids, x.shape[1]).amin(-1)


def _ranked(x: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return the largest values and their ids, in descending order; equal values rank by id, also at the end.

    Args:
        x: [r, vocab_size] float.
        num: 1 to vocab_size.
    """
    values, token_ids = x.topk(min(num + 1, x.shape[1]), -1)
    if values.shape[1] > num:
        last = values[:, num - 1]
        # topk takes any of several values equal to the last one; where not all of them fit, take the lowest ids.
        for row in (last == values[:, num]).nonzero().squeeze(-1).tolist():
            num_above = int((values[row, :num] > last[row]).sum())
            token_ids[row, num_above:num] = (x[row] == last[row]).nonzero()[: num - num_above, 0]
        values, token_ids = values[:, :num], token_ids[:, :num]
    token_ids, order = token_ids.sort(-1)
    values, order = values.gather(-1, order).sort(stable=True, dim=-1, descending=True)
    return values, token_ids.gather(-1, order)


def log_softmax_top(logits: Tensor, num_top: int, token_ids: Tensor | None = None) -> LogprobOutput:
    """See `octavo.kernels.log_softmax_top`; float64 logits are worked on in float64."""
    step = _rows_at_a_time(logits)
    parts = [
        _log_softmax_rows(
            _at_least_float32(logits[start : start + step]),
            num_top,
            None if token_ids is None else token_ids[start : start + step],
        )
        for start in range(0, max(len(logits), 1), step)
    ]
    top_values, top_ids, values, ranks = zip(*parts, strict=True)
    if token_ids is None:
        return LogprobOutput(torch.cat(top_values), torch.cat(top_ids), None, None)
    return LogprobOutput(torch.cat(top_values), torch.cat(top_ids), torch.cat(values), torch.cat(ranks))


def _log_softmax_rows(x: Tensor, num_top: int, token_ids: Tensor | None) -> LogprobOutput:
    top = x.amax(-1, keepdim=True)
    mass = torch.exp(x - top)
    # Two parts, multiples of 2⁻³⁵ and of 2⁻⁵⁹, both with exact float64 sums: order-free, and no mass is lost.
    coarse = (mass + 2.0**-12).sub_(2.0**-12)
    fine = mass.sub_(coarse).add_(2.0**-36).sub_(2.0**-36)
    total = coarse.sum(-1, keepdim=True, dtype=torch.float64) + fine.sum(-1, keepdim=True, dtype=torch.float64)
    top, log_total = top.double(), total.log()
    if num_top:
        top_values, top_ids = _ranked(x, num_top)
    else:
        top_values, top_ids = x[:, :0], torch.empty((len(x), 0), dtype=torch.int64, device=x.device)
    top_values = (top_values.double() - top - log_total).to(x.dtype)
    if token_ids is None:
        return LogprobOutput(top_values, top_ids, None, None)
    chosen = x.gather(-1, token_ids[:, None])
    values = (chosen.double() - top - log_total).squeeze(-1).to(x.dtype)
    return LogprobOutput(top_values, top_ids, values, (x >= chosen).sum(-1))
