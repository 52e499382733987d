"""This program compiles the toy kernel before and after warm-up and prints what was counted and warned of."""

from __future__ import annotations

import json
import logging

import torch
from octavo.kernels.aot.driver import fake_driver
from octavo.kernels.aot.targets import GPUS
from octavo.kernels.common.compiled import COMPILED
from toy_triton import toy_kernel

messages: list[str] = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger("octavo.kernels").addHandler(handler)
tensor = torch.empty(64, 64, dtype=torch.float16, device="meta")


def warm_up(num_rows: int, row_stride: int) -> None:
    with fake_driver(GPUS["sm_90"]):
        toy_kernel.run(
            tensor, tensor, tensor, num_rows, 64, ROW_STRIDE=row_stride, BLOCK=16, grid=(1,), warmup=True, num_warps=1
        )


COMPILED.watch()
COMPILED.watch()
counts = []
for num_rows, row_stride in ((1, 64), (16, 64), (77, 64)):
    warm_up(num_rows, row_stride)
counts.append((COMPILED.num_kernels, COMPILED.num_late))
COMPILED.mark_warm()
warm_up(5, 64)
counts.append((COMPILED.num_kernels, COMPILED.num_late))
for row_stride in (128, 192):
    warm_up(5, row_stride)
counts.append((COMPILED.num_kernels, COMPILED.num_late))
print(json.dumps({"counts": counts, "messages": messages}))
