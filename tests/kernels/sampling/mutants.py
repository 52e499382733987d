# ruff: noqa: E501 (one line per bug)
"""This module holds planted bugs, as replacements in the source, and how to run with one. It knows no check."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    old: str
    """Found exactly once in the module's source."""
    new: str
    also: tuple[tuple[str, str], ...] = ()
    """More replacements that belong to the bug."""


SAMPLE_MUTANTS = [
    Mutant("top_k keeps one too many", "device=z.device) < top_k", "device=z.device) <= top_k"),
    Mutant("top_k keeps one too few", "device=z.device) < top_k", "device=z.device) < (top_k - 1).clamp_min(1)"),
    Mutant("top_p after top_k keeps one too many", "(reached[:, :-1] < top_p *", "(reached[:, :-1].roll(1) < top_p *"),
    Mutant("top_p after top_k keeps one too few", "(reached[:, :-1] < top_p *", "(reached[:, 1:] < top_p *"),
    Mutant("top_p keeps a token that completes nothing", ">= needed", "> needed"),
    Mutant("top_p of 0 is off", "bounded = (top_p < 1.0)", "bounded = ((top_p < 1.0) & (top_p > 0.0))"),
    Mutant("ids below 0 count from the end", "(token_ids >= 0) & ", ""),
    Mutant("top_p reached too early", "needed = top_p *", "needed = 0.9 * top_p *"),
    Mutant("top_p reached too late", "needed = top_p *", "needed = 1.1 * top_p *"),
    Mutant("top_p keeps all that tie with the last", "before[row, :token_id] += 1.0", "before[row, :token_id] += 0.0"),
    Mutant("top_p ignores the nucleus", "mass_before = (before * mass)", "mass_before = (0.0 * mass)"),
    Mutant("top_p takes mass before min_p", "mass = _mass(z)", "mass = _mass(z.nan_to_num(neginf=-1.0))"),
    Mutant("top_p of another row", "_draw_from_nucleus(z, score, token_ids[bounded], top_p[bounded])", "_draw_from_nucleus(z, score, token_ids[bounded], top_p[bounded].roll(1))"),
    Mutant("top_k and top_p swap order", "reached = torch.where(keep, _mass(z), 0.0)", "reached = _mass(z)"),
    Mutant("min_p without logarithm", "params.min_p[rows, None].log()", "(params.min_p[rows, None] - 1.0)"),
    Mutant("min_p dropped after top_k", "keep &= z >= log_min_p", "keep &= z <= 0.0"),
    Mutant("temperature multiplies", "z /= params.temperature", "z *= params.temperature"),
    Mutant("temperature dropped after top_k", "(values - top[rows, None]) / params.temperature[rows, None].to(values.dtype)", "(values - top[rows, None])"),
    Mutant("noise left out", "score = torch.sub(z, noise", "score = torch.sub(z, noise.zero_()"),
    Mutant("noise of the wrong sign", "score = (z - noise)", "score = (z + noise)"),
    Mutant("noise by rank instead of token id", "token_ids.to(torch.int32).mul_(", "torch.arange(width, dtype=torch.int32).mul_("),
    Mutant("noise of another row", "minus_gumbel(keys[:, rows], token_codes", "minus_gumbel(keys[:, rows].roll(1, 1), token_codes"),
    Mutant("position ignored", "row_keys(params.seed, params.choice, params.position)", "row_keys(params.seed, params.choice, params.choice)"),
    Mutant("choice ignored", "row_keys(params.seed, params.choice, params.position)", "row_keys(params.seed, params.choice * 0, params.position)"),
    Mutant("high word of the seed ignored", "row_keys(params.seed, ", "row_keys(params.seed & 0xFFFFFFFF, "),
    Mutant("ties at the cut by chance", "(last == values[:, num]).nonzero().squeeze(-1).tolist()", "[]"),
    Mutant("ties at the cut take the highest ids", ".nonzero()[: num - num_above, 0]", ".nonzero()[num_above - num :, 0]"),
    Mutant("penalty on the neighbour's row", "rows = penalties.rows[m]", "rows = penalties.rows.roll(1)[m]"),
    Mutant("penalty from the neighbour's tokens", "state_rows = penalties.state_rows[m]", "state_rows = penalties.state_rows.roll(1)[m]"),
    Mutant("penalty state by batch position", "state_rows = penalties.state_rows[m]", "state_rows = penalties.rows[m] % len(penalties.num_seen)"),
    Mutant("repetition divides negative logits too", "logits / repetition, logits * repetition", "logits / repetition, logits / repetition"),
    Mutant("presence counts the prompt", "* (counts > 0)", "* (counts >= 0)"),
    Mutant("frequency counts once", "[m] * counts", "[m] * (counts > 0)"),
    Mutant("stale penalty entries are read", "< num_seen[:, None]).nonzero", "< num_seen[:, None] + 1).nonzero"),
    Mutant("bias on the neighbour's row", "rows, token_ids, values = params.bias", "rows, token_ids, values = params.bias; rows = (rows + 1) % len(x)"),
    Mutant("bias replaces the logit", "x[rows, token_ids] += values", "x[rows, token_ids] = values"),
    Mutant("bans ignored", "x[rows[valid], token_ids[valid]] = _NEGATIVE_INFINITY", "x[rows[valid], token_ids[valid]] += 0.0"),
    Mutant("allowed tokens are forbidden", "[:, : x.shape[1]] == 0", "[:, : x.shape[1]] == 1"),
    Mutant("allowed bits in the other order", "torch.arange(8, dtype", "torch.arange(7, -1, -1, dtype"),
    Mutant("ids past the tokenizer's are sampled", "logits if params.num_valid_ids is None else", "logits if True else"),
    Mutant("a ban hides a NaN", "failed |= bad", "failed |= False"),
    Mutant("greedy rows are drawn", "(params.temperature > 0).logical_and_", "(params.temperature >= 0).logical_and_"),
    Mutant("the caller's logits are changed", "torch.float32), copy=True)", "torch.float32))"),
    Mutant("out is not written", "out.token_ids.copy_(result.token_ids)", "pass"),
]  # fmt: skip


def planted(module: ModuleType, mutant: Mutant) -> ModuleType:
    """Return a copy of a module with the bug in it."""
    source = inspect.getsource(module)
    for old, new in ((mutant.old, mutant.new), *mutant.also):
        assert source.count(old) == 1, f"{mutant.name}: {old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    copy = ModuleType(module.__name__)
    copy.__package__ = module.__package__
    exec(compile(source, f"<{mutant.name}>", "exec"), copy.__dict__)
    return copy
