"""This module holds the normalisation in front of attention, MLP and head. It does not know which of them follows."""

from __future__ import annotations

import torch
from octavo.kernels import layer_norm, rms_norm

__all__ = ["Norm"]


class Norm:
    """RMSNorm, or LayerNorm where there is a bias.

    Args:
        weight: [H].
        bias: [H] for LayerNorm, None for RMSNorm.
        eps: added to the mean square or the variance.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise x [T, H]; with `residual`, first add x to it in place and normalise the sum."""
        if self.bias is None:
            return rms_norm(x, self.weight, eps=self.eps, residual=residual)
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)
