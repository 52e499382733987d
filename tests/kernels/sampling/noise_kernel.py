# ruff: noqa: N803 (compile-time constants are in capitals)
"""This module holds a kernel that stores the sampler's random numbers. It does not know what they should be."""

from __future__ import annotations

import triton
import triton.language as tl
from octavo.kernels.sampling.noise import KEY_STARTS
from octavo.kernels.sampling.rank_triton import row_key, uniform

_KEY0, _KEY1 = map(tl.constexpr, KEY_STARTS)


@triton.jit
def store_uniform(p_u, p_seed, p_choice, p_position, BLOCK: tl.constexpr):
    i_row = tl.program_id(0)
    o_id = tl.arange(0, BLOCK)
    key0 = row_key(p_seed, p_choice, p_position, i_row, _KEY0)
    key1 = row_key(p_seed, p_choice, p_position, i_row, _KEY1)
    tl.store(p_u + i_row * BLOCK + o_id, uniform(key0, key1, o_id * 65_537))
