"""This module holds how each running row wants to be sampled, by persistent row. It does not know tokens."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..sampling_params import SamplingParams
from .staging import Staging

__all__ = ["DRAWN", "EXTRAS", "LOGPROBS", "LOOKS_BACK", "MIN_P", "PENALTIES", "TOP_K", "TOP_P"]
__all__ += ["RowSettings", "upload"]

IntArray = npt.NDArray[np.integer[Any]]

# What a row makes a step do; a row without any of these is greedy and plain.
DRAWN: Final = 1
TOP_K: Final = 2
TOP_P: Final = 4
MIN_P: Final = 8
PENALTIES: Final = 16
LOGPROBS: Final = 32
EXTRAS: Final = 64
LOOKS_BACK: Final = 128

_DTYPES: Final = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def upload(staging: Staging, *arrays: npt.NDArray[Any]) -> list[Tensor]:
    """Return arrays of 32-bit and 64-bit numbers on the device, after one copy."""
    packed = staging.upload(*(np.ascontiguousarray(array).reshape(-1).view(np.int32) for array in arrays))
    return [each.view(_DTYPES[array.dtype]).view(array.shape) for each, array in zip(packed, arrays, strict=True)]


class RowSettings:
    """Numbers by persistent row, written once, when a sequence gets the row.

    Args:
        max_num_seqs: number of persistent rows.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.flags = np.zeros(max_num_seqs, dtype=np.uint8)
        """What each row makes a step do: the bits above."""
        self.num_logprobs = np.zeros(max_num_seqs, dtype=np.int32)
        self.stops_from = np.zeros(max_num_seqs, dtype=np.int64)
        """Position from which a row may sample its stop tokens; 0 where nothing bans them."""
        self._temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int32)
        self._top_p = np.ones(max_num_seqs, dtype=np.float64)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float64)
        self._seed = np.zeros(max_num_seqs, dtype=np.int64)
        self._choice = np.zeros(max_num_seqs, dtype=np.int32)
        self._strengths = np.zeros((3, max_num_seqs), dtype=np.float32)
        """Of repetition, presence and frequency."""

    def write(self, row: int, params: SamplingParams, *, seed: int, choice: int) -> None:
        """Give a row to a sequence, without flags for features that are kept elsewhere."""
        is_drawn = np.float32(params.temperature) > 0
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = seed
        self._choice[row] = choice
        self.num_logprobs[row] = params.logprobs or 0
        strengths = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self._strengths[:, row] = strengths
        self.stops_from[row] = 0
        self.flags[row] = (
            DRAWN * is_drawn
            | TOP_K * (is_drawn and params.top_k > 0)
            | TOP_P * (is_drawn and params.top_p < 1.0)
            | MIN_P * (is_drawn and params.min_p > 0.0)
            | PENALTIES * (strengths != (1.0, 0.0, 0.0))
            | LOGPROBS * (params.logprobs is not None)
        )

    def draws(self, rows: IntArray, used: int) -> dict[str, npt.NDArray[Any]]:
        """Return by the names of `SampleParams` what a step needs to draw tokens of rows that use so much."""
        values: dict[str, tuple[int, npt.NDArray[Any]]] = {
            "temperature": (DRAWN, self._temperature),
            "seed": (DRAWN, self._seed),
            "choice": (DRAWN, self._choice),
            "top_k": (TOP_K, self._top_k),
            "top_p": (TOP_P, self._top_p),
            "min_p": (MIN_P, self._min_p),
        }
        return {name: array[rows] for name, (flag, array) in values.items() if used & flag}

    def strengths(self, rows: IntArray) -> npt.NDArray[np.float32]:
        """Return [3, m]: repetition, presence and frequency."""
        return self._strengths[:, rows]
