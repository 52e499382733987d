"""This program warms three kernels up twice for a GPU that is not there, compiling for real, and prints what happened.

It has no `if __name__ == "__main__"`, as many a user's has not: nothing may run it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from typing import Any
from unittest import mock

import torch
from octavo.kernels.aot import warm
from octavo.kernels.aot.calls import Settings
from octavo.kernels.aot.driver import Launch, fake_driver
from octavo.kernels.aot.keys import list_variants
from octavo.kernels.aot.targets import GPUS, MODELS
from octavo.kernels.aot.workers import compile_in_workers
from octavo.kernels.common.compiled import COMPILED
from triton import knobs
from triton.compiler import CompiledKernel

WANTED = ("_activation_kernel", "_sum_kernel", "_top_kernel")  # the last two call the same functions
MODEL, LIMITS = MODELS["smollm2-135m"], Settings(max_num_batched_tokens=16, max_num_seqs=1)


def a_few(*args: Any) -> list[Any]:
    return [variant for variant in list_variants(*args) if variant.launch.kernel in WANTED]


def num_children() -> int:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        return 1
    return 0


runs = []
with fake_driver(GPUS["sm_90"]), mock.patch.object(warm, "list_variants", a_few):
    for _ in range(2):
        here: list[bool] = []
        knobs.compilation.listener = lambda *, cache_hit, here=here, **_: here.append(not cache_hit)
        tell = mock.Mock()
        with mock.patch.object(CompiledKernel, "_init_handles") as load:
            warmed = warm.warm_up([MODEL], LIMITS, device=torch.device("cpu"), num_workers=2, on_progress=tell)
        runs.append(
            {
                "warmed": warmed,
                "compiled_here": sum(here),
                "progress": [call.args for call in tell.call_args_list],
                "num_loaded": load.call_count,
                "num_late": COMPILED.num_late,
                "num_children": num_children(),
            }
        )
    good, *_ = [variant.launch for variant in a_few(MODEL, [LIMITS], GPUS["sm_80"])]
unknown = Launch("octavo.kernels.nowhere", "kernel", "sm_80", "{}")
launches = [unknown, dataclasses.replace(good, specialization="{}"), good, good]
stopped = compile_in_workers(launches, 1)
answers = list(itertools.islice(stopped, 3))
stopped.close()
with mock.patch("sys.executable", "/bin/false"):
    dead = list(compile_in_workers(launches, 2))
print(json.dumps({"runs": runs, "answers": answers, "dead": dead, "num_children": num_children()}))
