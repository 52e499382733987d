"""How checks reach an op on another device: strides, aliases, writes in place and identities survive the trip."""

from __future__ import annotations

import octavo.kernels
import pytest
import torch
from octavo.kernels.sampling import SampleOutput

from . import calls
from .calls import call_elsewhere


def test_an_op_by_name() -> None:
    x = torch.ones(1, 4)
    assert torch.equal(calls.rms_norm(x, torch.ones(4), eps=0.0), x)
    with pytest.raises(AttributeError):
        calls.no_such_op  # noqa: B018


def test_views_keep_strides_and_aliases() -> None:
    qkv = torch.arange(24.0).view(4, 6)
    q, k = qkv[:, :2], qkv[:, 2:4]
    seen = {}

    def function(q: torch.Tensor, *, k: torch.Tensor) -> torch.Tensor:
        seen.update(stride=q.stride(), shared=k.data_ptr() - q.data_ptr(), elsewhere=q.data_ptr() != qkv.data_ptr())
        q += 100
        return q + k

    before = qkv.clone()
    result = call_elsewhere(function, torch.Tensor.clone, (q,), {"k": k})
    assert seen == {"stride": (6, 1), "shared": 2 * 4, "elsewhere": True}
    assert torch.equal(q, before[:, :2] + 100)
    assert torch.equal(qkv[:, 2:], before[:, 2:])
    assert torch.equal(result, q + k)


def test_what_was_given_comes_back_itself() -> None:
    out = SampleOutput(torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))

    def function(out: SampleOutput) -> SampleOutput:
        out.token_ids.fill_(7)
        return out

    result = call_elsewhere(function, torch.Tensor.clone, (out,), {})
    assert result.token_ids is out.token_ids
    assert result.failed is out.failed
    assert out.token_ids.tolist() == [7, 7, 7]


def test_every_op_may_be_called() -> None:
    for op in octavo.kernels.dispatch.OPS:
        assert callable(getattr(calls, op))
