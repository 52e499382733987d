"""This program calls the ops of a decode step on tensors that hold nothing and prints each launch's kernel and grid.

With --planted the launch settings of decode attention ask a tensor, as no captured launch may.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch
from octavo.kernels.aot import calls
from octavo.kernels.aot.calls import Settings
from octavo.kernels.aot.driver import recording
from octavo.kernels.aot.targets import GPUS, MODELS
from octavo.kernels.attention import decode_triton
from triton.runtime import JITFunction

SETTINGS = Settings(block_size=64)
MODEL = MODELS["llama-3-8b"]


def cdiv_of_data(a: int, b: int) -> int:
    return int(torch.empty(1, device="meta")) + a // b


def main() -> None:
    grids: list[Any] = []
    run = JITFunction.run

    def noted(self: Any, *args: Any, grid: tuple[int, ...], **options: Any) -> Any:
        grids.append([self.__name__, *grid])
        return run(self, *args, grid=grid, **options)

    planted = "--planted" in sys.argv
    found = []
    with (
        mock.patch.object(JITFunction, "run", noted),
        mock.patch.object(decode_triton, "cdiv", cdiv_of_data if planted else decode_triton.cdiv),
        recording(GPUS["sm_90"]),
    ):
        for num_seqs, num_columns in ((1, 128), (64, 128), (64, 512), (256, 8)):
            sizes = {"num_seqs": num_seqs, "num_tokens": num_seqs}
            made = (
                calls.expand_call(SETTINGS, **sizes, num_columns=num_columns, width=512),
                calls.norm_call(MODEL, num_seqs, residual=True),
                calls.write_call(MODEL, SETTINGS, num_seqs),
                calls.attention_call(
                    MODEL, SETTINGS, "decode", **sizes, max_query_len=1, max_blocks_per_seq=num_columns
                ),
                calls.activation_call(MODEL, num_seqs),
            )
            grids.clear()
            for call in made:
                call.run()
            found.append([num_seqs, num_columns, grids[:]])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
