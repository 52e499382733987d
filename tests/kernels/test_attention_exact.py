"""Attention without a tolerance: which slots are read, and that nothing else is."""

from __future__ import annotations

import pytest
import torch

from .attention_checks import EXACT, EXACT_WINDOW, INVARIANCE
from .paged import Shape

OPS = ("paged_attention_prefill", "paged_attention_decode")
BFLOAT16, FLOAT16, FLOAT64 = torch.bfloat16, torch.float16, torch.float64

PREFILL = [
    Shape(((1, 1), (2, 2), (17, 17), (0, 9), (17, 17), (3, 33))),
    Shape(((16, 16), (15, 31), (33, 48)), num_kv_heads=2, group_size=3, window=16),
    Shape(((5, 40), (40, 40)), num_kv_heads=1, group_size=7, head_dim=80, block_size=5, dtype=BFLOAT16, window=7),
    Shape(((5, 40), (40, 70)), num_kv_heads=1, group_size=7, head_dim=80, block_size=32, dtype=BFLOAT16, window=7),
    Shape(((129, 130), (2, 65)), num_kv_heads=1, group_size=2, block_size=64, dtype=FLOAT16),
    Shape(((7, 21),), num_kv_heads=2, group_size=1, block_size=1, dtype=FLOAT64, window=1),
]
DECODE = [
    Shape(((1, 1), (1, 15), (1, 16), (1, 17), (0, 9), (1, 65))),
    Shape(((1, 33), (1, 32), (1, 20)), num_kv_heads=3, group_size=3, window=16),
    Shape(((3, 40), (16, 16), (1, 7)), num_kv_heads=1, group_size=7, head_dim=80, block_size=5, dtype=BFLOAT16),
    Shape(((3, 70), (16, 16), (1, 7)), num_kv_heads=1, group_size=7, head_dim=80, block_size=32, dtype=BFLOAT16),
    Shape(((2, 64), (2, 65)), num_kv_heads=4, group_size=2, block_size=64, dtype=FLOAT16, window=5),
    Shape(((1, 513), (2, 512)), num_kv_heads=1, group_size=1, block_size=128),
    Shape(((7, 21), (1, 3)), num_kv_heads=2, group_size=1, block_size=1, dtype=FLOAT64, window=1),
]
# Between them: query lengths 1, 2, 3, 17 and on both sides of a tile's rows; lengths on both sides of blocks, tiles and
# splits; every group size and head_dim that a kernel treats differently; every block size.
PREFILL_FULL = [
    Shape(((1, 1025), (65, 1025)), num_kv_heads=1),
    Shape(((16, 256), (15, 127), (33, 129)), num_kv_heads=1, group_size=8, head_dim=128, block_size=32),
    Shape(((33, 300), (31, 130)), head_dim=256, block_size=128, dtype=BFLOAT16, window=100),
    Shape(((1, 1), (2, 2), (3, 63), (17, 64), (1, 65), (127, 128)), group_size=1, dtype=FLOAT16),
    Shape(((31, 129), (32, 127), (33, 128), (1, 15)), group_size=4, head_dim=128, block_size=64, dtype=BFLOAT16),
    Shape(((64, 64), (65, 511)), num_kv_heads=1, group_size=2, head_dim=96, block_size=32, window=65),
    Shape(((15, 512), (16, 513), (17, 17)), num_kv_heads=1, group_size=8, block_size=128, dtype=FLOAT16),
    Shape(((18, 100), (19, 1025)), num_kv_heads=1, group_size=7, head_dim=80, window=1000),
    Shape(((21, 50), (22, 64), (43, 43)), num_kv_heads=2, group_size=3, head_dim=256, block_size=64),
]
DECODE_FULL = [
    Shape(((1, 511), (1, 512), (1, 513), (1, 1024), (1, 1025))),
    Shape(((1, 700), (16, 600)), num_kv_heads=1, group_size=8, head_dim=256, block_size=32, window=513),
    Shape(((1, 300), (4, 129)), num_kv_heads=8, group_size=4, head_dim=128, block_size=128, dtype=BFLOAT16),
    Shape(((1, 63), (2, 128), (1, 64), (3, 129), (16, 127)), group_size=4, head_dim=128, block_size=64, dtype=BFLOAT16),
    Shape(((1, 31), (1, 32), (1, 33), (16, 513)), num_kv_heads=1, group_size=1, head_dim=96, block_size=32),
    Shape(((1, 127), (1, 128), (1, 129)), num_kv_heads=1, group_size=8, block_size=128, dtype=FLOAT16),
    Shape(((2, 1536), (1, 1537)), num_kv_heads=1, group_size=3, head_dim=80),
    Shape(((5, 600), (15, 15)), num_kv_heads=2, group_size=7, head_dim=256, block_size=64, window=100),
]
CASES = [("paged_attention_prefill", shape) for shape in PREFILL]
CASES += [("paged_attention_decode", shape) for shape in DECODE]
FULL = [("paged_attention_prefill", shape) for shape in PREFILL_FULL]
FULL += [("paged_attention_decode", shape) for shape in DECODE_FULL]


def _name(value: object) -> str:
    return value.name if isinstance(value, Shape) else str(value).removeprefix("paged_attention_")


@pytest.mark.parametrize(("op", "shape"), CASES, ids=_name)
@pytest.mark.parametrize("check", [*EXACT, *INVARIANCE])
def test_check(backend: str, check: str, op: str, shape: Shape) -> None:
    (EXACT | INVARIANCE)[check](op, shape)


@pytest.mark.parametrize(("op", "shape"), [case for case in CASES if case[1].window is not None], ids=_name)
@pytest.mark.parametrize("check", EXACT_WINDOW)
def test_window_check(backend: str, check: str, op: str, shape: Shape) -> None:
    EXACT_WINDOW[check](op, shape)


@pytest.mark.full
@pytest.mark.parametrize(("op", "shape"), FULL, ids=_name)
@pytest.mark.parametrize("check", [*EXACT, *INVARIANCE, *EXACT_WINDOW])
def test_long(backend: str, check: str, op: str, shape: Shape) -> None:
    if check in EXACT_WINDOW and shape.window is None:
        return
    (EXACT | INVARIANCE | EXACT_WINDOW)[check](op, shape)
