"""This module holds the sampler: it launches the draw of a step's rows. It does not know how a token is chosen.

A row's settings are written once, when its sequence gets the row; a step gathers those of its rows, and as long as the
same rows are sampled nothing is gathered again. A feature costs nothing in a step in which no row uses it, and only
rows with a rare feature (bias, allowed or bad words, min_tokens, a grammar) are visited one by one. A row's token
depends on its own sequence, parameters, seed and logits alone, so preemption (remove, then add with the outputs so far)
changes nothing.

Nothing is waited for before `Draw.wait`. What penalties have to know stays on the device; a row whose grammar or bad
words have to know its last token cannot be launched before that has been waited for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from octavo.kernels.sampling import SampleParams, log_softmax_top, sample
from torch import Tensor

from ..sampling_params import SamplingParams
from ..step import Grammar
from .draw import Batch, Draw, SampledTokens, logprob_entries
from .row_extras import PlacedExtras, RowExtras, make_extras, upload_extras
from .row_grammar import MaskWorkers
from .row_settings import DRAWN, EXTRAS, LOGPROBS, LOOKS_BACK, PENALTIES, RowSettings, upload
from .seen_tokens import PenalisedRows, SeenTokens
from .staging import Staging

__all__ = ["Draw", "SampledTokens", "Sampler", "logprob_entries"]

IntArray = npt.NDArray[np.integer[Any]]


class Sampler:
    """Samples one token for each of a step's rows.

    Args:
        max_num_seqs: number of persistent rows.
        vocab_size: width of the logits.
        num_valid_ids: ids from here on do not exist in the tokenizer and are never sampled; None: all exist.
        device: where the logits are.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        *,
        num_valid_ids: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._vocab_size = vocab_size
        self._num_valid_ids = None if num_valid_ids is None else min(num_valid_ids, vocab_size)
        self._greedy = SampleParams(num_valid_ids=self._num_valid_ids)
        self._staging = Staging(torch.device(device))
        self._settings = RowSettings(max_num_seqs)
        self._seen = SeenTokens(max_num_seqs, vocab_size, self._staging, torch.device(device))
        self._extras: list[RowExtras | None] = [None] * max_num_seqs
        self._mask_workers = MaskWorkers()
        self._version = 0
        """How often a row has changed hands."""
        self._latest: Batch | None = None

    @property
    def num_valid_ids(self) -> int | None:
        """Ids from here on do not exist in the tokenizer; None: all exist."""
        return self._num_valid_ids

    @torch.inference_mode()
    def add(
        self,
        row: int,
        params: SamplingParams,
        *,
        prompt_token_ids: Sequence[int] | IntArray,
        output_token_ids: Sequence[int] | IntArray = (),
        seed: int,
        choice: int = 0,
        stop_token_ids: Collection[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        """Give a row to a sequence that starts, or resumes after preemption.

        Args:
            row: 0 to max_num_seqs − 1, free.
            params: validated for this model; `bad_words` already turned into token ids.
            prompt_token_ids: [num_prompt_tokens].
            output_token_ids: [num_output_tokens] generated so far.
            seed: 0 to 2**63 − 1.
            choice: which of the n choices of a request.
            stop_token_ids: EOS ids and others that `min_tokens` bans.
            grammar: what the output must look like; None: anything.
        """
        assert not params.bad_words, "bad_words must be token ids by now"
        settings = self._settings
        settings.write(row, params, seed=seed, choice=choice)
        extras = make_extras(params, grammar, prompt_token_ids, output_token_ids, stop_token_ids, self._vocab_size)
        self._extras[row] = extras
        if extras is not None:
            settings.flags[row] |= EXTRAS | LOOKS_BACK * extras.looks_back
            settings.stops_from[row] = extras.stops_from
        if settings.flags[row] & PENALTIES:
            self._seen.add(row, prompt_token_ids, output_token_ids)
        self._version += 1

    def remove(self, row: int) -> None:
        """Free a row: its sequence has ended or was preempted."""
        self._settings.flags[row] = 0
        self._settings.stops_from[row] = 0
        self._extras[row] = None
        self._version += 1

    def needs_host(self, rows: IntArray) -> bool:
        """Whether some of these rows cannot be launched before the last draw has been waited for."""
        return any(each.extras.num_awaited for each in self._placed(rows, LOOKS_BACK))

    def prepare(self, rows: IntArray, positions: IntArray) -> None:
        """Begin to compute what `launch` will need of these rows and no logits: to be called before the model runs.

        A row whose last token is not known keeps the mask of that token until `Draw.wait`, which begins the next one.
        """
        for at, _, extras in self._placed(rows, LOOKS_BACK):
            if extras.grammar is not None:
                extras.grammar.prepare(int(positions[at]), self._mask_workers)

    def sample(self, logits: Tensor, rows: IntArray, positions: IntArray) -> SampledTokens:
        """Launch a draw and wait for it; see `launch`."""
        return self.launch(logits, rows, positions).wait()

    @torch.inference_mode()
    def launch(self, logits: Tensor, rows: IntArray, positions: IntArray) -> Draw:
        """Begin to sample one token for each row, without waiting for the device.

        Args:
            logits: [n, vocab_size] float, unchanged; not read once this has returned, but by what was launched.
            rows: [n] persistent rows, each once.
            positions: [n] index in its sequence of the token to sample: prompt and output tokens so far.
        """
        batch = self._batch(rows, positions)
        for _, row, extras in batch.looking_back:
            assert not extras.num_awaited, f"row {row} is launched before its last token is known"
        output = sample(logits, self._params(batch, positions))
        sampled = torch.empty((2, len(rows)), dtype=torch.int32, device=output.token_ids.device)
        token_ids, failed = sampled
        token_ids.copy_(output.token_ids)
        failed.copy_(output.failed)
        if batch.penalised is not None:
            self._seen.count(batch.penalised, token_ids, output.failed)
        finite = logprobs = None
        if batch.limited_at is not None:
            finite = logits[batch.limited_at, : self._num_valid_ids].amax(-1).isfinite()
        if batch.used & LOGPROBS:
            x, chosen = logits, output.token_ids
            if batch.wanted_at is not None:
                x, chosen = x[batch.wanted_at], chosen[batch.wanted_at]
            x = x[:, : self._num_valid_ids]
            logprobs = log_softmax_top(x, min(max(batch.wanted[1]), x.shape[1]), chosen)
        draw = Draw(batch, positions, sampled, finite, logprobs, workers=self._mask_workers)
        for _, _, extras in batch.looking_back:  # not before: of a launch that fails, nobody will wait for a token
            extras.num_awaited += 1
        return draw

    def _batch(self, rows: IntArray, positions: IntArray) -> Batch:
        """Return what is gathered for these rows, again only where it has changed."""
        latest, may_stop = self._latest, positions >= self._settings.stops_from[rows]
        if (
            latest is None
            or latest.version != self._version
            or not np.array_equal(latest.rows, rows)
            or not np.array_equal(latest.may_stop, may_stop)
        ):
            latest = self._latest = self._gather_batch(rows, positions, may_stop)
        return latest

    def _gather_batch(self, rows: IntArray, positions: IntArray, may_stop: npt.NDArray[np.bool_]) -> Batch:
        settings, flags = self._settings, self._settings.flags[rows]
        used = int(np.bitwise_or.reduce(flags))
        placed = self._placed(rows, EXTRAS) if used & EXTRAS else []
        limited = [each for each in placed if each.extras.has_limits]
        wanted = (flags & LOGPROBS).nonzero()[0]
        at = (flags & PENALTIES).nonzero()[0]
        penalised = PenalisedRows(at, rows[at], settings.strengths(rows[at]), self._staging) if len(at) else None
        return Batch(
            version=self._version,
            rows=rows,
            may_stop=may_stop,
            used=used,
            params=self._greedy if used & ~LOGPROBS == 0 else self._gather(rows, positions, used, placed),
            placed=placed,
            looking_back=[each for each in placed if each.extras.looks_back],
            limited=limited,
            limited_at=self._index([each.at for each in limited]) if limited else None,
            penalised=penalised,
            wanted=(wanted.tolist(), settings.num_logprobs[rows[wanted]].tolist()),
            wanted_at=self._index(wanted) if 0 < len(wanted) < len(rows) else None,
        )

    def _gather(self, rows: IntArray, positions: IntArray, used: int, placed: list[PlacedExtras]) -> SampleParams:
        """Return the settings of rows, in one copy; rare features in others, which few steps need."""
        draws = self._settings.draws(rows, used)
        tensors: dict[str, Any] = dict(zip(draws, upload(self._staging, *draws.values()), strict=True)) if draws else {}
        if placed and not used & LOOKS_BACK:
            tensors.update(
                zip(("allowed", "banned", "bias"), upload_extras(placed, positions, self._staging), strict=True)
            )
        return SampleParams(num_valid_ids=self._num_valid_ids, **tensors)

    def _params(self, batch: Batch, positions: IntArray) -> SampleParams:
        """Return how this step samples: what was gathered, and what is new in every step."""
        changes: dict[str, Any] = {}
        if batch.used & DRAWN:
            (changes["position"],) = upload(self._staging, np.asarray(positions, dtype=np.int64))
        if batch.used & LOOKS_BACK:
            extras = upload_extras(batch.placed, positions, self._staging)
            changes |= zip(("allowed", "banned", "bias"), extras, strict=True)
        if batch.penalised is not None:
            changes["penalties"] = self._seen.penalties(batch.penalised)
        return replace(batch.params, **changes) if changes else batch.params

    def _index(self, at: Sequence[int] | IntArray) -> Tensor:
        return upload(self._staging, np.asarray(at, dtype=np.int64))[0]

    def _placed(self, rows: IntArray, flag: int) -> list[PlacedExtras]:
        """Return the extras of rows that have a flag."""
        found = []
        for at in (self._settings.flags[rows] & flag).nonzero()[0].tolist():
            row = int(rows[at])
            extras = self._extras[row]
            assert extras is not None, f"row {row} is flagged for features it does not have"
            found.append(PlacedExtras(at, row, extras))
        return found
