"""This module holds how each running row wants to be sampled, between steps. It does not know how a token is chosen.

A row's settings are written once, when its sequence gets the row, into arrays by persistent row; a step gathers those
of its rows. A feature costs nothing in a step in which no row uses it, and only rows with a rare feature (bias,
allowed or bad words, min_tokens, a grammar) are visited one by one. A row's token depends on its own sequence,
parameters, seed and logits alone, so preemption (remove, then add with the outputs so far) changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from octavo.kernels.sampling import (
    AllowedTokens,
    BannedTokens,
    LogitBias,
    LogprobOutput,
    Penalties,
    SampleParams,
    log_softmax_top,
    sample,
)
from torch import Tensor

from ..sampling_params import SamplingParams
from ..step import Grammar, LogprobEntry, RowError
from .row_grammar import MaskWorkers, RowGrammar

__all__ = ["Draw", "SampledTokens", "Sampler", "logprob_entries"]

IntArray = npt.NDArray[np.integer[Any]]

# What a row makes a step do; a row without any of these is greedy and plain.
_DRAWN: Final = 1
_TOP_K: Final = 2
_TOP_P: Final = 4
_MIN_P: Final = 8
_PENALTIES: Final = 16
_LOGPROBS: Final = 32
_EXTRAS: Final = 64
_GRAMMAR: Final = 128

NOTHING_LEFT: Final = "no token is left to sample: what allowed_token_ids and structured_outputs allow here is banned"


class SampledTokens(NamedTuple):
    """What one step sampled."""

    token_ids: npt.NDArray[np.int32]
    """[n]; means nothing where the row failed."""
    failed: npt.NDArray[np.bool_] | None
    """[n] rows without finite logits, or with no token left to sample; None: no row failed."""
    errors: dict[int, RowError]
    """By position in the batch, of rows that had no token left to sample."""
    ended: npt.NDArray[np.bool_] | None
    """[n] rows whose grammar lets nothing follow their token; None: no row."""
    logprobs: dict[int, LogprobEntry]
    """By position in the batch, of rows that asked."""


class Draw:
    """Tokens that are being sampled."""

    def __init__(self, sampled: SampledTokens, device: torch.device) -> None:
        self._sampled = sampled
        self.token_ids = torch.from_numpy(sampled.token_ids).to(device)
        """[n] int32, on the device."""

    def wait(self) -> SampledTokens:
        """Return what was sampled once it is known."""
        return self._sampled


@dataclass(slots=True)
class _Extras:
    """A row's rare features. Token ids are int64 arrays."""

    bitmask: npt.NDArray[np.int32] | None
    """[ceil(vocab_size / 32)] of the allowed tokens; None: all are."""
    bias: tuple[IntArray, npt.NDArray[np.float32]] | None
    stops: IntArray
    """Banned at positions below `stops_from`."""
    stops_from: int
    banned: IntArray
    """Bad words of one token."""
    bad_endings: list[tuple[list[int], int]]
    """Bad words of several: all but the last token, and the last."""
    tail: list[int]
    """The latest tokens of the sequence, as many as a bad ending looks back."""
    max_tail: int
    grammar: RowGrammar | None

    def banned_at(self, position: int) -> list[IntArray]:
        """Return the tokens not to be sampled at a position."""
        found = [self.stops, self.banned] if position < self.stops_from else [self.banned]
        endings = [last for before, last in self.bad_endings if self.tail[-len(before) :] == before]
        if endings:
            found.append(np.array(endings, dtype=np.int64))
        return found

    def append(self, token_id: int) -> None:
        """Remember a sampled token, if any bad word has to look back."""
        if self.max_tail:
            self.tail.append(token_id)
            del self.tail[: -self.max_tail]


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
        self._device = torch.device(device)
        self._greedy = SampleParams(num_valid_ids=self._num_valid_ids)
        self._flags = np.zeros(max_num_seqs, dtype=np.uint8)
        self._temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int32)
        self._top_p = np.ones(max_num_seqs, dtype=np.float64)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float64)
        self._seed = np.zeros(max_num_seqs, dtype=np.int64)
        self._choice = np.zeros(max_num_seqs, dtype=np.int32)
        self._num_logprobs = np.zeros(max_num_seqs, dtype=np.int32)
        self._repetition = np.ones(max_num_seqs, dtype=np.float32)
        self._presence = np.zeros(max_num_seqs, dtype=np.float32)
        self._frequency = np.zeros(max_num_seqs, dtype=np.float32)
        self._num_seen = np.zeros(max_num_seqs, dtype=np.int32)
        self._seen_ids = np.empty((max_num_seqs, 0), dtype=np.int32)
        self._seen_counts = np.empty_like(self._seen_ids)
        self._extras: list[_Extras | None] = [None] * max_num_seqs
        self._mask_workers = MaskWorkers()

    @property
    def num_valid_ids(self) -> int | None:
        """Ids from here on do not exist in the tokenizer; None: all exist."""
        return self._num_valid_ids

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
        is_drawn = np.float32(params.temperature) > 0
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = seed
        self._choice[row] = choice
        self._num_logprobs[row] = params.logprobs or 0
        self._repetition[row] = params.repetition_penalty
        self._presence[row] = params.presence_penalty
        self._frequency[row] = params.frequency_penalty
        extras = self._make_extras(params, grammar, prompt_token_ids, output_token_ids, stop_token_ids)
        self._extras[row] = extras
        has_penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (
            1.0,
            0.0,
            0.0,
        )
        if has_penalties:
            outputs = np.asarray(output_token_ids, dtype=np.int32)
            seen = np.unique(np.concatenate((np.asarray(prompt_token_ids, dtype=np.int32), outputs)))
            self._reserve(len(seen))
            self._num_seen[row] = len(seen)
            self._seen_ids[row, : len(seen)] = seen
            self._seen_counts[row, : len(seen)] = np.bincount(np.searchsorted(seen, outputs), minlength=len(seen))
        self._flags[row] = (
            _DRAWN * is_drawn
            | _TOP_K * (is_drawn and params.top_k > 0)
            | _TOP_P * (is_drawn and params.top_p < 1.0)
            | _MIN_P * (is_drawn and params.min_p > 0.0)
            | _PENALTIES * has_penalties
            | _LOGPROBS * (params.logprobs is not None)
            | _EXTRAS * (extras is not None)
            | _GRAMMAR * (grammar is not None)
        )

    def remove(self, row: int) -> None:
        """Free a row: its sequence has ended or was preempted."""
        self._flags[row] = 0
        self._extras[row] = None

    def prepare(self, rows: IntArray, positions: IntArray) -> None:
        """Begin to compute what `sample` will need of these rows and no logits: to be called before the model runs."""
        for at in (self._flags[rows] & _GRAMMAR).nonzero()[0].tolist():
            grammar = self._extras_of(int(rows[at])).grammar
            assert grammar is not None
            grammar.prepare(int(positions[at]), self._mask_workers)

    def sample(self, logits: Tensor, rows: IntArray, positions: IntArray) -> SampledTokens:
        """Sample one token for each row, and remember it where later tokens depend on it.

        Args:
            logits: [n, vocab_size] float, unchanged.
            rows: [n] persistent rows, each once.
            positions: [n] index in its sequence of the token to sample: prompt and output tokens so far.
        """
        flags = self._flags[rows]
        used = int(np.bitwise_or.reduce(flags))
        params = self._greedy if used & ~_LOGPROBS == 0 else self._gather(rows, positions, flags, used)
        output = sample(logits, params)
        token_ids = output.token_ids.to("cpu", torch.int32).numpy()
        failed = output.failed.cpu().numpy() if bool(output.failed.any()) else None
        errors = {}
        if failed is not None and used & _EXTRAS:
            errors = self._errors(logits, rows, flags, failed)
        ended = None
        if used & (_PENALTIES | _EXTRAS):
            ended = self._remember(rows, positions, flags, token_ids, failed)
        logprobs = self._logprobs(logits, rows, flags, output.token_ids, failed) if used & _LOGPROBS else {}
        return SampledTokens(token_ids, failed, errors, ended, logprobs)

    def needs_host(self, rows: IntArray) -> bool:
        """Whether some of these rows cannot be sampled before the last draw has been waited for."""
        return any(
            extras is not None and (extras.grammar is not None or extras.max_tail > 0)
            for extras in map(self._extras.__getitem__, rows[(self._flags[rows] & _EXTRAS) != 0].tolist())
        )

    def launch(self, logits: Tensor, rows: IntArray, positions: IntArray) -> Draw:
        """Start to sample; the arguments are those of `sample`."""
        return Draw(self.sample(logits, rows, positions), self._device)

    def _make_extras(
        self,
        params: SamplingParams,
        grammar: Grammar | None,
        prompt_token_ids: Sequence[int] | IntArray,
        output_token_ids: Sequence[int] | IntArray,
        stop_token_ids: Collection[int],
    ) -> _Extras | None:
        num_prompt_tokens = len(prompt_token_ids)
        stops_early = params.min_tokens > len(output_token_ids) and len(stop_token_ids) > 0
        has_lists = params.logit_bias or params.allowed_token_ids or params.bad_words_token_ids
        if not (has_lists or stops_early or grammar is not None):
            return None
        bitmask = bias = None
        if params.allowed_token_ids is not None:
            ids = np.unique(np.asarray(params.allowed_token_ids, dtype=np.int64))
            bits = np.zeros(-(-self._vocab_size // 32) * 32, dtype=np.bool_)
            bits[ids] = True
            bitmask = np.packbits(bits, bitorder="little").view(np.int32)
        if params.logit_bias:
            values = np.fromiter(params.logit_bias.values(), dtype=np.float32)
            bias = (np.fromiter(params.logit_bias.keys(), dtype=np.int64), values)
        endings = [(list(ids[:-1]), ids[-1]) for ids in params.bad_words_token_ids if len(ids) > 1]
        max_tail = max((len(before) for before, _ in endings), default=0)
        tail = [int(token_id) for token_id in output_token_ids[-max_tail:]] if max_tail else []
        if missing := max_tail - len(tail):
            tail = [int(token_id) for token_id in prompt_token_ids[-missing:]] + tail
        extras = _Extras(
            bitmask=bitmask,
            bias=bias,
            stops=np.array(sorted(stop_token_ids), dtype=np.int64),
            stops_from=num_prompt_tokens + params.min_tokens,
            banned=np.array([ids[0] for ids in params.bad_words_token_ids if len(ids) == 1], dtype=np.int64),
            bad_endings=endings,
            tail=tail,
            max_tail=max_tail,
            grammar=None,
        )
        if grammar is not None:
            extras.grammar = RowGrammar(
                grammar.start([int(token_id) for token_id in output_token_ids]),
                vocab_size=self._vocab_size,
                stops=extras.stops,
                stops_from=extras.stops_from,
                allowed=bitmask,
            )
        return extras

    def _reserve(self, num_seen: int) -> None:
        """Make room for that many distinct tokens in every row: memory follows the longest penalised sequence."""
        max_num_seqs, capacity = self._seen_ids.shape
        if num_seen > capacity:
            added = np.empty((max_num_seqs, max(num_seen - capacity, capacity, 256)), dtype=np.int32)
            self._seen_ids = np.concatenate((self._seen_ids, added), axis=1)
            self._seen_counts = np.concatenate((self._seen_counts, added), axis=1)

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _gather(self, rows: IntArray, positions: IntArray, flags: npt.NDArray[np.uint8], used: int) -> SampleParams:
        tensor = self._tensor
        penalties = None
        if used & _PENALTIES:
            at = (flags & _PENALTIES).nonzero()[0]
            penalised = rows[at]
            penalties = Penalties(
                rows=tensor(at),
                repetition=tensor(self._repetition[penalised]),
                presence=tensor(self._presence[penalised]),
                frequency=tensor(self._frequency[penalised]),
                state_rows=tensor(penalised.astype(np.int64)),
                seen_ids=tensor(self._seen_ids),
                seen_counts=tensor(self._seen_counts),
                num_seen=tensor(self._num_seen),
            )
        allowed, banned, bias = self._gather_extras(rows, positions, flags) if used & _EXTRAS else (None, None, None)
        is_drawn = used & _DRAWN
        return SampleParams(
            num_valid_ids=self._num_valid_ids,
            temperature=tensor(self._temperature[rows]) if is_drawn else None,
            top_k=tensor(self._top_k[rows]) if used & _TOP_K else None,
            top_p=tensor(self._top_p[rows]) if used & _TOP_P else None,
            min_p=tensor(self._min_p[rows]) if used & _MIN_P else None,
            seed=tensor(self._seed[rows]) if is_drawn else None,
            choice=tensor(self._choice[rows]) if is_drawn else None,
            position=tensor(np.asarray(positions, dtype=np.int64)) if is_drawn else None,
            allowed=allowed,
            banned=banned,
            bias=bias,
            penalties=penalties,
        )

    def _gather_extras(
        self, rows: IntArray, positions: IntArray, flags: npt.NDArray[np.uint8]
    ) -> tuple[AllowedTokens | None, BannedTokens | None, LogitBias | None]:
        allowed: list[tuple[int, npt.NDArray[np.int32]]] = []
        banned: list[tuple[int, IntArray]] = []
        bias: list[tuple[int, IntArray, npt.NDArray[np.float32]]] = []
        for at in (flags & _EXTRAS).nonzero()[0].tolist():
            extras = self._extras_of(int(rows[at]))
            if extras.grammar is not None:
                allowed.append((at, extras.grammar.mask(int(positions[at]))))
            elif extras.bitmask is not None:
                allowed.append((at, extras.bitmask))
            if extras.bias is not None:
                bias.append((at, *extras.bias))
            banned += [(at, ids) for ids in extras.banned_at(int(positions[at])) if len(ids)]
        tensor = self._tensor
        return (
            AllowedTokens(
                tensor(np.array([at for at, _ in allowed])), tensor(np.stack([bitmask for _, bitmask in allowed]))
            )
            if allowed
            else None,
            BannedTokens(
                tensor(np.repeat([at for at, _ in banned], [len(ids) for _, ids in banned])),
                tensor(np.concatenate([ids for _, ids in banned])),
            )
            if banned
            else None,
            LogitBias(
                tensor(np.repeat([at for at, _, _ in bias], [len(ids) for _, ids, _ in bias])),
                tensor(np.concatenate([ids for _, ids, _ in bias])),
                tensor(np.concatenate([values for _, _, values in bias])),
            )
            if bias
            else None,
        )

    def _extras_of(self, row: int) -> _Extras:
        extras = self._extras[row]
        assert extras is not None, f"row {row} is flagged for features it does not have"
        return extras

    def _errors(
        self, logits: Tensor, rows: IntArray, flags: npt.NDArray[np.uint8], failed: npt.NDArray[np.bool_]
    ) -> dict[int, RowError]:
        """Return why rows failed whose logits were finite."""
        errors: dict[int, RowError] = {}
        for at in ((flags & _EXTRAS != 0) & failed).nonzero()[0].tolist():
            if bool(logits[at, : self._num_valid_ids].amax().isfinite()):
                extras = self._extras_of(int(rows[at]))
                detail = extras.grammar.error if extras.grammar is not None else ""
                if detail:
                    errors[at] = RowError(f"structured_outputs cannot go on: {detail}", "structured_outputs")
                else:
                    limits = {"allowed_token_ids": extras.bitmask, "structured_outputs": extras.grammar}
                    given = [name for name, limit in limits.items() if limit is not None]
                    errors[at] = RowError(NOTHING_LEFT, (*given, "bad_words")[0])
        return errors

    def _remember(
        self,
        rows: IntArray,
        positions: IntArray,
        flags: npt.NDArray[np.uint8],
        token_ids: npt.NDArray[np.int32],
        failed: npt.NDArray[np.bool_] | None,
    ) -> npt.NDArray[np.bool_] | None:
        """Note the tokens of rows that did not fail; return those whose output ends with theirs."""
        ended: npt.NDArray[np.bool_] | None = None
        flags = flags if failed is None else np.where(failed, np.uint8(0), flags)
        for at in (flags & _EXTRAS).nonzero()[0].tolist():
            extras, token_id = self._extras_of(int(rows[at])), int(token_ids[at])
            extras.append(token_id)
            if extras.grammar is not None and extras.grammar.accept(token_id, int(positions[at])):
                ended = np.zeros(len(rows), dtype=np.bool_) if ended is None else ended
                ended[at] = True
        self._count(rows, flags, token_ids)
        return ended

    def _count(self, rows: IntArray, flags: npt.NDArray[np.uint8], token_ids: npt.NDArray[np.int32]) -> None:
        """Count the tokens of penalised rows."""
        at_penalised = (flags & _PENALTIES).nonzero()[0]
        if not len(at_penalised):
            return
        rows, token_ids = rows[at_penalised], token_ids[at_penalised]
        num_seen = self._num_seen[rows]
        columns = np.arange(num_seen.max())
        self._reserve(len(columns) + 1)
        match = (self._seen_ids[rows, : len(columns)] == token_ids[:, None]) & (columns < num_seen[:, None])
        is_new = ~match.any(axis=1)
        column = np.where(is_new, num_seen, match.argmax(axis=1))
        self._seen_ids[rows, column] = token_ids
        self._seen_counts[rows, column] = np.where(is_new, 0, self._seen_counts[rows, column]) + 1
        self._num_seen[rows] += is_new

    def _logprobs(
        self,
        logits: Tensor,
        rows: IntArray,
        flags: npt.NDArray[np.uint8],
        token_ids: Tensor,
        failed: npt.NDArray[np.bool_] | None,
    ) -> dict[int, LogprobEntry]:
        wanted = (flags & _LOGPROBS) != 0
        if failed is not None:
            wanted &= ~failed
        at = wanted.nonzero()[0]
        if not len(at):
            return {}
        if len(at) < len(rows):
            index = self._tensor(at)
            logits, token_ids = logits[index], token_ids[index]
        num_top = self._num_logprobs[rows[at]]
        logits = logits[:, : self._num_valid_ids]
        found = log_softmax_top(logits, min(int(num_top.max()), logits.shape[1]), token_ids)
        return dict(zip(at.tolist(), logprob_entries(found, num_top.tolist()), strict=True))


def logprob_entries(found: LogprobOutput, num_top: Sequence[int] | None = None) -> list[LogprobEntry]:
    """Return one entry per row of what `log_softmax_top` found.

    Args:
        found: with the log-probability of one chosen token per row.
        num_top: [n] how many top tokens each row reports; None: all that were found.
    """
    assert found.values is not None
    assert found.ranks is not None
    values, ranks = found.values.tolist(), found.ranks.tolist()
    top_ids, top_values = found.top_ids.tolist(), found.top_values.tolist()
    if num_top is not None:
        top_ids = [ids[:num] for ids, num in zip(top_ids, num_top, strict=True)]
        top_values = [numbers[:num] for numbers, num in zip(top_values, num_top, strict=True)]
    return [LogprobEntry(*entry) for entry in zip(values, ranks, top_ids, top_values, strict=True)]
