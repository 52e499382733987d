"""This module holds the RoPE table and the rotation in plain torch. It does not know Triton.

Every frequency rule is evaluated in float32, in the order of operations of the published model code, so that tables
are bit-equal to the ones the checkpoints were trained with.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..common.checks import check_choice

__all__ = ["RopeScaling", "RopeStyle", "build_cos_sin", "inverse_frequencies", "rotate"]

RopeStyle = Literal["neox", "interleaved"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]


def _yarn_ramp(
    theta: float, rotary_dim: int, original_max_position: int, beta_fast: float, beta_slow: float, truncate: bool
) -> Tensor:
    """Return [rotary_dim / 2] in 0..1: 0 keeps a frequency, 1 divides it by the factor."""

    def dimension(num_rotations: float) -> float:
        """Return the (fractional) pair whose wave turns so often within the original context."""
        return (rotary_dim * math.log(original_max_position / (num_rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # the original code's guard against 0 / 0
    return ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def inverse_frequencies(
    *,
    theta: float,
    rotary_dim: int,
    scaling: RopeScaling = "none",
    factor: float = 1.0,
    original_max_position: int = 0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """Return the angle per position of each pair, [rotary_dim / 2] float32, in radians."""
    check_choice("scaling", scaling, ("none", "linear", "llama3", "yarn"))
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and above 0")
    if scaling in ("llama3", "yarn") and original_max_position <= 0:
        raise ValueError(f"{scaling} scaling needs original_max_position above 0; got {original_max_position}")
    wavelength = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim)
    frequency = 1.0 / wavelength
    if scaling == "linear":
        return frequency / factor
    if scaling == "llama3":
        period = 2 * math.pi / frequency
        slow = torch.where(period > original_max_position / low_freq_factor, frequency / factor, frequency)
        blend = (original_max_position / period - low_freq_factor) / (high_freq_factor - low_freq_factor)
        between = (period >= original_max_position / high_freq_factor) & (
            period <= original_max_position / low_freq_factor
        )
        return torch.where(between, (1 - blend) * slow / factor + blend * slow, slow)
    if scaling == "yarn":
        keep = 1 - _yarn_ramp(theta, rotary_dim, original_max_position, beta_fast, beta_slow, truncate)
        return 1.0 / (factor * wavelength) * (1 - keep) + frequency * keep
    return frequency


def build_cos_sin(
    max_position: int,
    *,
    theta: float,
    rotary_dim: int,
    scaling: RopeScaling = "none",
    factor: float = 1.0,
    original_max_position: int = 0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    truncate: bool = True,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Build the table `write_kv` rotates with.

    Sources: RoFormer (https://arxiv.org/abs/2104.09864); yarn, https://arxiv.org/abs/2309.00071; llama3, Llama 3.1.

    Args:
        max_position: rows of the table; positions run from 0 to max_position - 1.
        scaling: linear divides every frequency by factor; llama3 and yarn only the slow ones.
        attention_factor: yarn: what cos and sin are multiplied by; None means 0.1 ln(factor) + 1.

    Returns:
        [max_position, rotary_dim] float32: cos of every pair, then sin of every pair.
    """
    frequency = inverse_frequencies(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling=scaling,
        factor=factor,
        original_max_position=original_max_position,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=truncate,
    )
    angle = torch.arange(max_position, dtype=torch.float32)[:, None] * frequency
    table = torch.cat((angle.cos(), angle.sin()), dim=1)
    if scaling == "yarn":
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        table *= attention_factor
    return table.to(device)


def rotation_factors(rows: Tensor, style: RopeStyle) -> tuple[Tensor, Tensor]:
    """Spread rows of the table to what `rotate` multiplies by.

    Args:
        rows: [num_tokens, rotary_dim], cosines then sines.
        style: neox pairs (i, i + rotary_dim / 2), interleaved pairs (2i, 2i + 1).

    Returns:
        cos, and sin with a minus for the first of each pair, [num_tokens, 1, rotary_dim] each.
    """
    cos, sin = rows[:, None].unflatten(-1, (2, -1)).unbind(2)
    if style == "neox":
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor, style: RopeStyle) -> Tensor:
    """Return x with the first rotary_dim elements of every head rotated.

    The pair (a, b) becomes (a cos - b sin, b cos + a sin): x · cos plus the swapped pairs · (-sin, sin), in three
    operations, as each costs more than its arithmetic where few tokens are rotated.

    Args:
        x: [num_tokens, heads, head_dim], of cos's dtype.
        cos, signed_sin: from `rotation_factors`.
    """
    rotary_dim = cos.shape[-1]
    part = x[..., :rotary_dim]
    swapped = part.roll(rotary_dim // 2, -1) if style == "neox" else part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    rotated = torch.addcmul(part * cos, swapped, signed_sin)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
