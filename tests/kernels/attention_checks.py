"""This module holds what attention must satisfy, as functions that raise AssertionError. It does not know the backend.

A check takes the op's public name and a shape, and calls whatever implementation is in force; the tests run them on
every backend, the mutation runner on implementations with a planted bug. Exact checks have no tolerance beyond the one
rounding of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from octavo.kernels.bounds import UNIT
from torch import Tensor

from . import calls
from .paged import Batch, Shape, describe, gaussian, labelled, slots

Check = Callable[[str, Shape], None]

# exp(-104) is 0 in float32: a key that wins by more decides the output alone, bit by bit.
GAIN = 64.0
WINNER = 10_000.0


def call(op: str, inputs: dict[str, Any], **extra: Any) -> Tensor:
    """Run one attention op into a NaN-filled `out`."""
    out = torch.full_like(inputs["q"], float("nan"))
    result: Tensor = calls.call(op, **inputs, out=out, **extra)
    assert result is out, "the op must return the tensor it was given as `out`"
    return result


def call_lse(op: str, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = calls.call(op, **inputs, return_lse=True)
    return result


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, NaN payloads and the sign of zero included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return a.shape == b.shape and bool((a.contiguous().view(integer) == b.contiguous().view(integer)).all())


def _targets(shape: Shape, position: int, visible: range, query_len: int, seq_len: int) -> list[int]:
    """Return the visible positions at which an index is most likely to be off."""
    start = position // shape.block_size * shape.block_size
    wanted = {position, position - 1, 0, start, start - 1, visible.start, visible.start + 1}
    wanted |= {seq_len - query_len, seq_len - query_len - 1, (visible.start + position) // 2}
    return sorted(e for e in wanted if e in visible)


def needle(op: str, shape: Shape) -> None:
    """One key wins by far: the output is its value, bit by bit, wherever it lies."""
    batch = labelled(shape)
    rows = batch.rows
    targets = [_targets(shape, p, batch.visible(p), *shape.seqs[s]) for _, s, p in rows]
    for turn in range(max((len(options) for options in targets), default=0)):
        # Heads of one row look for different positions, so that no two of them may share a mistake.
        wanted = {}
        for (row, s, _), options in zip(rows, targets, strict=True):
            for h in range(shape.num_q_heads):
                e = options[(turn + h) % len(options)]
                wanted[row, h] = batch.values[s][e, h // shape.group_size]
                batch.q[row, h] = GAIN * batch.keys[s][e, h // shape.group_size]
        out = call(op, batch.lay_out(turn))
        for (row, h), value in wanted.items():
            assert same_bits(out[row, h], value), (
                f"row {row} head {h}: expected {describe(value)}, got {describe(out[row, h])}"
            )


def _winnable(shape: Shape) -> Batch:
    """Return a batch in which a key of WINNER along the first axis wins every row."""
    batch = gaussian(shape)
    batch.q[..., 0] = 4.0
    return batch


def _plant(inputs: dict[str, Any], places: list[tuple[int, int]]) -> dict[str, Any]:
    k_cache, v_cache = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    for block, offset in places:
        k_cache[block, :, offset] = 0
        k_cache[block, :, offset, 0] = WINNER
        v_cache[block, :, offset] = WINNER
    return {**inputs, "k_cache": k_cache, "v_cache": v_cache}


def _some_rows(query_len: int) -> list[int]:
    return sorted({0, query_len // 2, max(query_len - 2, 0), query_len - 1})


def _turns(shape: Shape) -> list[list[tuple[int, int]]]:
    """Return lists of (sequence, query row within it), each sequence at most once in a list: they do not meet."""
    chosen = [_some_rows(query_len) if query_len else [] for query_len, _ in shape.seqs]
    longest = max(map(len, chosen), default=0)
    return [[(s, rows[turn]) for s, rows in enumerate(chosen) if turn < len(rows)] for turn in range(longest)]


def forbidden_future(op: str, shape: Shape) -> None:
    """A winning key one position ahead changes no bit of a row, and every bit that matters of the next one."""
    inputs = _winnable(shape).lay_out(poison=False)
    before = call(op, inputs)
    starts = inputs["cu_seqlens_q"].tolist()
    for turn in _turns(shape):
        ahead = {(s, i): shape.seqs[s][1] - shape.seqs[s][0] + i + 1 for s, i in turn}
        # No slot of an owned block lies past a length that fills its blocks; `poison` covers the next entry.
        ahead = {(s, i): p for (s, i), p in ahead.items() if p < shape.seqs[s][1] or p % shape.block_size}
        after = call(op, _plant(inputs, [place for (s, _), p in ahead.items() for place in slots(inputs, s, [p])]))
        for (s, i), p in ahead.items():
            rows = slice(starts[s], starts[s] + i + 1)
            assert same_bits(after[rows], before[rows]), f"sequence {s}: a row up to {i} saw position {p}"
            if i + 1 < shape.seqs[s][0]:
                found = after[starts[s] + i + 1]
                assert (found == WINNER).all(), f"sequence {s}: row {i + 1} did not see its own position {p}"


def forbidden_window(op: str, shape: Shape) -> None:
    """A winning key just outside the window changes no bit; just inside, it wins."""
    assert shape.window is not None
    inputs = _winnable(shape).lay_out(poison=False)
    before = call(op, inputs)
    starts = inputs["cu_seqlens_q"].tolist()
    for turn in _turns(shape):
        outside = {(s, i): shape.seqs[s][1] - shape.seqs[s][0] + i - shape.window for s, i in turn}
        outside = {(s, i): p for (s, i), p in outside.items() if p >= 0}
        after, inside = (
            call(op, _plant(inputs, [at for (s, _), p in outside.items() for at in slots(inputs, s, [p + step])]))
            for step in (0, 1)
        )
        for (s, i), p in outside.items():
            row = starts[s] + i
            assert same_bits(after[row], before[row]), f"sequence {s}: row {i} saw {p}, before its window"
            assert (inside[row] == WINNER).all(), f"sequence {s}: row {i} missed {p + 1}, its window's start"


def forbidden_foreign(op: str, shape: Shape) -> None:
    """Winning keys in another sequence's blocks, in spare blocks and in the null block change no bit."""
    inputs = _winnable(shape).lay_out(poison=False)
    before = call(op, inputs)
    starts = inputs["cu_seqlens_q"].tolist()
    num_blocks, block_size = inputs["k_cache"].shape[0], shape.block_size
    owned: set[int] = set()
    for s, (_, seq_len) in enumerate(shape.seqs):
        places = slots(inputs, s, range(seq_len))
        owned |= {block for block, _ in places}
        after = call(op, _plant(inputs, places))
        kept = torch.ones(len(before), dtype=torch.bool)
        kept[starts[s] : starts[s + 1]] = False
        assert same_bits(after[kept], before[kept]), f"another sequence read a block of sequence {s}"
        own = after[~kept].double() / WINNER  # a mean of equal values: exact but for its rounding
        assert ((own - 1).abs() < 0.01).all(), f"sequence {s} did not read its own blocks"
    free = [(block, offset) for block in range(num_blocks) if block not in owned for offset in range(block_size)]
    assert same_bits(call(op, _plant(inputs, free)), before), "a block that nobody owns was read"


def counting(op: str, shape: Shape) -> None:
    """With K = 0 every visible key weighs 1/n: one-hot values count them, and the lse is ln n."""
    batch = gaussian(shape)
    for s, (_, seq_len) in enumerate(shape.seqs):
        batch.keys[s].zero_()
        batch.values[s].zero_()
        position = torch.arange(seq_len)
        batch.values[s][position, :, position % shape.head_dim] = 1
    for num_sinks in (0, 1):
        sinks = torch.zeros(shape.num_q_heads, dtype=shape.dtype) if num_sinks else None
        out, lse = call_lse(op, {**batch.lay_out(), "sinks": sinks})
        for row, s, p in batch.rows:
            seen = batch.visible(p)
            exact = torch.zeros(shape.head_dim, dtype=torch.float64)
            for e in seen:
                exact[e % shape.head_dim] += 1
            exact /= len(seen) + num_sinks
            error = ((out[row].double() - exact).abs() / exact.clamp(min=1e-30)).nan_to_num(float("inf"))
            error[:, exact == 0] = out[row].double().abs()[:, exact == 0]
            # One rounding of 1/n, one of the output and a few of the sum of at most a handful of equal terms.
            limit = 4 * UNIT[str(shape.dtype)[6:]]
            assert error.max() <= limit, f"sequence {s} position {p}: a visible key is missing, extra or misweighted"
            log = math.log(len(seen) + num_sinks)
            assert (lse[row].double() - log).abs().max() <= 4 * UNIT["float32"] * max(1.0, log), (
                f"sequence {s} position {p}: lse {lse[row].tolist()} is not ln({len(seen) + num_sinks})"
            )


def poison(op: str, shape: Shape) -> None:
    """NaN in every slot that no sequence owns, and in fresh memory, changes no bit."""
    batch = gaussian(shape)
    out = call(op, batch.lay_out())
    assert not out.isnan().any(), "a slot that nobody owns, or unwritten memory, reached the output"
    assert same_bits(out, call(op, batch.lay_out(poison=False))), "the output depends on slots that nobody owns"


def sick_neighbour(op: str, shape: Shape) -> None:
    """A sequence whose own queries, keys and values are NaN or infinite spoils its own rows and no bit of another's."""
    batch = gaussian(shape)
    before = call(op, batch.lay_out())
    for s in range(len(shape.seqs)):
        own = torch.tensor([row for row, owner, _ in batch.rows if owner == s], dtype=torch.long)
        kept = torch.ones(len(before), dtype=torch.bool)
        kept[own] = False
        for value in (float("nan"), float("inf")):
            sick = batch.clone()
            sick.q[own] = value
            sick.keys[s][:], sick.values[s][:] = value, value
            after = call(op, sick.lay_out())
            assert same_bits(after[kept], before[kept]), f"{value} in sequence {s} reached another sequence"
            assert not after[own].isfinite().any(), f"{value} in sequence {s} did not reach its own rows"


def poison_before_window(op: str, shape: Shape) -> None:
    """What lies before every row's window may be gone: NaN there, and the null block in the table, change no bit."""
    assert shape.window is not None
    batch = gaussian(shape)
    clean = batch.lay_out()
    before = call(op, clean)
    gone = batch.lay_out()
    for s, (query_len, seq_len) in enumerate(shape.seqs):
        oldest = max(0, seq_len - query_len - shape.window + 1)
        for block, offset in slots(gone, s, range(oldest)):
            gone["k_cache"][block, :, offset] = float("nan")
            gone["v_cache"][block, :, offset] = float("nan")
        gone["block_table"][s, : oldest // shape.block_size] = 0
    assert same_bits(call(op, gone), before), "a slot that no row's window reaches was read"


def deep_negative(op: str, shape: Shape) -> None:
    """Equal scores of -30,000 weigh the same as equal scores of 0: the running maximum starts at -inf."""
    batch = gaussian(shape)
    batch.q[...] = 0
    batch.q[..., 0] = 1
    for s in range(len(shape.seqs)):
        batch.keys[s].zero_()
    level = call(op, batch.lay_out())
    for s in range(len(shape.seqs)):
        batch.keys[s][..., 0] = -30_000.0
    sunk = call(op, {**batch.lay_out(), "scale": 1.0})
    # The weights are the same numbers, so that only the arithmetic behind them may differ, by its rounding.
    limit = 8 * UNIT[str(shape.dtype)[6:]]
    error = (sunk.double() - level.double()).abs() / level.double().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert bool((error <= limit).all()), "scores far below zero lose their softmax"


def sink_takes_all(op: str, shape: Shape) -> None:
    """A sink far above every score leaves exact zeros, and is the lse; one head's sink touches no other head."""
    batch = gaussian(shape)
    inputs = batch.lay_out()
    sinks = torch.full((shape.num_q_heads,), -WINNER, dtype=shape.dtype)
    before = call(op, {**inputs, "sinks": sinks})
    sinks[-1] = WINNER
    out, lse = call_lse(op, {**inputs, "sinks": sinks})
    rows = torch.tensor([row for row, _, _ in batch.rows], dtype=torch.long)
    assert (out[rows, -1] == 0).all(), "a sink that wins must leave zeros"
    assert (lse[rows, -1] == sinks[-1].to(lse.dtype)).all(), "a sink that wins is the lse"
    assert same_bits(out[rows, :-1], before[rows, :-1]), "a sink reached another head"


def infinite_sinks(op: str, shape: Shape) -> None:
    """+inf takes all weight, -inf is no sink; a row that sees nothing has only its sink."""
    inputs = gaussian(replace(shape, seqs=((1, 0), *shape.seqs))).lay_out()
    without, without_lse = call_lse(op, inputs)
    values = (math.inf, -math.inf, 2.0)
    sinks = torch.tensor([values[h % 3] for h in range(shape.num_q_heads)], dtype=shape.dtype)
    out, lse = call_lse(op, {**inputs, "sinks": sinks})
    assert out.isfinite().all(), "a sink must not spoil what is attended to"
    assert (out[:, 0::3] == 0).all(), "an infinite sink must leave zeros"
    assert (lse[:, 0::3] == math.inf).all(), "an infinite sink is the lse"
    tolerance = {"rtol": 8 * UNIT[str(shape.dtype)[6:]], "atol": 1e-6}
    assert torch.allclose(out[:, 1::3], without[:, 1::3], **tolerance), "a sink of -inf takes weight"
    assert torch.allclose(lse[:, 1::3], without_lse[:, 1::3], **tolerance), "a sink of -inf is no part of the lse"
    assert (out[0] == 0).all(), "a row that sees nothing must give zeros"
    assert torch.allclose(lse[0], sinks.to(lse.dtype), **tolerance), "a row that sees nothing has its sink as lse"


def soft_cap_saturates(op: str, shape: Shape) -> None:
    """Scores far beyond the cap become the cap itself: weights of a big and a small score differ by exp(2 · cap)."""
    cap = 2.0
    batch = gaussian(shape)
    batch.q[...] = 0
    batch.q[..., 0] = 100
    for s, (_, seq_len) in enumerate(shape.seqs):
        position = torch.arange(seq_len)
        batch.keys[s].zero_()
        batch.keys[s][..., 0] = torch.where(position % 3 == 0, 100.0, -100.0)[:, None]
        batch.values[s].zero_()
        batch.values[s][position % 3 == 0] = 1
    out = call(op, {**batch.lay_out(), "soft_cap": cap})
    for row, s, p in batch.rows:
        high = sum(e % 3 == 0 for e in batch.visible(p))
        low = len(batch.visible(p)) - high
        exact = high / (high + low * math.exp(-2 * cap))
        error = (out[row].double() - exact).abs().max() / max(exact, 1e-30)
        # tanh and exp of the capped scores are good to a few roundings of float32.
        assert error <= UNIT[str(shape.dtype)[6:]] + 32 * UNIT["float32"], f"sequence {s} position {p}: wrong soft cap"


def sees_nothing(op: str, shape: Shape) -> None:
    """A row before position 0 (padding of a captured batch) gives zeros and an lse of -inf, and reaches no other."""
    batch = gaussian(replace(shape, seqs=((1, 0), *shape.seqs)))
    out, lse = call_lse(op, batch.lay_out())
    assert (out[0] == 0).all(), "a row that sees nothing must give zeros"
    assert (lse[0] == -math.inf).all(), "a row that sees nothing has an lse of -inf"
    assert not out.isnan().any(), "a row that sees nothing reached another row"


def padding_untouched(op: str, shape: Shape) -> None:
    """Query rows beyond the last sequence are not written."""
    inputs = gaussian(shape).lay_out()
    num_tokens = len(inputs["q"])
    padded = torch.cat((inputs["q"], torch.full_like(inputs["q"][:1].expand(3, -1, -1), float("nan"))))
    out = call(op, {**inputs, "q": padded})
    assert out[num_tokens:].isnan().all(), "a row that belongs to no sequence was written"
    assert same_bits(out[:num_tokens], call(op, inputs)), "padded rows reached a sequence"


def quantised_needle(op: str, shape: Shape) -> None:
    """int8 keys and values come back times their own slot's own scale, bit by bit."""
    batch = labelled(shape)
    rows = batch.rows
    wanted = {}
    for row, s, p in rows:
        for h in range(shape.num_q_heads):
            seen = batch.visible(p)
            e = seen[(row + 3 * h) % len(seen)]
            batch.q[row, h] = GAIN * batch.keys[s][e, h // shape.group_size]
            factor = 2.0 ** (e % 5 - h // shape.group_size % 3)
            wanted[row, h] = batch.values[s][e, h // shape.group_size].clamp(-127, 127) * factor
    inputs = batch.lay_out(poison=False)
    for name in ("k", "v"):
        cache = inputs[f"{name}_cache"].clamp(-127, 127)
        inputs[f"{name}_cache"] = (cache * (2 if name == "k" else 1)).to(torch.int8)
        inputs[f"{name}_scale"] = torch.full(cache.shape[:3], 0.5 if name == "k" else float("nan"))
    for s, (_, seq_len) in enumerate(shape.seqs):
        for p, (block, offset) in enumerate(slots(inputs, s, range(seq_len))):
            exponent = p % 5 - torch.arange(shape.num_kv_heads) % 3
            inputs["v_scale"][block, :, offset] = torch.exp2(exponent.float())
    out = call(op, inputs)
    for (row, h), value in wanted.items():
        assert same_bits(out[row, h], value), f"row {row} head {h}: expected {value[:4]}, got {out[row, h, :4]}"


def draft_mask(op: str, shape: Shape) -> None:
    """A row sees exactly those draft tokens whose bit is set, of those the causal rule leaves it."""
    if op != "paged_attention_decode":
        return
    batch = _winnable(shape)
    inputs = batch.lay_out(poison=False)
    starts = inputs["cu_seqlens_q"].tolist()
    own = torch.cat([torch.arange(query_len) for query_len, _ in shape.seqs])
    causal = {**inputs, "draft_mask": (torch.ones_like(own) << (own + 1)) - 1}
    before = call(op, causal)
    assert same_bits(call(op, {**inputs, "draft_mask": torch.full_like(own, -1)}), before), (
        "a bit ahead let a row see it"
    )
    alone = {**inputs, "draft_mask": torch.ones_like(own) << own}
    for s, (query_len, seq_len) in enumerate(shape.seqs):
        if query_len < 2:
            continue
        planted = slots(inputs, s, [seq_len - query_len])
        rows = slice(starts[s] + 1, starts[s + 1])
        hidden = call(op, _plant(alone, planted))[rows]
        assert same_bits(hidden, call(op, alone)[rows]), f"sequence {s}: a masked draft token was seen"
        reach = query_len if shape.window is None else min(query_len, shape.window)
        shown = call(op, _plant(causal, planted))[starts[s] : starts[s] + reach]
        assert (shown == WINNER).all(), f"sequence {s}: an unmasked draft token was missed"


def repeated(op: str, shape: Shape) -> None:
    """The same call gives the same bits."""
    inputs = gaussian(shape).lay_out()
    assert same_bits(call(op, inputs), call(op, inputs))


def blocks_permuted(op: str, shape: Shape) -> None:
    """Where blocks lie in the pool changes no bit; what is in them does."""
    batch = gaussian(shape)
    first, second = batch.lay_out(1), batch.lay_out(2, num_spare_blocks=7)
    assert not torch.equal(first["block_table"], second["block_table"])
    out = call(op, first)
    assert same_bits(out, call(op, second)), "the output depends on physical block ids"
    other = batch.clone()
    for values in other.values:
        values += 1
    assert not same_bits(out, call(op, other.lay_out(1)))


EXACT: dict[str, Check] = {
    check.__name__: check
    for check in (
        needle,
        forbidden_future,
        forbidden_foreign,
        counting,
        poison,
        sick_neighbour,
        deep_negative,
        sink_takes_all,
        infinite_sinks,
        soft_cap_saturates,
        sees_nothing,
        padding_untouched,
        quantised_needle,
        draft_mask,
    )
}
EXACT_WINDOW: dict[str, Check] = {check.__name__: check for check in (forbidden_window, poison_before_window)}
INVARIANCE: dict[str, Check] = {check.__name__: check for check in (repeated, blocks_permuted)}
