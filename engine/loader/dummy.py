"""This module holds random weights of any decoder's shape. It does not know checkpoints."""

from __future__ import annotations

import hashlib
import math

import torch

from ..config import ModelConfig

__all__ = ["fill_dummy"]


def fill_dummy(config: ModelConfig, name: str, tensor: torch.Tensor, seed: int) -> None:
    """Fill one parameter in place, on its own device, with noise of a scale that keeps logits near 1.

    The values depend on the seed, the name, the shape, the dtype and the kind of device, and on nothing else. Norm
    weights lie around 1, biases around 0, both with some noise so that forgetting one shows.

    Args:
        config: the decoder's shape.
        name: the parameter's name in `weight_shapes`.
        tensor: any shape, floating point; overwritten.
        seed: any integer.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=tensor.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    module, _, kind = name.rpartition(".")
    part = module.rpartition(".")[2]
    if part.endswith("norm") and kind == "weight":
        mean, deviation = 1.0, 0.1
    elif kind == "bias":
        mean, deviation = 0.0, 0.05
    else:
        # Rows of unit length map a normed vector to values near 1; the two matrices that add to the residual stream
        # are smaller, so that the sum over all layers is near 1 too.
        mean, deviation = 0.0, 1.0 / math.sqrt(tensor.shape[1])
        if part in ("o", "down"):
            deviation /= math.sqrt(2 * config.num_layers)
    with torch.no_grad():
        tensor.normal_(mean, deviation, generator=generator)
