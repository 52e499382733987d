"""This module holds the comparison that comes before any time: ours against the reference on the case's own inputs. It
does not know what is timed.

Attention is compared on some rows of some sequences, with float64; everything else as a whole.
"""

from __future__ import annotations

from typing import Any, Final

import octavo.kernels
import torch
from octavo.kernels import use_backend
from octavo.kernels.bounds import UNIT, bound
from torch import Tensor

from .cases import ATTENTION, Bench

__all__ = ["check", "check_attention", "same_result"]

ROWS: Final = 8
"""Query rows compared at the beginning, in the middle and at the end of a sequence."""
LIMIT_LOGPROB: Final = 2e-6
"""Between two results of which each may be off by 1e-6."""


def _pieces(seqs: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Return (sequence, its first row, number of rows, position after the last of them) of what is compared."""
    longest = max(range(len(seqs)), key=lambda s: seqs[s][1])
    found = []
    for s in sorted({0, longest, len(seqs) - 1}):
        query_len, seq_len = seqs[s]
        num_rows = min(ROWS, query_len)
        for row in sorted({0, (query_len - num_rows) // 2, query_len - num_rows}):
            found.append((s, row, num_rows, seq_len - query_len + row + num_rows))
    return found


def check_attention(bench: Bench, inputs: dict[str, Any], out: Tensor) -> float:
    """Assert that some rows are within their bound of the reference in float64; return the largest error in u."""
    seqs = list(bench.case["seqs"])
    starts = torch.tensor([0] + [query_len for query_len, _ in seqs]).cumsum(0).tolist()
    block_size, worst = bench.case["block_size"], 0.0
    assert not bool(out.isnan().any()), "the output has NaN"
    for s, row, num_rows, end in _pieces(seqs):
        own = inputs["block_table"][s, : -(-end // block_size)].long()
        rows = slice(starts[s] + row, starts[s] + row + num_rows)
        piece = {
            "q": inputs["q"][rows].double(),
            "k_cache": inputs["k_cache"][own].double(),
            "v_cache": inputs["v_cache"][own].double(),
            "cu_seqlens_q": torch.tensor([0, num_rows], dtype=torch.int32, device=out.device),
            "seq_lens": torch.tensor([end], dtype=torch.int32, device=out.device),
            "block_table": torch.arange(len(own), dtype=torch.int32, device=out.device)[None],
        }
        options = {name: inputs[name] for name in ("scale", "window", "soft_cap") if name in inputs}
        with use_backend("torch"):
            exact: Tensor = octavo.kernels.paged_attention_prefill(**piece, **options)
        difference = (out[rows].double() - exact).abs().amax(-1)
        worst = max(worst, float((difference / exact.abs().amax(-1)).max()) / UNIT[bench.case.dtype])
    limit = bound("attention", bench.case.dtype).row_max
    assert worst <= limit, f"off by {worst:.2f} u of at most {limit} u"
    return worst


def same_result(name: str, ours: Tensor, reference: Tensor, limit_u: float | None) -> float:
    """Assert that two results of one precision agree; return how far they are apart, in u of their dtype.

    Whole numbers may differ by nothing (int8, which is quantised from a product, by one); NaN means never written.

    Args:
        limit_u: of a row's largest error over its largest element; None: these are log-probabilities.
    """
    assert ours.shape == reference.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
    if not ours.is_floating_point():
        apart = int((ours.long() - reference.long()).abs().max()) if ours.numel() else 0
        assert apart <= (1 if ours.dtype == torch.int8 else 0), f"{name}: differs, by up to {apart}"
        return 0.0
    theirs, ours = reference.double(), ours.double()
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: not written where it should be, or the reverse"
    ours, theirs = ours.nan_to_num(0.0), theirs.nan_to_num(0.0)
    if limit_u is None:
        apart_by = float((ours - theirs).abs().max())
        assert apart_by <= LIMIT_LOGPROB, f"{name}: off by {apart_by:.3g}"
        return apart_by / UNIT["float32"]
    size = theirs.abs().amax(-1)
    rows = (ours - theirs).abs().amax(-1) / torch.where(size > 0, size, 1.0)
    units = float(rows.max()) / UNIT[str(reference.dtype)[6:]] if rows.numel() else 0.0
    assert units <= limit_u, f"{name}: off by {units:.2f} u of at most {limit_u} u"
    return units


def _results(bench: Bench, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Run the op on copies; return its results and what it wrote."""
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    result = getattr(octavo.kernels, bench.spec.name)(**copies)
    tensors = result if isinstance(result, tuple) else () if result is None else (result,)
    found = {f"result {i}": x for i, x in enumerate(tensors) if isinstance(x, Tensor)}
    written = [name for name, tensor in bench.spec.inputs.items() if tensor.written]
    return found | {name: copies[name] for name in written if isinstance(copies.get(name), Tensor)}


def check(bench: Bench, inputs: dict[str, Any]) -> float:
    """Assert that the backend in force computes this case right; return the largest error in u."""
    if bench.spec.name in ATTENTION:
        out = torch.full_like(inputs["q"], float("nan"))
        getattr(octavo.kernels, bench.spec.name)(**inputs, out=out)
        return check_attention(bench, inputs, out)
    ours = _results(bench, inputs)
    with use_backend("torch"):
        reference = _results(bench, inputs)
    # Both round: each may be off by the bound, in its own direction.
    dtype = bench.case.dtype
    limit = None if bench.spec.bounds == "log_softmax" else 2 * bound(bench.spec.bounds, dtype).row_max
    return max((same_result(name, ours[name], reference[name], limit) for name in reference), default=0.0)
