"""The interpreter as the tests use it: casts and arithmetic as a GPU does them, and no lane out of bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .calls import INTERPRETER

if not INTERPRETER:
    pytest.skip("these tests are about Triton's interpreter", allow_module_level=True)

from . import kernels_to_interpret as kernels
from .attention_checks import same_bits
from .interpreter import OutOfBoundsError

BFLOAT16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


def every(dtype: torch.dtype) -> Tensor:
    """Return every number of a dtype of 8 or 16 bits that is no NaN."""
    integer = torch.uint8 if dtype.itemsize == 1 else torch.uint16
    x = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32).to(integer).view(dtype)
    return x[~x.float().isnan()]


def near_ties(dtype: torch.dtype) -> Tensor:
    """Return float32 numbers halfway between neighbours of a dtype, and one bit to either side."""
    x = every(dtype).float()
    x = x[x.isfinite()].unique()
    middle = (x[1:].double() + x[:-1].double()).div(2).float()
    infinity = torch.tensor(float("inf"))
    return torch.cat((middle, middle.nextafter(infinity), middle.nextafter(-infinity)))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    kernels.cast[(1,)](x, out, len(x), BLOCK=1 << (len(x) - 1).bit_length())
    return out


@pytest.mark.parametrize("dtype", [BFLOAT16, E4M3, E5M2])
@pytest.mark.parametrize("to", [torch.float32, torch.float64])
def test_widening_is_exact(dtype: torch.dtype, to: torch.dtype) -> None:
    x = every(dtype)
    assert same_bits(cast(x, to), x.to(to))


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if dtype == BFLOAT16 else x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)


@pytest.mark.parametrize("dtype", [BFLOAT16, E4M3, E5M2])
def test_narrowing_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    infinities = torch.tensor([float("inf"), -float("inf")])
    x = torch.cat((near_ties(dtype), every(BFLOAT16).float(), torch.randn(10_000) * 100, infinities))
    assert same_bits(cast(x, dtype), saturated(x, dtype).to(dtype))
    assert cast(torch.tensor([float("nan"), -float("nan")]), dtype).float().isnan().all()


@pytest.mark.parametrize("source", [torch.float16, torch.float64, torch.int32, E4M3])
def test_bfloat16_from_others(source: torch.dtype) -> None:
    x = every(E4M3) if source == E4M3 else (torch.randn(1000) * 1000).to(source)
    assert same_bits(cast(x, BFLOAT16), x.to(BFLOAT16))


def test_truncation_is_still_to_be_had() -> None:
    x, out = torch.tensor([1.0 + 2**-8 + 2**-9]), torch.empty(1, dtype=BFLOAT16)
    kernels.truncate[(1,)](x, out)
    assert out.item() == 1.0


@pytest.mark.parametrize(
    ("kernel", "formula"),
    [
        (kernels.arithmetic, lambda x, y: (x * y + x) * (y - 2.5)),
        (kernels.extremes, lambda x, y: torch.where(x < y, torch.maximum(x, y), torch.full_like(x, 0.5))),
        (kernels.clamped, lambda x, y: torch.minimum(torch.maximum(x, -y.abs()), y.abs())),
        (kernels.negated, lambda x, y: -x + y.abs()),
        (kernels.fused, lambda x, y: (x.double() * y.double() + x.double()).to(x.dtype)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32])
def test_arithmetic(kernel: object, formula: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 4096).to(dtype)
    out = torch.empty_like(x)
    kernel[(1,)](x, y, out, BLOCK=4096)  # type: ignore[index]
    assert same_bits(out, formula(x, y))


@pytest.mark.parametrize("dtype", [BFLOAT16, E4M3, E5M2, torch.float16])
def test_dot(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty(16, 16)
    kernels.dot[(1,)](x, y, out, "tf32")
    assert torch.allclose(out.double(), x.double() @ y.double(), rtol=0, atol=1e-5)


def test_tf32_loses_bits_and_ieee_does_not() -> None:
    x, y = torch.randn(2, 16, 16)
    out, exact = torch.empty(16, 16), x.double() @ y.double()
    kernels.dot[(1,)](x, y, out, "ieee")
    assert (out - exact).abs().max() < 1e-5
    kernels.dot[(1,)](x, y, out, "tf32")
    assert 1e-4 < (out - exact).abs().max() < 2e-2


def test_a_maximum_drops_nan() -> None:
    x, y = torch.tensor([float("nan"), 1.0]), torch.tensor([2.0, float("nan")])
    out = torch.empty(2)
    kernels.extremes[(1,)](y, x, out, BLOCK=2)
    kernels.maximum[(1,)](x, y, out, BLOCK=2)
    assert out.tolist() == [2.0, 1.0]


def test_infinities_and_overflow_raise_no_warning() -> None:
    x = torch.tensor([float("inf"), 3e38])
    out = torch.empty(2)
    kernels.arithmetic[(1,)](x, x, out, BLOCK=2)
    assert out.isinf().all()


@pytest.mark.parametrize("line", ["b_x = tl.load(p_x + o_x)", "tl.store(p_out + o_x, b_x)", "tl.atomic_add(p_sum"])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_lane_out_of_bounds_is_named(line: str, by: int) -> None:
    """One element before or past a view is out of bounds even where its storage goes on."""
    shifts = [by * (line in kernel_line) for kernel_line in kernels.LINES]
    x, out, total = (torch.zeros(10)[1:9] for _ in range(3))
    kernels.shifted[(1,)](x, out, total, 0, 0, 0, BLOCK=8)
    with pytest.raises(OutOfBoundsError, match=r"1 of 8 lanes .*kernels_to_interpret\.py:\d+: ") as caught:
        kernels.shifted[(1,)](x, out, total, *shifts, BLOCK=8)
    assert line in str(caught.value)


def test_a_helper_out_of_bounds_is_named_too() -> None:
    with pytest.raises(OutOfBoundsError, match=r"return tl\.load\(p_x \+ o_x\)"):
        kernels.through_a_helper[(1,)](torch.zeros(7), torch.zeros(8), BLOCK=8)


def test_masked_lanes_may_point_anywhere() -> None:
    x, out = torch.randn(5), torch.full((5,), float("nan"))
    kernels.masked[(1,)](x, out, 5, BLOCK=8)
    assert torch.equal(x, out)


def test_an_offset_of_more_than_31_bits_wraps_where_it_is_computed_in_32() -> None:
    x, out = torch.zeros(4), torch.zeros(4)
    kernels.far[(1,)](x, out, 0, 1 << 20, WIDE=True)
    with pytest.raises(OutOfBoundsError):
        kernels.far[(1,)](x, out, (1 << 12) - 1, 1 << 20, WIDE=False)
