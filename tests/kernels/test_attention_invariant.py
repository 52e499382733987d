"""A row of an invariant plan has the same bits by either op, in any chunk, batch and order, on the Triton backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.kernels.attention import SPLIT_TOKENS
from octavo.kernels.common.launch import Target
from octavo.kernels.dispatch import use_backend
from octavo.kernels.spec import load_specs
from torch import Tensor

from . import calls
from .allocation import poisoned_allocations
from .attention_checks import EXACT, call, same_bits
from .attention_rounding import check_rounding
from .backends import takes
from .paged import Batch, Shape, gaussian
from .planned import plans

pytest.importorskip("triton")

from octavo.kernels.attention import invariant_triton

PREFILL, DECODE = OPS = ("paged_attention_prefill", "paged_attention_decode")
MAX_DECODE = 16
HALF, FLOAT = torch.float16, torch.float32
DTYPES = [FLOAT, HALF, pytest.param(torch.bfloat16, marks=pytest.mark.full)]


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend("triton"), poisoned_allocations():
        yield


def attend(op: str, batch: Batch, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """Return out and lse of a batch by an invariant plan, its blocks laid out by `seed`."""
    with plans(invariant=True, repeat=False):
        out, lse = calls.call(op, **batch.lay_out(seed), **options, return_lse=True)
    assert not out.isnan().any(), "NaN is equal to NaN"
    return out, lse


def cut(whole: Batch, pieces: Sequence[tuple[int, int]]) -> Batch:
    """Return pieces (start, end) of the one sequence that `whole` is a prompt of, as sequences of a batch."""
    seqs = tuple((end - start, end) for start, end in pieces)
    first = whole.shape.seqs[0][1] - whole.shape.seqs[0][0]
    q = torch.cat([whole.q[start - first : end - first] for start, end in pieces])
    ends = [end for _, end in pieces]
    keys, values = ([x[0][:end] for end in ends] for x in (whole.keys, whole.values))
    return Batch(replace(whole.shape, seqs=seqs), q, keys, values)


def assert_pieces(whole: Batch, expected: tuple[Tensor, Tensor], pieces: list[tuple[int, int]], **options: Any) -> None:
    """Assert that pieces, together in one batch and by decode where they are short enough, have the prompt's bits."""
    first = whole.shape.seqs[0][1] - whole.shape.seqs[0][0]
    rows = torch.cat([torch.arange(start, end) for start, end in pieces]) - first
    op = DECODE if all(end - start <= MAX_DECODE for start, end in pieces) else PREFILL
    for found, bits in zip(attend(op, cut(whole, pieces), 1, **options), expected, strict=True):
        wrong = [int(row) + first for i, row in enumerate(rows) if not same_bits(found[i], bits[row])]
        assert not wrong, f"{op}: positions {wrong} have other bits than in the prompt"


def chunks(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("group_size", [1, 3, pytest.param(8, marks=pytest.mark.full)])
def test_a_prompt_cut_anywhere_keeps_its_bits(
    dtype: torch.dtype, window: int | None, group_size: int, count: Callable[[int, int], int]
) -> None:
    length = 132
    shape = Shape(((length, length),), num_kv_heads=1, group_size=group_size, dtype=dtype, window=window)
    whole = gaussian(shape)
    expected = attend(PREFILL, whole)
    for size in (17, 64, 65)[: count(2, 3)]:
        assert_pieces(whole, expected, chunks(length, size))
    assert_pieces(whole, expected, [(e, e + 1) for e in (0, 1, 62, 63, 64, 65, 127, 128, 131)])
    assert_pieces(whole, expected, [(50, 66), (116, 132)])


# The last rows of prompts that end behind a border between splits; with a window some of these rows see nothing of a
# split that others in their tile see.
ENDS = [(520, None), (1034, None), (1034, 520), (1034, 30)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "window"), ENDS)
def test_splits_keep_their_bits(dtype: torch.dtype, length: int, window: int | None) -> None:
    first = length - 14
    shape = Shape(((14, length),), num_kv_heads=1, group_size=4, block_size=64, dtype=dtype, window=window)
    whole = gaussian(shape)
    expected = attend(PREFILL, whole)
    border = length // 512 * 512
    pieces = [(first, border), (border - 1, border), (border, border + 1), (border + 1, length - 1)]
    assert_pieces(whole, expected, pieces)
    assert_pieces(whole, expected, [(length - 1, length)])


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "step"), [(HALF, 1), (FLOAT, 11)])
def test_every_position(dtype: torch.dtype, step: int) -> None:
    length = 1030
    whole = gaussian(Shape(((length, length),), num_kv_heads=1, group_size=1, block_size=64, dtype=dtype))
    expected = attend(PREFILL, whole)
    for start in range(0, length, 103):
        assert_pieces(whole, expected, [(e, e + 1) for e in range(start, start + 103, step)])


FEATURES: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": torch.tensor([-1.0, 3.0, 0.5])},
    "soft cap": {"soft_cap": 2.0},
    "all": {"sinks": torch.tensor([-1.0, 3.0, 0.5]), "soft_cap": 2.0},
}


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize(
    "feature", ["all", *(pytest.param(name, marks=pytest.mark.full) for name in ("sinks", "soft cap"))]
)
def test_features_keep_their_bits(feature: str, dtype: torch.dtype) -> None:
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in FEATURES[feature].items()}
    whole = gaussian(Shape(((20, 520),), num_kv_heads=1, group_size=3, head_dim=80, dtype=dtype, window=509))
    expected = attend(PREFILL, whole, **options)
    assert_pieces(whole, expected, [(500, 511), (511, 512), (512, 520)], **options)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_a_verified_draft_keeps_its_bits(dtype: torch.dtype) -> None:
    """A chain's rows are those of a prompt; a branch's row is that of a prompt without the other branch's tokens."""
    whole = gaussian(Shape(((6, 70),), num_kv_heads=1, group_size=3, dtype=dtype))
    expected = attend(PREFILL, whole)
    chain = (torch.ones(6, dtype=torch.int64) << torch.arange(1, 7)) - 1
    verified = attend(DECODE, whole, 1, draft_mask=chain)
    assert all(same_bits(a, b) for a, b in zip(verified, expected, strict=True))

    pair = cut(whole, [(64, 70), (66, 70)])
    masks = torch.cat((chain & ~2 | 1 << torch.arange(6), chain[:4]))  # the first sequence's rows do not see token 1
    out, _ = attend(DECODE, pair, 2, draft_mask=masks)
    assert same_bits(out[6:], expected[0][2:]), "a neighbour's draft mask changed a row's bits"
    assert same_bits(out[:2], expected[0][:2])
    assert not any(same_bits(a, b) for a, b in zip(out[2:6], expected[0][2:], strict=True))


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_batch_and_order_change_no_bit(dtype: torch.dtype) -> None:
    """Beside padding of a captured batch, too; what lies beside the rows of `out` stays."""
    seqs = ((3, 70), (0, 9), (1, 530), (1, 0), (16, 16), (1, 1))
    batch = gaussian(Shape(seqs, num_kv_heads=2, group_size=2, dtype=dtype))
    together = attend(DECODE, batch)
    assert (together[0][4] == 0).all()
    assert (together[1][4] == float("-inf")).all()
    by_prefill = attend(PREFILL, batch, 1)
    assert all(same_bits(a, b) for a, b in zip(by_prefill, together, strict=True))

    starts = torch.tensor([0, *(query_len for query_len, _ in seqs)]).cumsum(0).tolist()
    order = [5, 4, 2, 0]
    rows = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in order])
    shape = replace(batch.shape, seqs=tuple(seqs[s] for s in order))
    moved = Batch(shape, batch.q[rows], [batch.keys[s] for s in order], [batch.values[s] for s in order])
    wide = torch.full((len(rows), 7, 64), 7.0, dtype=dtype)
    out, lse = attend(DECODE, moved, 2, out=wide[:, :4])
    assert same_bits(out, together[0][rows])
    assert same_bits(lse, together[1][rows])
    assert (wide[:, 4:] == 7).all()


def test_the_plan_is_of_one_geometry() -> None:
    batch = gaussian(Shape(((1, 5),), num_kv_heads=1, group_size=3))
    inputs = batch.lay_out()
    on_device = [inputs[name].to(calls.device()) for name in ("cu_seqlens_q", "seq_lens")]
    plan = invariant_triton.plan_invariant(*on_device, num_tokens=1, group_size=8)
    for op, name in ((PREFILL, "worklist"), (DECODE, "plan")):
        with pytest.raises(AssertionError, match="another model's"):
            call(op, inputs, **{name: plan})


def test_a_quantised_cache_is_named() -> None:
    inputs = gaussian(Shape(((1, 5),))).lay_out()
    scales = torch.ones(inputs["k_cache"].shape[:3])
    inputs |= {"k_cache": inputs["k_cache"].to(torch.int8), "v_cache": inputs["v_cache"].to(torch.int8)}
    for op in OPS:
        with plans(invariant=True), pytest.raises(ValueError, match=r"k_cache is torch\.int8; .* a cache of q's dtype"):
            call(op, {**inputs, "k_scale": scales, "v_scale": scales})


@pytest.mark.parametrize("op", OPS)
def test_a_group_of_more_heads_than_rows(op: str) -> None:
    """71 heads are two tiles of 36, whose last row is idle."""
    with plans(invariant=True, repeat=False):
        EXACT["needle"](op, Shape(((3, 5), (1, 2)), num_kv_heads=1, group_size=71, head_dim=16))


def test_settings_depend_on_the_geometry_alone() -> None:
    for arch in (80, 90, 100):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for head_dim in (64, 80, 128, 256):
                one, other = (
                    invariant_triton.config(
                        head_dim=head_dim, dtype=dtype, draft=draft, target=Target(arch, num_sms, 166_912)
                    )
                    for draft, num_sms in ((True, 1), (False, 132))
                )
                assert (one.block_n, one.num_warps) == (other.block_n, other.num_warps)
                assert SPLIT_TOKENS % one.block_n == 0, "a tile must not reach into the next split"


@pytest.mark.parametrize("what", ["split", "tile", "value"])
def test_the_measure_would_notice(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: another size of splits, another tile or another value of one key gives other bits."""
    batch = gaussian(Shape(((2, 600),), num_kv_heads=1, group_size=2, dtype=FLOAT))
    expected, _ = attend(DECODE, batch)
    settings = invariant_triton.config(head_dim=64, dtype=FLOAT, draft=False, target=Target(90, 132, 232_448))
    if what == "split":
        monkeypatch.setattr(invariant_triton, "SPLIT_TOKENS", 256)
    elif what == "tile":
        other = replace(settings, block_n=settings.block_n // 2)
        monkeypatch.setattr(invariant_triton, "config", lambda **_: other)
    else:
        batch.keys[0][3] += 1e-3
    assert not same_bits(attend(DECODE, batch)[0], expected)


SMALL = ("ragged", "ragged-fp16", "spotlight", "window-one", "everything", "head-dim-80", "draft-window", "long-chunk")
CASES = [
    pytest.param(op, case, id=f"{op[16:]}-{case.name}", marks=[] if case.name in SMALL else pytest.mark.full)
    for op in OPS
    for case in load_specs()[op].cases
    if case.tier != "bench" and case.get("cache") is None and takes("triton", (case,))
]


@pytest.mark.parametrize(("op", "case"), CASES)
def test_rounding(op: str, case: Any) -> None:
    with plans(invariant=True, repeat=False):
        check_rounding(load_specs()[op], case, 0)
