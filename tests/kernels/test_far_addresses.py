"""Elements past 2**31 of a cache are read and written where they are, not where 32 bits would put them."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from . import calls
from .attention_checks import call, same_bits
from .paged import Shape, gaussian

OPS = ("paged_attention_prefill", "paged_attention_decode", "write_kv", "copy_blocks")
BLOCK_SIZE, HEAD_DIM = 128, 128
FAR = (1 << 31) // (BLOCK_SIZE * HEAD_DIM) + 5


def _vast_cache(num_blocks: int = FAR + 2) -> Tensor:
    """Return [num_blocks, 1, BLOCK_SIZE, HEAD_DIM] float16 zeros; only pages that are written take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, num_blocks * BLOCK_SIZE * HEAD_DIM * 2, flags=flags)
    return torch.frombuffer(memory, dtype=torch.float16).view(num_blocks, 1, BLOCK_SIZE, HEAD_DIM)


@pytest.mark.parametrize("op", OPS[:2])
def test_attention(backend: str, op: str) -> None:
    shape = Shape(((1, 100),), 1, 1, HEAD_DIM, BLOCK_SIZE, torch.float16)
    near = gaussian(shape).lay_out(poison=False)
    home = int(near["block_table"][0, 0])
    far = {**near, "block_table": torch.full_like(near["block_table"], FAR)}
    for name in ("k_cache", "v_cache"):
        far[name] = _vast_cache()
        far[name][FAR] = near[name][home]
    assert same_bits(call(op, far), call(op, near))


def test_write_kv(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 1, HEAD_DIM).to(torch.float16)
    k_cache, v_cache = _vast_cache(), _vast_cache()
    positions = torch.zeros(1, dtype=torch.int64)
    calls.write_kv(q, k, v, k_cache, v_cache, torch.tensor([FAR * BLOCK_SIZE + 7]), positions=positions)
    assert same_bits(k_cache[FAR, 0, 7], k[0, 0])
    assert same_bits(v_cache[FAR, 0, 7], v[0, 0])


def test_copy_blocks(backend: str) -> None:
    k_cache, v_cache = _vast_cache(), _vast_cache()
    k_cache[FAR], v_cache[FAR] = 1.0, 2.0
    calls.copy_blocks(k_cache, v_cache, torch.tensor([FAR]), torch.tensor([FAR + 1]))
    assert bool((k_cache[FAR + 1] == 1).all())
    assert bool((v_cache[FAR + 1] == 2).all())
