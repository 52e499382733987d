"""This module holds what the ops that write the KV cache must satisfy, as functions. It does not know the backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
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


CASES = [case for case in SPECS["write_kv"].cases if case.tier != "bench"]
COPY_CASES = SPECS["copy_blocks"].cases
CHECKS = (
    ("exact: rotation neox", partial(rotation_is_exact_at_zero, "neox")),
    ("exact: rotation interleaved", partial(rotation_is_exact_at_zero, "interleaved")),
    ("exact: padding", padding_writes_nothing),
    ("exact: every slot", every_slot_is_reached),
    *((f"rounding: {case.name}", partial(writes_what_it_should, case)) for case in CASES),
)
COPY_CHECKS = tuple((f"exact: {case.name}", partial(copies_blocks, case)) for case in COPY_CASES)
