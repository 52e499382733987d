"""This module holds the weights detector: what a projection or a norm computes with, read back and compared bit by bit.
It does not know files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...layers.linear import Linear
from ...models.decoder import Decoder
from .reference import Parameters

__all__ = ["WrongWeight", "unpacked", "wrong_weights"]

CHUNK_ROWS = 512


class WrongWeight(NamedTuple):
    """A parameter that is not the reference's."""

    name: str
    """As in "layers.7.down"."""
    message: str


def unpacked(linear: Linear, num_inputs: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a projection's weight [out, in], whatever its layout: its products with unit vectors are exact."""
    bias, linear.bias = linear.bias, None
    tap, linear.tap = linear.tap, None
    try:
        units = torch.eye(num_inputs, dtype=dtype, device=device)
        return torch.cat([linear(rows) for rows in units.split(CHUNK_ROWS)]).T
    finally:
        linear.bias, linear.tap = bias, tap


@torch.inference_mode()
def wrong_weights(decoder: Decoder, parameters: Parameters) -> Iterator[WrongWeight]:
    """Yield what differs from the reference's parameters, rounded to the decoder's dtype, first to last.

    The embedding is not among them: it is the first hidden state.
    """
    for name, module in decoder.modules():
        expected = parameters.weight(name)
        if isinstance(module, Linear):
            found = unpacked(module, expected.shape[1], decoder.dtype, decoder.device)
        else:
            found = module.weight
        yield from _differences(name, "weight", found, expected)
        bias = parameters.bias(name)
        if (bias is None) != (module.bias is None):
            yield WrongWeight(name, f"has {'no' if module.bias is None else 'a'} bias, unlike the reference")
        elif bias is not None and module.bias is not None:
            yield from _differences(name, "bias", module.bias, bias)


def _differences(name: str, what: str, found: torch.Tensor, expected: torch.Tensor) -> Iterator[WrongWeight]:
    expected = expected.to(found.device, found.dtype)
    if found.shape != expected.shape:
        yield WrongWeight(name, f"{what} is {list(found.shape)}, the reference's {list(expected.shape)}")
    elif not torch.equal(found, expected):
        wrong = (found != expected).nonzero()
        at = tuple(wrong[0].tolist())
        yield WrongWeight(
            name,
            f"{what} {list(at)} is {float(found[at]):.6g}, and {float(expected[at]):.6g} in the reference; "
            f"{len(wrong):,} of {found.numel():,} differ",
        )
