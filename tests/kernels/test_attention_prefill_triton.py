"""What is special to prefill attention as a Triton kernel: its worklist, its tiles, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.kernels.common.launch import Target
from octavo.kernels.dispatch import use_backend
from octavo.kernels.spec import generator
from torch import Tensor

from . import calls, oracle
from .attention_checks import EXACT, call, same_bits
from .paged import Shape, gaussian
from .rounding import assert_rounding

pytest.importorskip("triton")

from octavo.kernels.attention import cascade_triton, invariant_triton, prefill_triton, worklist_triton

OPS = ("paged_attention_prefill",)
OP = OPS[0]


@pytest.fixture(autouse=True)
def triton() -> Any:
    with use_backend("triton"):
        yield


def _expected(seqs: list[tuple[int, int]], item_tokens: int) -> list[list[int]]:
    """Return the items of (query_len, seq_len) pairs, those that see the most keys first, then by sequence."""
    items = []
    for s, (query_len, seq_len) in enumerate(seqs):
        for i, start in enumerate(range(0, query_len, item_tokens)):
            items.append((-(seq_len - query_len + min(start + item_tokens, query_len)), s, i))
    return [[s, i] for _, s, i in sorted(items)]


@pytest.mark.parametrize("block", [2, 8, 128])
def test_worklist_is_the_longest_first(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worklist_triton, "_BLOCK", block)
    draw = generator("worklist", block)
    for num_seqs in (1, 3, 9):
        present = torch.randint(0, 2, (num_seqs,), generator=draw)
        query_lens = torch.randint(0, 14, (num_seqs,), generator=draw) * present
        seq_lens = query_lens + torch.randint(0, 9, (num_seqs,), generator=draw)
        cu_seqlens_q = torch.cat((torch.zeros(1, dtype=torch.long), query_lens.cumsum(0))).int()
        found = worklist_triton.list_work(
            cu_seqlens_q.to(calls.device()),
            seq_lens.int().to(calls.device()),
            num_tokens=int(cu_seqlens_q[-1]) + 5,  # padded rows
            item_tokens=3,
        ).items
        expected = _expected(list(zip(query_lens.tolist(), seq_lens.tolist(), strict=True)), 3)
        assert found[: len(expected)].tolist() == expected
        assert (found[len(expected) :] == -1).all()


SHAPE = Shape(((40, 41), (0, 9), (3, 33), (1, 1)), group_size=7, num_kv_heads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_plan_serves_every_layer_and_its_order_no_bit(dtype: torch.dtype) -> None:
    inputs = gaussian(replace(SHAPE, dtype=dtype)).lay_out()
    plan = worklist_triton.plan_prefill(
        inputs["cu_seqlens_q"].to(calls.device()),
        inputs["seq_lens"].to(calls.device()),
        num_tokens=100,
        num_q_heads=SHAPE.num_q_heads,
        num_kv_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
    )
    assert (plan.items[:, 0] >= 0).sum() == 5
    turned = replace(plan, items=plan.items.flip(0).contiguous())
    for layer in ({}, {"window": 20, "soft_cap": 3.0}):
        alone = call(OP, {**inputs, **layer})
        assert same_bits(call(OP, {**inputs, **layer, "worklist": plan}), alone)
        assert same_bits(call(OP, {**inputs, **layer, "worklist": turned}), alone)


@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_may_be_cut_anywhere(window: int | None) -> None:
    """Tiles of keys start at multiples of their size, whatever the chunk: the same bits."""
    length = 41
    whole = gaussian(Shape(((length, length),), num_kv_heads=1, window=window))
    expected = call(OP, whole.lay_out())
    for size in (7, 17, 40):
        for start in range(0, length, size):
            end = min(start + size, length)
            chunk = replace(
                whole,
                shape=replace(whole.shape, seqs=((end - start, end),)),
                q=whole.q[start:end],
                keys=[whole.keys[0][:end]],
                values=[whole.values[0][:end]],
            )
            assert same_bits(call(OP, chunk.lay_out(start)), expected[start:end])


def test_heads_beyond_a_tile_are_split() -> None:
    """37 heads share a KV head, where a tile has 32 rows: two tiles of 19 heads, of which the last has 18."""
    shape = Shape(((2, 9),), num_kv_heads=2, group_size=37)
    settings = prefill_triton.config(
        head_dim=64, group_size=37, dtype=torch.float32, plain=True, target=Target(90, num_sms=1, shared_bytes=232_448)
    )
    assert (settings.block_m, settings.heads, settings.block_q) == (32, 19, 1)
    EXACT["needle"](OP, shape)
    inputs = gaussian(shape).lay_out()
    plain = [oracle.plain_attention(inputs, torch.float32)[0]]
    assert_rounding("attention", call(OP, inputs), oracle.attention(inputs)[0], plain)


def test_rows_may_lie_apart() -> None:
    """q is a slice of a fused projection and out one of something wider: the same bits, and nothing beside them."""
    inputs = gaussian(SHAPE).lay_out()
    q = inputs["q"]
    alone = call(OP, inputs)
    fused = torch.full((len(q), 3 * q[0].numel()), float("nan"))
    wide = fused.clone()

    def middle(x: Tensor) -> Tensor:
        return x[:, q[0].numel() : 2 * q[0].numel()].view(q.shape)

    middle(fused).copy_(q)
    calls.paged_attention_prefill(**{**inputs, "q": middle(fused)}, out=middle(wide))
    assert same_bits(middle(wide), alone)
    assert wide.isnan().sum() == 2 * q.numel()


def test_no_tokens() -> None:
    inputs = gaussian(Shape(((0, 9),))).lay_out()
    assert call(OP, inputs).shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "q is torch.float64"),
        ({"block_size": 48}, "block_size is 48; the triton backend takes 16, 32, 64, 128"),
        ({"head_dim": 264}, "head_dim is 264"),
    ],
)
def test_what_it_does_not_take_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(OP, gaussian(Shape(((2, 3),), **change)).lay_out())


def test_other_caches_scales_and_strides_are_named() -> None:
    inputs = gaussian(Shape(((2, 3),))).lay_out()
    half = {name: inputs[name].half() for name in ("k_cache", "v_cache")}
    with pytest.raises(
        ValueError, match=r"k_cache is torch\.float16; the triton backend takes a cache of q's dtype, int8"
    ):
        call(OP, {**inputs, **half})
    with pytest.raises(ValueError, match="scale is -1"):
        call(OP, {**inputs, "scale": -1.0})
    with pytest.raises(ValueError, match="q has strides"):
        call(OP, {**inputs, "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)})


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("group_size", [1, 3, 4, 7, 8, 71, 200])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_settings_cover_every_work_item(head_dim: int, group_size: int, arch: int) -> None:
    item_tokens = worklist_triton.tokens_per_item(head_dim, group_size)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for plain in (True, False):
            settings = prefill_triton.config(
                head_dim=head_dim, group_size=group_size, dtype=dtype, plain=plain, target=Target(arch, 132, 166_912)
            )
            assert 1 <= settings.block_q <= item_tokens
            assert settings.heads * settings.block_q <= settings.block_m
            assert min(settings.block_m, settings.block_n) >= 16, "the least a matrix product takes"


@pytest.mark.parametrize("arch", [86, 89, 120])
@pytest.mark.parametrize("plain", [True, False])
def test_tiles_fit_into_little_shared_memory(arch: int, plain: bool) -> None:
    """Of 256 elements 101,376 bytes hold 64 queries and two tiles of 32 keys, not four; of 128 they hold all."""
    small, large = Target(arch, 128, 101_376), Target(arch, 128, 232_448)

    def found(head_dim: int, target: Target, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
        settings = prefill_triton.config(head_dim=head_dim, group_size=4, dtype=dtype, plain=plain, target=target)
        return settings.block_n, settings.num_stages

    assert found(128, small) == found(128, large)
    assert found(256, small, torch.float32) == found(256, large, torch.float32)
    assert found(256, small) == ((32, 2) if plain or arch == 120 else (16, 3))
    assert found(256, large)[1] == 3


def test_exact_products_of_wide_heads_fit_into_little_shared_memory() -> None:
    """64 queries of 256 float32 elements leave no room for a second tile."""
    for shared_bytes, num_stages in ((101_376, 1), (166_912, 2)):
        target = Target(89, 128, shared_bytes)
        invariant = invariant_triton.config(head_dim=256, dtype=torch.float32, draft=False, target=target)
        cascade = cascade_triton.config(head_dim=256, dtype=torch.float32, target=target)
        assert (invariant.block_n, cascade.block_n) == (16, 16), "bits depend on the tile"
        assert (invariant.num_stages, cascade.num_stages) == (num_stages, num_stages)
