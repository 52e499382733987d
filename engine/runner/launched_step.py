"""This module holds a step that has been started: what is left to launch, and what to make of it once the device is
done. It does not know what ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..step import LogprobEntry, ModelOutput
from .input_batch import InputBatch
from .sampler import Draw, Sampler
from .staging import HostCopy

__all__ = ["LaunchedStep", "States"]

IntArray = npt.NDArray[np.integer[Any]]
Entries = Callable[[], Mapping[int, list[LogprobEntry]]]
States = Mapping[int, Tensor]
"""By position in `sampled`: [num_chosen_layers, H]."""


class LaunchedStep:
    """The handle of a step.

    Args:
        sampler: draws the tokens when `launch` is called.
        batch: gets them, on the device at once and on the host when they are known.
        rows: [num_sampled] persistent rows.
        positions: [num_sampled] of the tokens to sample.
        sampled_rows: [num_sampled] int64: `rows`, on the device.
        logits: [num_sampled, vocab_size]; None: nothing is sampled.
        prompt_logprobs: returns what was launched for them.
        states: hidden states that rows asked for.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch: InputBatch,
        *,
        rows: IntArray,
        positions: IntArray,
        sampled_rows: Tensor,
        logits: Tensor | None,
        prompt_logprobs: Entries,
        states: States,
    ) -> None:
        self._sampler = sampler
        self._batch = batch
        self._rows = rows
        self._positions = positions
        self._sampled_rows = sampled_rows
        self._logits = logits
        self._owners = batch.expect(rows, positions)
        self._prompt_logprobs = prompt_logprobs
        self._places = list(states)
        self._states = HostCopy(list(states.values()), sampled_rows.device)
        self._draw: Draw | None = None
        self._error: Exception | None = None
        self.is_done = False
        """Whether it has been waited for."""

    @torch.inference_mode()
    def launch(self) -> None:
        """Launch the sampling, if nobody has: what goes wrong in it is raised by `wait`, being this step's and not
        that of whoever calls.
        """
        if self._logits is None:
            return
        logits, self._logits = self._logits, None
        try:
            self._draw = self._sampler.launch(logits, self._rows, self._positions)
            self._batch.last_token_ids.index_copy_(0, self._sampled_rows, self._draw.token_ids)
        except Exception as error:
            self._error = error
        except BaseException:
            self._error = RuntimeError("the sampling of this step was interrupted")
            raise

    def wait(self) -> ModelOutput:
        """Return the output once the device has finished; see `StepHandle` in `step.py`."""
        self.launch()
        self.is_done = True
        if self._error is not None:
            raise self._error
        drawn = None if self._draw is None else self._draw.wait()  # first: it is what the next step waits for
        states, prompt_logprobs = self._states.wait(), self._prompt_logprobs()
        if drawn is None:
            return ModelOutput(np.empty(0, dtype=np.int32), prompt_logprobs=prompt_logprobs)
        self._batch.note(self._rows, self._positions, self._owners, drawn.token_ids)
        return ModelOutput(
            drawn.token_ids, failed=drawn.failed, errors=drawn.errors, ended=drawn.ended, logprobs=drawn.logprobs,
            prompt_logprobs=prompt_logprobs,
            hidden_states={at: state.numpy() for at, state in zip(self._places, states, strict=True)},
        )  # fmt: skip
