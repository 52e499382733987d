"""This module holds the runner of one step: inputs, model, sampler, outputs. It does not know why a row runs.

What may never be added here: a loop over all rows of a step, a decision about scheduling, text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from octavo.kernels import log_softmax_top

from ..footprint import LOGITS_CHUNK_TOKENS
from ..models.decoder import Decoder, LayerCache
from ..step import LogprobEntry, ModelOutput, SchedulerOutput
from .attention_metadata import build_attention_metadata
from .input_batch import InputBatch, StepInputs
from .sampler import Sampler, logprob_entries

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs steps of a decoder on one device.

    Args:
        model: the decoder.
        cache: its KV cache, by layer.
        sampler: draws the tokens; keeps what it needs of each row.
        max_num_seqs, max_model_len, block_size: the engine's limits.
        invariant: see `plan_paged_attention`.
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
    ) -> None:
        self.model = model
        self.cache = cache
        self._sampler = sampler
        self._batch = InputBatch(max_num_seqs, max_model_len, block_size)
        self._block_size = block_size
        self._invariant = invariant
        self._wants_prompt_logprobs: dict[int, tuple[int, int]] = {}
        """Row -> (number of top tokens, number of prompt tokens)."""
        self._wants_hidden_states: dict[int, Sequence[int]] = {}
        """Row -> layers."""

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Run one step; see `ModelRunner` in `step.py`."""
        self._apply(step)
        inputs = self._batch.gather(step)
        metadata = build_attention_metadata(
            step,
            inputs,
            self.model.config,
            block_size=self._block_size,
            device=self.model.device,
            invariant=self._invariant,
        )
        rows, positions = step.rows[step.sampled], inputs.seq_lens[step.sampled]
        self._sampler.prepare(rows, positions)
        capture = sorted({layer for layers in self._wants_hidden_states.values() for layer in layers})
        token_ids = torch.from_numpy(inputs.token_ids).to(self.model.device)
        hidden, captured = self.model.forward(token_ids, metadata, self.cache, capture)

        last = (inputs.cu_seqlens_q[1:] - 1)[step.sampled]  # [num_sampled] token rows
        prompt_logprobs = dict(self._prompt_logprobs(step, inputs, hidden)) if self._wants_prompt_logprobs else {}
        if len(last) == 0:
            return ModelOutput(np.empty(0, dtype=np.int32), prompt_logprobs=prompt_logprobs)
        logits = self.model.logits(hidden if len(last) == step.num_tokens else hidden[torch.from_numpy(last)])
        drawn = self._sampler.sample(logits, rows, positions)
        self._batch.append(rows, positions, drawn.token_ids)
        states = dict(self._hidden_states(rows, last, capture, captured)) if capture else {}
        return ModelOutput(
            drawn.token_ids,
            failed=drawn.failed,
            errors=drawn.errors,
            ended=drawn.ended,
            logprobs=drawn.logprobs,
            prompt_logprobs=prompt_logprobs,
            hidden_states=states,
        )

    def _apply(self, step: SchedulerOutput) -> None:
        for row in step.removed_rows.tolist():
            self._sampler.remove(row)
            self._wants_prompt_logprobs.pop(row, None)
            self._wants_hidden_states.pop(row, None)
        self._batch.apply(step)
        for sequence in step.new_sequences:
            self._sampler.add(
                sequence.row,
                sequence.params,
                prompt_token_ids=sequence.token_ids[: sequence.num_prompt_tokens],
                output_token_ids=sequence.token_ids[sequence.num_prompt_tokens :],
                choice=sequence.index,
                seed=sequence.seed,
                stop_token_ids=sequence.stop_token_ids,
                grammar=sequence.grammar,
            )
            # A step that failed may have left a row it never took out again.
            self._wants_prompt_logprobs.pop(sequence.row, None)
            self._wants_hidden_states.pop(sequence.row, None)
            if sequence.params.prompt_logprobs is not None:
                wanted = (sequence.params.prompt_logprobs, sequence.num_prompt_tokens)
                self._wants_prompt_logprobs[sequence.row] = wanted
            if sequence.params.return_hidden_states:
                self._wants_hidden_states[sequence.row] = sequence.params.return_hidden_states

    def _prompt_logprobs(
        self, step: SchedulerOutput, inputs: StepInputs, hidden: torch.Tensor
    ) -> Iterator[tuple[int, list[LogprobEntry]]]:
        """Yield (row, an entry for each prompt token that this step's positions predict)."""
        for i, row in enumerate(step.rows.tolist()):
            if row not in self._wants_prompt_logprobs:
                continue
            num_top, num_prompt_tokens = self._wants_prompt_logprobs[row]
            first = int(step.num_computed_tokens[i])
            stop = min(first + int(step.num_scheduled_tokens[i]), num_prompt_tokens - 1)
            if first >= stop:
                continue
            start = int(inputs.cu_seqlens_q[i])
            entries: list[LogprobEntry] = []
            for chunk in range(first, stop, LOGITS_CHUNK_TOKENS):
                chunk_stop = min(chunk + LOGITS_CHUNK_TOKENS, stop)
                logits = self.model.logits(hidden[start + chunk - first : start + chunk_stop - first])
                following = self._batch.token_ids[row, chunk + 1 : chunk_stop + 1].astype(np.int64)
                entries += self._entries(logits, following, num_top)
            yield row, entries

    def _entries(self, logits: torch.Tensor, token_ids: npt.NDArray[np.int64], num_top: int) -> list[LogprobEntry]:
        """Return what the model thought of given tokens, over the ids that the tokenizer has, as for sampled ones."""
        logits = logits[:, : self._sampler.num_valid_ids]
        num_ids = logits.shape[1]
        known = torch.from_numpy(np.minimum(token_ids, num_ids - 1)).to(logits.device)
        entries = logprob_entries(log_softmax_top(logits, min(num_top, num_ids), known))
        for i in np.flatnonzero(token_ids >= num_ids).tolist():
            entries[i] = entries[i]._replace(logprob=-math.inf, rank=num_ids + 1)
        return entries

    def _hidden_states(
        self,
        rows: npt.NDArray[np.int32],
        last: npt.NDArray[np.int32],
        capture: Sequence[int],
        captured: Sequence[torch.Tensor],
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (position in `sampled`, [num_chosen_layers, H]) for the rows that asked."""
        for i, row in enumerate(rows.tolist()):
            if layers := self._wants_hidden_states.get(row):
                states = [captured[capture.index(layer)][int(last[i])] for layer in layers]
                yield i, torch.stack(states).float().cpu().numpy()
