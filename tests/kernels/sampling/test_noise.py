"""The random numbers: bit for bit those of the definition, and independent enough of each part of the key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from octavo.kernels.sampling import noise

from .. import calls
from . import oracle

SEEDS = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 0x0123456789ABCDEF]


def test_bits() -> None:
    rows = [(seed, choice, position) for seed in SEEDS for choice in (0, 1, 127) for position in (0, 5, 2**20)]
    seed, choice, position = torch.tensor(rows).T
    keys = noise.row_keys(seed, choice, position)
    u = noise.uniform(keys, noise.token_codes(41, torch.device("cpu")))
    for at, row in enumerate(rows):
        key = oracle.keys(*row)
        assert [int(half) & oracle.MASK for half in keys[:, at, 0]] == key
        assert (u[at].double() * 2**24).tolist() == [oracle.uniform_numerator(key, i) for i in range(41)]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_kernels_draw_the_same_bits(backend: str) -> None:
    from .noise_kernel import store_uniform

    rows = [(seed, choice, position) for seed in SEEDS for choice in (0, 127) for position in (5, 2**40 + 3)]
    seed, choice, position = torch.tensor(rows).T.contiguous()
    u = torch.empty(len(rows), 64, device=calls.device())
    store_uniform[(len(rows),)](u, *(x.to(u.device) for x in (seed, choice.int(), position)), BLOCK=64)
    codes = (torch.arange(64) * 65_537 * noise.GOLDEN).to(torch.int32)
    assert torch.equal(u.cpu(), noise.uniform(noise.row_keys(seed, choice, position), codes))


def test_noise_is_minus_log_minus_log_u() -> None:
    keys = noise.row_keys(torch.arange(8), torch.zeros(8), torch.zeros(8))
    codes = noise.token_codes(5000, torch.device("cpu"))
    u = noise.uniform(keys, codes).double()
    assert 0.0 < u.min() < u.max() < 1.0
    assert torch.allclose(noise.minus_gumbel(keys, codes).double(), (-u.log()).log(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("part", ["seed", "seed's high word", "choice", "position", "token"])
def test_neighbouring_keys_are_unrelated(part: str) -> None:
    """Flipping any one bit of the key flips each bit of u half of the time."""
    generator = torch.Generator().manual_seed(7)
    num = 4096
    seed, choice, position = (torch.randint(2**31, (num,), generator=generator) for _ in range(3))
    codes = torch.randint(2**31, (num, 1), generator=generator)

    def upper_bits(seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
        golden = (ids * noise.GOLDEN).to(torch.int32)
        u = noise.uniform(noise.row_keys(seed, choice, position), golden)
        return (u.double() * 2**24).to(torch.int64).numpy()[:, 0]

    base = upper_bits(seed, choice, position, codes)
    for bit in (0, 1, 9, 17, 25, 30):
        flip = 1 << bit
        changed = {
            "seed": (seed ^ flip, choice, position, codes),
            "seed's high word": (seed ^ (flip << 32), choice, position, codes),
            "choice": (seed, choice ^ flip, position, codes),
            "position": (seed, choice, position ^ flip, codes),
            "token": (seed, choice, position, codes ^ flip),
        }[part]
        difference = base ^ upper_bits(*changed)
        flipped = [(difference >> at & 1).mean() for at in range(1, 24)]
        assert 0.44 < min(flipped) <= max(flipped) < 0.56, f"bit {bit}"


def test_token_codes_are_shared_and_right() -> None:
    codes = noise.token_codes(1000, torch.device("cpu"))
    assert codes is noise.token_codes(1000, torch.device("cpu"))
    assert [int(code) & oracle.MASK for code in codes[:50]] == [i * 0x9E3779B1 & oracle.MASK for i in range(50)]
