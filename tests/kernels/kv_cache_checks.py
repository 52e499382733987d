"""This module holds what the ops that write the KV cache must satisfy, as functions. It does not know the backend."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from octavo.kernels.kv_cache.reference import quantise_e4m3, quantise_int8
from octavo.kernels.spec import Case, generator, load_specs
from torch import Tensor

from . import calls, oracle
from .attention_checks import same_bits
from .rounding import assert_rounding
from .seeds import case_inputs

SPECS = load_specs()


def _copies(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def writes_what_it_should(case: Case, seed: int = 0) -> None:
    """Every written slot and q are the oracle's within one rounding; everything else keeps its bits."""
    inputs = case_inputs(SPECS["write_kv"], case, seed)
    before = _copies(inputs)
    calls.write_kv(**inputs)

    def prepared(heads: Tensor, norm: Tensor | None) -> Tensor:
        table = before.get("cos_sin")
        return oracle.prepare(heads, norm, before.get("eps", 0), table, before["positions"], before["rope_style"])

    if len(before["q"]):
        assert_rounding("elementwise", inputs["q"], prepared(before["q"], before.get("q_norm")))
    for name in ("k", "v", "slot_mapping", "positions"):
        assert same_bits(inputs[name], before[name]), f"{name} was changed"

    k = prepared(before["k"], before.get("k_norm"))
    block_size = before["k_cache"].shape[2]
    written = torch.zeros(before["k_cache"].shape[0] * block_size, dtype=torch.bool)
    for t, slot in enumerate(before["slot_mapping"].tolist()):
        if slot < 0:
            continue
        written[slot] = True
        for name, exact in (("k", k[t]), ("v", before["v"][t].double())):
            _check_slot(inputs, name, slot // block_size, slot % block_size, exact, before["q"].dtype)
    untouched = ~written.view(-1, block_size)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        x, old = inputs.get(name), before.get(name)
        if x is None or x.dim() == 0:
            continue
        left = untouched[:, None].expand(x.shape[:3])
        assert same_bits(x[left], old[left]), f"{name}: a slot that no token maps to was written"


def _check_slot(inputs: dict[str, Any], name: str, block: int, offset: int, exact: Tensor, dtype: torch.dtype) -> None:
    """Compare one slot [num_kv_heads, head_dim] with what should have been stored."""
    stored, scale = inputs[f"{name}_cache"][block, :, offset], inputs.get(f"{name}_scale")
    plain = name == "v" or ("cos_sin" not in inputs and "k_norm" not in inputs)
    if stored.dtype == torch.int8:
        found = scale[block, :, offset].double()
        # Half a step of the quantiser, and the roundings of what it was given.
        slack = found[:, None] * 0.5 + exact.abs().amax(-1, keepdim=True) * (0.0 if plain else 2.0**-8)
        assert bool(((stored.double() * found[:, None] - exact).abs() <= slack * 1.0001).all()), f"{name}: int8 value"
        reach = (found * 127 / exact.abs().amax(-1) - 1).abs().max()
        assert reach <= (1e-6 if plain else 2.0**-7), f"{name}: the int8 scale is not amax / 127"
    elif stored.dtype == torch.float8_e4m3fn:
        back = stored.double() * float(scale)
        # e4m3 has 3 mantissa bits: half a step is 1/16 of a normal number, 2**-10 of the scale below the normals.
        limit = torch.maximum(exact.abs() / 16, torch.tensor(2.0**-10 * float(scale), dtype=torch.float64))
        inside = exact.abs() <= 448 * float(scale)
        assert bool(((back - exact).abs() <= limit * 1.001)[inside].all()), f"{name}: e4m3 value"
        assert bool((back.abs() == torch.tensor(448.0).double() * float(scale))[~inside].all()), f"{name}: e4m3 clamp"
    elif plain:
        assert same_bits(stored, exact.to(dtype)), f"{name}: a copy must be exact"
    else:
        assert_rounding("elementwise", stored[None], exact[None])


def rotation_is_exact_at_zero(style: str) -> None:
    """Position 0 rotates by nothing, and a quarter turn swaps each pair, bit by bit."""
    head_dim, block_size = 8, 4
    quarter = torch.zeros(2, head_dim)
    quarter[0, : head_dim // 2] = 1  # cos 1, sin 0
    quarter[1, head_dim // 2 :] = 1  # cos 0, sin 1
    q = torch.arange(1.0, 1 + 2 * head_dim).view(2, 1, head_dim)
    k, v = q + 100, q + 200
    first, second = q.clone(), k.clone()
    k_cache = torch.full((2, 1, block_size, head_dim), float("nan"))
    v_cache = k_cache.clone()
    calls.write_kv(
        q,
        k,
        v,
        k_cache,
        v_cache,
        torch.tensor([6, 1]),
        positions=torch.tensor([0, 1]),
        cos_sin=quarter,
        rope_style=style,  # type: ignore[arg-type]
    )
    pairs = [(i, i + 4) for i in range(4)] if style == "neox" else [(2 * i, 2 * i + 1) for i in range(4)]
    for before, after in ((first, q), (second, torch.stack((k_cache[1, :, 2], k_cache[0, :, 1])))):
        assert torch.equal(after[0], before[0]), "position 0 must not rotate"
        for a, b in pairs:
            assert after[1, 0, a] == -before[1, 0, b], f"a quarter turn must put -x[{b}] at {a}"
            assert after[1, 0, b] == before[1, 0, a], f"a quarter turn must put x[{a}] at {b}"
    assert torch.equal(v_cache[1, :, 2], v[0]), "values are copied"
    assert torch.equal(v_cache[0, :, 1], v[1]), "values are copied"


def padding_writes_nothing() -> None:
    """Slot -1 leaves both caches as they are, the last slot of the last block too."""
    shape = (3, 2, 4, 8)
    k_cache, v_cache = torch.zeros(shape), torch.zeros(shape)
    x = torch.ones(2, 2, 8)
    calls.write_kv(x.clone(), x, x, k_cache, v_cache, torch.tensor([-1, 5]), positions=torch.tensor([0, 1]))
    k_cache[1, :, 1] -= 1
    v_cache[1, :, 1] -= 1
    assert not k_cache.any(), "slot -1 wrote a key"
    assert not v_cache.any(), "slot -1 wrote a value"


def every_slot_is_reached() -> None:
    """Every slot of a cache is reached: writing them all in random order leaves each token in its own."""
    num_blocks, block_size = 5, 3
    slots = torch.randperm(num_blocks * block_size, generator=generator("slots"))
    k = torch.arange(1.0, 16.0).view(15, 1, 1) * torch.tensor([1.0, 100.0]).view(1, 2, 1) * torch.ones(1, 1, 2)
    k_cache, v_cache = torch.zeros(num_blocks, 2, block_size, 2), torch.zeros(num_blocks, 2, block_size, 2)
    calls.write_kv(k.clone(), k, -k, k_cache, v_cache, slots, positions=torch.zeros(15, dtype=torch.int64))
    for t, slot in enumerate(slots.tolist()):
        assert torch.equal(k_cache[slot // block_size, :, slot % block_size], k[t]), f"token {t} is not in slot {slot}"
        assert torch.equal(v_cache[slot // block_size, :, slot % block_size], -k[t]), f"token {t} is not in slot {slot}"


def _e4m3_edges() -> Tensor:
    """Return every e4m3 number, the halves between neighbours, their own neighbours, and what lies outside."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    edges = torch.cat((codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([449.0, 464.0, 480.0, 1e9, 1e38, 1e-38])))
    infinity = torch.tensor(float("inf"))
    edges = torch.cat((edges, torch.nextafter(edges, infinity), torch.nextafter(edges, -infinity), infinity[None]))
    return torch.cat((edges, -edges, torch.tensor([float("nan")])))


def _int8_edges() -> Tensor:
    """Return rows of 64: halves between steps, zeros, the smallest and the largest numbers."""
    halves = torch.arange(-63.5, 64.0, 2.0)
    halves[0] = 127.0  # so that one step is one
    return torch.stack(
        (halves, halves.roll(3) + 0.5, torch.zeros(64), -halves * 1.4 * 2.0**-149, halves * 2e36, halves / 3)
    )


def quantises_exactly(kind: str, dtype: torch.dtype) -> None:
    """What a quantised cache holds is, bit by bit, the reference's quantiser of the same numbers."""
    rows = _int8_edges() if kind == "int8" else _e4m3_edges()
    rows = rows.clamp(-60_000, 60_000).to(dtype) if dtype == torch.float16 else rows.to(dtype)
    rows = torch.cat((rows.flatten(), rows.new_zeros(-rows.numel() % 128))).view(-1, 2, 64)
    if kind == "int8":
        rows = torch.cat((rows, rows.flip(-1), torch.randn(3, 2, 64, generator=generator(kind)).to(dtype)))
    num_tokens = len(rows)
    num_blocks = num_tokens // 16 + 1
    values = rows.roll(1, 0)
    caches = [torch.zeros(num_blocks, 2, 16, 64, dtype=torch.int8) for _ in "kv"]
    scales: Any = [torch.full((num_blocks, 2, 16), float("nan")) for _ in "kv"]
    if kind == "e4m3":
        caches, scales = [cache.view(torch.float8_e4m3fn) for cache in caches], [1.0, 0.3]
    calls.write_kv(
        rows.clone(),
        rows,
        values,
        *caches,
        torch.arange(num_tokens),
        positions=torch.zeros(num_tokens, dtype=torch.int64),
        k_scale=scales[0],
        v_scale=scales[1],
    )
    for name, x, cache, scale in zip(("k", "v"), (rows, values), caches, scales, strict=True):
        stored = cache.transpose(1, 2).reshape(-1, 2, 64)[:num_tokens]
        if kind == "int8":
            expected, expected_scale = quantise_int8(x)
            found = scale.transpose(1, 2).reshape(-1, 2)[:num_tokens]
            assert same_bits(found, expected_scale), f"{name}: an int8 scale is not amax / 127"
        else:
            expected = quantise_e4m3(x, scale)
        both_nan = stored.float().isnan() & expected.float().isnan()  # of either sign
        wrong = ((stored.view(torch.int8) != expected.view(torch.int8)) & ~both_nan).nonzero()
        assert not len(wrong), f"{name}: {x[tuple(wrong[0])]} is stored as {stored[tuple(wrong[0])]}"


def int8_shows_nan() -> None:
    """int8 has no NaN: a head that holds one gets a scale of NaN, and its neighbours do not."""
    x = torch.ones(1, 3, 64)
    x[0, 1, 40] = float("nan")
    caches, scales = torch.zeros(2, 2, 3, 16, 64, dtype=torch.int8), torch.zeros(2, 2, 3, 16)
    slot, position = torch.tensor([17], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    calls.write_kv(x.clone(), x, x, *caches, slot, positions=position, k_scale=scales[0], v_scale=scales[1])
    assert scales[:, 1, :, 1].isnan().tolist() == [[False, True, False]] * 2, "a NaN is lost, or spreads"


def quantises_what_it_rotated(kind: str) -> None:
    """A key is rounded to its dtype before it is quantised: as the query beside it, which was the same."""
    spec = SPECS["write_kv"]
    inputs = case_inputs(spec, spec.case(f"{kind}-bf16" if kind == "int8" else kind), 0)
    inputs["q"], inputs["q_norm"] = inputs["k"].clone(), inputs.get("k_norm")
    calls.write_kv(**inputs)
    expected = quantise_int8(inputs["q"])[0] if kind == "int8" else quantise_e4m3(inputs["q"], inputs["k_scale"])
    for t, slot in enumerate(inputs["slot_mapping"].tolist()):
        if slot >= 0:
            found = inputs["k_cache"][slot // 5, :, slot % 5]
            assert same_bits(found, expected[t]), f"token {t} is not what its query was rotated to"


def views_of_one_projection(style: str) -> None:
    """q, k and v may be parts of a wider tensor, in any order: same bits, and nothing else in it changes."""
    spec = SPECS["write_kv"]
    case = spec.case("norm" if style == "neox" else "interleaved")
    plain, views = (case_inputs(spec, case, 0) for _ in range(2))
    num_tokens, num_heads, head_dim = plain["q"].shape
    wide = torch.full((num_tokens, 3 * num_heads, head_dim + 8), 7.0)
    for name, first in (("v", 1), ("q", 2), ("k", 2 * num_heads + 1)):
        view = wide[:, first : first + 2 * plain[name].shape[1] : 2, :head_dim]  # every second head
        view[:] = plain[name]
        views[name] = view
    before = wide.clone()
    calls.write_kv(**plain)
    calls.write_kv(**views)
    for name in ("q", "k_cache", "v_cache"):
        assert same_bits(views[name], plain[name]), f"{name} depends on strides"
    views["q"].copy_(before[:, 2 : 2 + 2 * num_heads : 2, :head_dim])
    assert same_bits(wide, before), "something beside q was changed"


def caches_of_another_dtype() -> None:
    """A value is rounded to q's dtype, then to the cache's."""
    for dtype, stored in (
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ):
        x = torch.randn(3, 2, 64, generator=generator("cast")).to(dtype)
        caches = [torch.zeros(2, 2, 16, 64, dtype=stored) for _ in "kv"]
        calls.write_kv(x.clone(), x, -x, *caches, torch.tensor([5, 17, 31]), positions=torch.tensor([0, 1, 2]))
        for i, slot in enumerate((5, 17, 31)):
            assert same_bits(caches[0][slot // 16, :, slot % 16], x[i].to(stored)), f"{dtype} in a {stored} cache"
            assert same_bits(caches[1][slot // 16, :, slot % 16], -x[i].to(stored)), f"{dtype} in a {stored} cache"


def writes_beyond_31_bits() -> None:
    """A slot whose first element lies past 2**31 is written where it is, and a token's row read from where it is."""
    far = (1 << 31) // (128 * 128) + 5
    # numpy's zeros come from calloc: only pages that are touched are ever backed by memory.
    caches = [torch.from_numpy(np.zeros((far + 1, 1, 128, 128), dtype=np.int8)) for _ in "kv"]
    scales = [torch.from_numpy(np.zeros((far + 1, 1, 128), dtype=np.float32)) for _ in "kv"]
    stride = (1 << 30) + 8
    rows = torch.from_numpy(np.zeros(2 * stride + 3 * 128, dtype=np.float16)).as_strided((3, 3, 128), (stride, 128, 1))
    rows.copy_(torch.randn(3, 3, 128, generator=generator("far")))
    q, k, v = rows.split(1, dim=1)
    position, table = torch.tensor([0, 1, 1]), torch.cat((torch.ones(2, 64), torch.zeros(2, 64)), 1)
    slots, kept = torch.tensor([far * 128 + 3, -1, far * 128 + 127]), rows.clone()
    calls.write_kv(q, k, v, *caches, slots, positions=position, cos_sin=table, k_scale=scales[0], v_scale=scales[1])
    assert same_bits(rows.contiguous(), kept), "a turn by nothing is not exact"
    for x, cache, scale in zip((k, v), caches, scales, strict=True):
        values, steps = quantise_int8(x[[0, 2], 0])
        assert same_bits(cache[far, 0, [3, 127]], values), "a slot past 2**31 was not written"
        assert same_bits(scale[far, 0, [3, 127]], steps), "its scale was not written"
        assert not cache[:5, 0].any(), "a write wrapped around"


def copies_blocks(case: Case, seed: int = 0) -> None:
    """Every destination holds its source as it was before the call; every other block keeps its bits."""
    inputs = case_inputs(SPECS["copy_blocks"], case, seed)
    before = _copies(inputs)
    calls.copy_blocks(**inputs)
    copied = dict(zip(inputs["dst"].tolist(), inputs["src"].tolist(), strict=True))
    for name in ("k_cache", "v_cache"):
        for block, x in enumerate(inputs[name]):
            source = copied.get(block, block)
            assert same_bits(x, before[name][source]), f"{name}: block {block} is not what block {source} was"


def copies_every_bit() -> None:
    """A cycle of blocks changes places, and no bit of a NaN changes."""
    bits = torch.randint(-(2**15), 2**15, (5, 2, 3, 7), generator=generator("bits"), dtype=torch.int16)
    k_cache, v_cache = bits.clone().view(torch.bfloat16), bits.flip(0).clone().view(torch.bfloat16)
    calls.copy_blocks(k_cache, v_cache, torch.tensor([4, 1, 2, 3]), torch.tensor([1, 2, 4, 3], dtype=torch.int32))
    assert torch.equal(k_cache.view(torch.int16), bits[[0, 4, 1, 3, 2]]), "keys are not what they were elsewhere"
    assert torch.equal(v_cache.view(torch.int16), bits.flip(0)[[0, 4, 1, 3, 2]]), "values are not"


def copies_beyond_31_bits() -> None:
    """Blocks may lie further apart than they are long, past 2**31 elements from the first."""
    shape, stride = (3, 2, 4, 800), (1 << 30) + 16
    k_cache, v_cache = (
        torch.from_numpy(np.zeros(3 * stride, dtype=np.uint8)).as_strided(shape, (stride, 3200, 800, 1)) for _ in "kv"
    )
    k_cache[0], k_cache[2], v_cache[0], v_cache[2] = 3, 4, 5, 6
    calls.copy_blocks(k_cache, v_cache, torch.tensor([2, 0]), torch.tensor([0, 2]))
    for cache, first, last in ((k_cache, 4, 3), (v_cache, 6, 5)):
        assert bool((cache[0] == first).all()), "a block past 2**31 was not read"
        assert bool((cache[2] == last).all()), "a block past 2**31 was not written"


_SPEC_CASES: Final = [case for case in SPECS["write_kv"].cases if case.tier != "bench"]


def _wider(case: Case) -> Case:
    """Return a case with blocks of 16 and more heads than one program handles."""
    heads = {"num_kv_heads": 9, "group_size": 1} if case.dtype == "float16" else {}
    return replace(case, name=f"{case.name}-16", values={**case.values, **heads, "block_size": 16})


def _changed(name: str, to: str, **values: Any) -> Case:
    case = SPECS["write_kv"].case(name)
    return replace(case, name=to, values={**case.values, "block_size": 16, **values})


CASES = [
    *_SPEC_CASES,
    *(_wider(case) for case in _SPEC_CASES if case.dtype != "float64" and case["num_tokens"]),
    _changed("norm", "norm-96", head_dim=96, rotary_dim=96),  # halves that are no power of two
    _changed("int8", "int8-partial", rotary_dim=24),
]
COPY_CASES = SPECS["copy_blocks"].cases
QUANTISED: Final = [
    (kind, dtype) for kind in ("int8", "e4m3") for dtype in (torch.float32, torch.float16, torch.bfloat16)
]
CHECKS = (
    ("exact: rotation neox", partial(rotation_is_exact_at_zero, "neox")),
    ("exact: rotation interleaved", partial(rotation_is_exact_at_zero, "interleaved")),
    ("exact: padding", padding_writes_nothing),
    ("exact: every slot", every_slot_is_reached),
    ("exact: views", partial(views_of_one_projection, "neox")),
    ("exact: views, interleaved", partial(views_of_one_projection, "interleaved")),
    ("exact: cast", caches_of_another_dtype),
    *((f"rounding: {case.name}", partial(writes_what_it_should, case)) for case in CASES),
    *((f"exact: {kind} {dtype}", partial(quantises_exactly, kind, dtype)) for kind, dtype in QUANTISED),
    *((f"exact: {kind} rotated", partial(quantises_what_it_rotated, kind)) for kind in ("int8", "e4m3")),
    ("exact: int8 NaN", int8_shows_nan),
    ("exact: beyond 31 bits", writes_beyond_31_bits),
)
COPY_CHECKS = (
    *((f"exact: {case.name}", partial(copies_blocks, case)) for case in COPY_CASES),
    ("exact: every bit", copies_every_bit),
    ("exact: beyond 31 bits", copies_beyond_31_bits),
)
