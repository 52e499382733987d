"""This module holds the activations in plain torch. It does not know Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ..common.checks import check_choice, check_float, check_out

__all__ = ["gated_activation", "ungated_activation"]

_KINDS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def gated_activation(x: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """See `octavo.kernels.gated_activation`."""
    check_float("x", x)
    check_choice("kind", kind, tuple(_KINDS))
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [num_tokens, 2 * intermediate_size]")
    size = x.shape[1] // 2
    check_out(out, (x.shape[0], size), x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = _KINDS[kind](wide[:, :size])
    if wide.dtype == x.dtype:
        return torch.mul(y, wide[:, size:], out=y if out is None else out)
    y = y.mul_(wide[:, size:])
    return y.to(x.dtype) if out is None else out.copy_(y)


def ungated_activation(x: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """See `octavo.kernels.ungated_activation`."""
    check_float("x", x)
    check_choice("kind", kind, tuple(_KINDS))
    check_out(out, x.shape, x)
    y = _KINDS[kind](x.to(torch.promote_types(x.dtype, torch.float32)))
    return y.to(x.dtype) if out is None else out.copy_(y)
