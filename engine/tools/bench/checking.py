"""This module compares what an op computes with the float64 reference on the same inputs. It does not know time."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import octavo.kernels
import torch
from octavo.kernels import use_backend
from octavo.kernels.bounds import UNIT, bound
from octavo.kernels.spec import Case, OpSpec
from torch import Tensor

from . import WrongResultError

__all__ = ["ATTENTION", "KernelCase", "check"]

ATTENTION: Final = ("paged_attention_prefill", "paged_attention_decode")
NUM_ROWS: Final = 8
"""Query rows of a sequence compared at its beginning, in its middle and at its end: all of them, in float64, would take
longer than what is timed."""
ROWS_AT_ONCE: Final = 64


class KernelCase(NamedTuple):
    """One case of one op."""

    spec: OpSpec
    case: Case

    @property
    def name(self) -> str:
        """The op's name and the case's."""
        return f"{self.spec.name}/{self.case.name}"


def check(one: KernelCase, inputs: dict[str, Any]) -> float:
    """Run a case on the backend in force and compare; return the largest error in units of its bound's u.

    Args:
        one: the case.
        inputs: its arguments; unchanged.

    Raises:
        WrongResultError: something is further off than `octavo.kernels.bounds` allows.
    """
    try:
        return _check_attention(one, inputs) if one.spec.name in ATTENTION else _check_whole(one, inputs)
    except WrongResultError as error:
        raise WrongResultError(f"{one.name}: {error}") from None


def _check_whole(one: KernelCase, inputs: dict[str, Any]) -> float:
    ours = _results(one.spec, {name: _copy(value) for name, value in inputs.items()})
    if (residual := inputs.get("residual")) is not None:
        # The sum is rounded before it is normalised: it is what both begin with.
        inputs = inputs | {"x": residual + inputs["x"], "residual": torch.zeros_like(residual)}
    with use_backend("torch"):
        exact = _results(one.spec, {name: _exact(one.spec, name, value) for name, value in inputs.items()})
    return max((_error(name, ours[name], exact[name], one) for name in exact), default=0.0)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _exact(spec: OpSpec, name: str, value: Any) -> Any:
    """Return an argument as the float64 reference takes it: wider where its dtype is the case's."""
    is_float = isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > 1
    return value.double() if is_float and spec.inputs[name].dtype in ("float", "cache") else _copy(value)


def _results(spec: OpSpec, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Return the results of an op, and what it wrote into its arguments."""
    result = getattr(octavo.kernels, spec.name)(**arguments)
    results = result if isinstance(result, tuple) else (result,)
    found = {f"result {i}": x for i, x in enumerate(results) if isinstance(x, Tensor)}
    written = [name for name, tensor in spec.inputs.items() if tensor.written]
    tensors = {name: arguments[name] for name in written if isinstance(arguments.get(name), Tensor)}
    # One number in the place of a tensor of scales is read only.
    return found | {name: x for name, x in tensors.items() if x.dim()}


def _error(name: str, ours: Tensor, exact: Tensor, one: KernelCase) -> float:
    """Return by how many u a result is off; NaN means never written, and is to be where it is."""
    if not ours.numel():
        return 0.0
    if ours.itemsize == 1 or not ours.is_floating_point():
        # What is quantised may fall on either side of a half.
        steps = 1 if ours.dtype in (torch.int8, torch.float8_e4m3fn) else 0
        if num_wrong := int(((_codes(ours) - _codes(exact)).abs() > steps).sum()):
            raise WrongResultError(f"{name} differs from the reference at {num_wrong} places")
        return 0.0
    is_absolute, worst = one.spec.bounds == "log_softmax", 0.0
    # Some rows at a time: a pool of blocks is large, and differs in little.
    for mine, right in zip(ours.split(ROWS_AT_ONCE), exact.split(ROWS_AT_ONCE), strict=True):
        if not torch.equal(mine.isnan(), right.isnan()):
            raise WrongResultError(f"{name} is not written where it should be, or the reverse")
        difference, size = ((mine - right).nan_to_num(0.0).abs(), right.nan_to_num(0.0).abs())
        worst = max(worst, float(difference.max()) if is_absolute else _row_error(difference, size))
    dtype = "float32" if is_absolute else one.case.dtype
    return _held(name, worst / UNIT[dtype], bound(one.spec.bounds, dtype).row_max)


def _codes(x: Tensor) -> Tensor:
    """Return integers; of float8 those that count its numbers upwards."""
    if not x.is_floating_point():
        return x.long()
    raw = x.view(torch.uint8).long()
    return torch.where(raw < 128, raw, 128 - raw)


def _row_error(difference: Tensor, size: Tensor) -> float:
    """Return the largest error of a row over its largest element."""
    largest = size.amax(-1)
    return float((difference.amax(-1) / torch.where(largest > 0, largest, 1.0)).max())


def _held(name: str, units: float, limit: float) -> float:
    if not units <= limit:
        raise WrongResultError(f"{name} is off by {units:.2f} u; allowed: {limit:.2f} u")
    return units


def _check_attention(one: KernelCase, inputs: dict[str, Any]) -> float:
    """Compare some rows of the first, the last and the longest sequence."""
    out = torch.full_like(inputs["q"], float("nan"))
    getattr(octavo.kernels, one.spec.name)(**inputs, out=out)
    seqs, dtype, worst = one.case["seqs"], one.case.dtype, 0.0
    if bool(out.isnan().any()):
        raise WrongResultError("the output has NaN")
    starts = inputs["cu_seqlens_q"].tolist()
    for s in sorted({0, max(range(len(seqs)), key=lambda s: seqs[s][1]), len(seqs) - 1}):
        query_len, seq_len = seqs[s]
        num = min(NUM_ROWS, query_len)
        for row in sorted({0, (query_len - num) // 2, query_len - num}):
            rows = slice(starts[s] + row, starts[s] + row + num)
            end = seq_len - query_len + row + num
            exact = _reference(one, inputs, s, rows, end, torch.float64)
            limit, factor = bound("attention", dtype), 1.0
            if limit.yardstick:
                plain = _reference(one, inputs, s, rows, end, one.case.torch_dtype).double()
                factor = max(1.0, _row_error((plain - exact).abs(), exact.abs()) / UNIT[dtype])
            units = _row_error((out[rows].double() - exact).abs(), exact.abs()) / UNIT[dtype]
            worst = max(worst, _held(f"sequence {s} from row {row}", units, limit.row_max * factor))
    return worst


def _reference(one: KernelCase, inputs: dict[str, Any], s: int, rows: slice, end: int, dtype: torch.dtype) -> Tensor:
    """Attend again from some rows of one sequence over its first `end` keys, in plain torch."""
    device, block_size = inputs["q"].device, inputs["k_cache"].shape[2]
    own = inputs["block_table"][s, : -(-end // block_size)].long()
    arguments: dict[str, Any] = {
        name: inputs[name] for name in ("scale", "window", "soft_cap", "sinks") if name in inputs
    }
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if (x := inputs.get(name)) is not None:
            taken = x if x.dim() == 0 else x.view(torch.uint8)[own].view(x.dtype) if x.itemsize == 1 else x[own]
            arguments[name] = taken if x.itemsize == 1 else taken.to(dtype if "cache" in name else x.dtype)
    with use_backend("torch"):
        result: Tensor = octavo.kernels.paged_attention_prefill(
            q=inputs["q"][rows].to(dtype),
            cu_seqlens_q=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32, device=device),
            seq_lens=torch.tensor([end], dtype=torch.int32, device=device),
            block_table=torch.arange(len(own), dtype=torch.int32, device=device)[None],
            **arguments,
        )
    return result
