# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds the copying of cache blocks as a Triton kernel. It does not know why a block is copied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_index, check_shape, check_side_by_side
from ..common.launch import cdiv, next_power_of_2

__all__ = ["Config", "config", "copy_blocks"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Config:
    """How one call is launched."""

    block: int
    num_warps: int


def config(*, words: int, itemsize: int) -> Config:
    """Return the launch settings of one block's length: 32 bytes per thread."""
    block = min(next_power_of_2(words), 4096 // itemsize)
    return Config(block=block, num_warps=max(block * itemsize // 1024, 1))


@triton.jit(do_not_specialize_on_alignment=["src", "dst"])
def _copy_kernel(
    k_from,
    v_from,
    k_to,
    v_to,
    src,
    dst,
    K_FROM_STRIDE: tl.constexpr,
    V_FROM_STRIDE: tl.constexpr,
    K_TO_STRIDE: tl.constexpr,
    V_TO_STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """to[dst[i]] = from[src[i]] for keys and values; no src: from[i]; no dst: to[i].

    One program handles BLOCK words of copy i. Grid: (num_copies, cdiv(WORDS, BLOCK)).
    """
    i_copy = tl.program_id(0).to(tl.int64)
    i_from, i_to = i_copy, i_copy
    if src is not None:
        i_from = tl.load(src + i_copy).to(tl.int64)
    if dst is not None:
        i_to = tl.load(dst + i_copy).to(tl.int64)
    o_word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_word = o_word < WORDS
    b_k = tl.load(k_from + i_from * K_FROM_STRIDE + o_word, mask=m_word)  # [BLOCK]
    b_v = tl.load(v_from + i_from * V_FROM_STRIDE + o_word, mask=m_word)  # [BLOCK]
    tl.store(k_to + i_to * K_TO_STRIDE + o_word, b_k, mask=m_word)
    tl.store(v_to + i_to * V_TO_STRIDE + o_word, b_v, mask=m_word)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """See `octavo.kernels.copy_blocks`.

    Two launches through scratch, as one block may be read by one copy and written by another: which ones are is known
    on the device only, and programs of one launch run in any order.
    """
    check_shape("dst", dst, tuple(src.shape))
    check_index("src", src)
    check_index("dst", dst)
    check_side_by_side(src=src, dst=dst)
    check_shape("v_cache", v_cache, tuple(k_cache.shape))
    if v_cache.dtype != k_cache.dtype:
        raise ValueError(f"k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}; they must be one dtype")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache[:1].is_contiguous():
            raise ValueError(f"{name} has strides {cache.stride()}; a block must be contiguous")
    num_copies, words = len(src), k_cache[:1].numel()
    if num_copies == 0 or words == 0:
        return
    # As integers: a copy must not change the bits of a NaN.
    k, v = (cache.view(_WORDS[cache.itemsize]) for cache in (k_cache, v_cache))
    scratch = k.new_empty((2, num_copies, words))
    settings = config(words=words, itemsize=k.itemsize)
    rounds = ((k, v, *scratch, src, None), (*scratch, k, v, None, dst))
    for k_from, v_from, k_to, v_to, read, written in rounds:
        _copy_kernel[(num_copies, cdiv(words, settings.block))](
            k_from, v_from, k_to, v_to, read, written, K_FROM_STRIDE=k_from.stride(0), V_FROM_STRIDE=v_from.stride(0),
            K_TO_STRIDE=k_to.stride(0), V_TO_STRIDE=v_to.stride(0), WORDS=words, BLOCK=settings.block,
            num_warps=settings.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
