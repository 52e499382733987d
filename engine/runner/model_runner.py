"""This module holds the runner of one step: inputs, model, sampler, outputs. It does not know why a row runs.

What may never be added here: a loop over all rows of a step, a decision about scheduling, text, a wait for the device
before `LaunchedStep.wait`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.decoder import Decoder, LayerCache
from ..step import SchedulerOutput
from .attention_metadata import build_attention_metadata
from .cuda_graphs import DecodeGraphs
from .input_batch import InputBatch, Uploaded
from .launched_step import LaunchedStep
from .prompt_logprobs import PromptLogprobs
from .sampler import Sampler

__all__ = ["ModelRunner"]

_log = logging.getLogger("octavo.engine")


class ModelRunner:
    """Runs steps of a decoder on one device.

    Args:
        model: the decoder.
        cache: its KV cache, by layer.
        sampler: draws the tokens; keeps what it needs of each row.
        max_num_seqs, max_model_len, block_size: the engine's limits.
        invariant: see `plan_paged_attention`.
        graphs: run decode steps as captured graphs; see `DecodeGraphs`.
    """

    def __init__(
        self,
        model: Decoder,
        cache: Sequence[LayerCache],
        sampler: Sampler,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        invariant: bool = False,
        graphs: bool = False,
    ) -> None:
        self.model = model
        self.cache = cache
        self._sampler = sampler
        self._batch = InputBatch(max_num_seqs, max_model_len, block_size, model.device)
        self._invariant = invariant
        self._prompt_logprobs = PromptLogprobs(self._batch, sampler.num_valid_ids)
        self._wants_hidden_states: dict[int, Sequence[int]] = {}
        """Row -> layers."""
        self._latest: LaunchedStep | None = None
        self.graphs: DecodeGraphs | None = None
        """What was captured holds the model as it was: None while something else stands in `model`."""
        if graphs:
            self.graphs = DecodeGraphs(model, cache, self._batch, max_num_seqs=max_num_seqs, invariant=invariant)

    def capture_graphs(self, on_progress: Callable[[int, int], object], *, required: bool) -> str:
        """Capture all graphs and return what that took, in words; if it cannot be done, go on without and log why.

        Args:
            on_progress: see `DecodeGraphs.capture_all`.
            required: do not go on without.

        Raises:
            ConfigError: they are required and cannot be captured.
        """
        assert self.graphs is not None
        try:
            return self.graphs.capture_all(on_progress)
        except Exception as error:
            # Where something has broken a capture, ending it fails as well, and that says less.
            errors = [each for each in (error, error.__context__) if each is not None]
            for each in errors:
                if isinstance(each, torch.OutOfMemoryError):
                    raise each from None
            told = ", after ".join(map(repr, errors))
            if required:
                raise ConfigError(f"graphs is true and none can be captured: {told}; allowed: false") from error
            self.graphs = None
            _log.warning("steps run op by op, as no graph can be captured: %s", told)
            return f"none: {told}"

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> LaunchedStep:
        """Start one step; see `ModelRunner` in `step.py`.

        Where the sampling needs a token of the step before, which has not been waited for, it is launched with the next
        step or by `wait`, whichever comes first.
        """
        if self._latest is not None:
            self._latest.launch()
        self._apply(step)
        rows = step.rows[step.sampled]
        positions = (step.num_computed_tokens + step.num_scheduled_tokens)[step.sampled]
        self._sampler.prepare(rows, positions)
        capture = sorted({layer for layers in self._wants_hidden_states.values() for layer in layers})
        uploaded, hidden, captured = self._forward(step, capture)
        num_sampled = len(rows)
        logits = None
        if num_sampled:
            all_rows = num_sampled == len(hidden)
            logits = self.model.logits(hidden if all_rows else hidden.index_select(0, uploaded.logits_indices))
        launched = LaunchedStep(
            self._sampler, self._batch, rows=rows, positions=positions, sampled_rows=uploaded.sampled_rows,
            logits=logits, prompt_logprobs=self._prompt_logprobs.launch(step, hidden, self.model.logits),
            states=dict(self._hidden_states(step, capture, captured)) if capture else {},
        )  # fmt: skip
        before, self._latest = self._latest, launched
        if before is None or before.is_done or not self._sampler.needs_host(rows):
            launched.launch()
        return launched

    def _forward(self, step: SchedulerOutput, capture: Sequence[int]) -> tuple[Uploaded, Tensor, list[Tensor]]:
        """Return what was uploaded of a step, its hidden states [num_tokens, H], and those captured."""
        if self.graphs is not None:
            bucket = self.graphs.bucket(step, wants_states=bool(capture or self._prompt_logprobs))
            if bucket is not None:
                hidden, uploaded = self.graphs.run(step, bucket)
                return uploaded, hidden, []
        uploaded = self._batch.upload(step)
        inputs = self._batch.expand(step, uploaded)
        metadata = build_attention_metadata(
            step, inputs, self.model.config, block_size=self._batch.block_size, invariant=self._invariant,
            host_block_tables=self._batch.host_block_tables if self.graphs is None else None,
        )  # fmt: skip
        return uploaded, *self.model.forward(inputs.token_ids, metadata, self.cache, capture)

    def _apply(self, step: SchedulerOutput) -> None:
        for row in step.removed_rows.tolist():
            self._sampler.remove(row)
            self._prompt_logprobs.remove(row)
            self._wants_hidden_states.pop(row, None)
        self._batch.apply(step)
        for sequence in step.new_sequences:
            self._sampler.add(
                sequence.row, sequence.params, prompt_token_ids=sequence.token_ids[: sequence.num_prompt_tokens],
                output_token_ids=sequence.token_ids[sequence.num_prompt_tokens :], choice=sequence.index,
                seed=sequence.seed, stop_token_ids=sequence.stop_token_ids, grammar=sequence.grammar,
            )  # fmt: skip
            self._prompt_logprobs.add(sequence)
            # A step that failed may have left a row it never took out again.
            self._wants_hidden_states.pop(sequence.row, None)
            if sequence.params.return_hidden_states:
                self._wants_hidden_states[sequence.row] = sequence.params.return_hidden_states

    def _hidden_states(
        self, step: SchedulerOutput, capture: Sequence[int], captured: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (position in `sampled`, [num_chosen_layers, H]) for the rows that asked."""
        last = np.cumsum(step.num_scheduled_tokens)[step.sampled] - 1
        sampled_rows: npt.NDArray[np.int32] = step.rows[step.sampled]
        for row, layers in self._wants_hidden_states.items():
            for at in np.flatnonzero(sampled_rows == row).tolist():
                states = [captured[capture.index(layer)][int(last[at])] for layer in layers]
                yield at, torch.stack(states).float()
