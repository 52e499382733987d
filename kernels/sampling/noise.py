"""This module holds the sampler's random numbers, a hash of what they belong to. It does not know logits.

The generator is defined by 32-bit unsigned arithmetic, so every backend draws the same bits. With fmix the finaliser
of MurmurHash3 (Appleby, https://github.com/aappleby/smhasher) a row has two keys, each absorbing seed (low word, high
word), choice and position by h = fmix(h ^ word), and its token `id` draws

    h = id·GOLDEN + key0;  h ^= h >> 16;  h = h·MIX1 + key1;  h ^= h >> 13;  h = h·MIX2;  h ^= h >> 16
    u = ((h >> 8) | 1) / 2²⁴                      Gumbel noise: −log(−log u), from −2.8 to 16.6
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

__all__ = ["minus_gumbel", "row_keys", "token_codes", "uniform"]

KEY_STARTS: Final = (0x243F6A88, 0x85A308D3)
GOLDEN: Final = 0x9E3779B1
MIX1: Final = 0x85EBCA6B
MIX2: Final = 0xC2B2AE35


def _signed(word: int) -> int:
    """Return the int32 that has the bits of a 32-bit word: torch has no arithmetic on uint32."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _xor_shift_(h: Tensor, bits: int, spare: Tensor) -> None:
    """Set h to h ^ (h >> bits), shifting in zeros; `spare` is overwritten."""
    torch.bitwise_right_shift(h, bits, out=spare)
    spare.bitwise_and_((1 << (32 - bits)) - 1)
    h.bitwise_xor_(spare)


def row_keys(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """Return the two keys of each row.

    Args:
        seed: [n] int64, all 64 bits count.
        choice: [n] integer, 32 bits count, as of position.
        position: [n] integer.

    Returns:
        [2, n, 1] int32.
    """
    words = torch.stack((seed, seed >> 32, choice.to(torch.int64), position.to(torch.int64))).to(torch.int32)
    h = torch.tensor([_signed(start) for start in KEY_STARTS], dtype=torch.int32, device=seed.device)
    h = h[:, None].repeat(1, len(seed))
    spare = torch.empty_like(h)
    for word in words:
        h.bitwise_xor_(word)
        _xor_shift_(h, 16, spare)
        h.mul_(_signed(MIX1))
        _xor_shift_(h, 13, spare)
        h.mul_(_signed(MIX2))
        _xor_shift_(h, 16, spare)
    return h.unsqueeze(-1)


@functools.lru_cache(maxsize=4)
def token_codes(vocab_size: int, device: torch.device) -> Tensor:
    """Return id·GOLDEN of every token: [vocab_size] int32, shared, never to be written."""
    return torch.arange(vocab_size, dtype=torch.int32, device=device).mul_(_signed(GOLDEN))


def uniform(keys: Tensor, codes: Tensor) -> Tensor:
    """Return odd multiples of 2⁻²⁴ between 0 and 1.

    Args:
        keys: [2, n, 1] int32 of `row_keys`.
        codes: [m] or [n, m] int32, id·GOLDEN.

    Returns:
        [n, m] float32.
    """
    h = codes + keys[0]
    spare = torch.empty_like(h)
    _xor_shift_(h, 16, spare)
    h.mul_(_signed(MIX1)).add_(keys[1])
    _xor_shift_(h, 13, spare)
    h.mul_(_signed(MIX2))
    _xor_shift_(h, 16, spare)
    # The upper 23 bits as the fraction of a float in [1, 2): an integer conversion is ten times slower on a CPU.
    torch.bitwise_right_shift(h, 9, out=spare)
    spare.bitwise_and_(0x7FFFFF).bitwise_or_(0x3F800000)
    return spare.view(torch.float32).sub_(1.0 - 2.0**-24)


def minus_gumbel(keys: Tensor, codes: Tensor) -> Tensor:
    """Return log(−log u), the noise with its sign changed, of each row and token: [n, m] float32."""
    return uniform(keys, codes).log_().neg_().log_()
