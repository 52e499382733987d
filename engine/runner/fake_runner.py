"""This module holds a runner whose tokens are hashes that prove the scheduler right. It does not know models or torch.

It sees only what any runner sees: the differences in each `SchedulerOutput`. Its KV cache holds one 64-bit number per
slot, written and read through block tables it keeps itself:

    kv[p]  = kv[p - 1] + mix(token[p], p)            the sum of a whole prefix, as KV depends on all tokens before
    read   = sum of mix(kv[q], q) for q in [0, p]    every slot of the sequence, in its place
    token  = mix(read, seed, index, p) mod alphabet

All sums wrap at 64 bits. One wrong slot, a stale table entry, a block used again too early or a prefix of somebody else
changes every token after it. `reference_tokens` is the same recurrence for one sequence, without slots or batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..step import LogprobEntry, ModelOutput, NewSequence, SchedulerOutput

__all__ = ["FakeRunner", "InjectedError", "kv_after", "reference_stream", "reference_tokens"]

UInt64Array = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_POSITION = 0x9E3779B97F4A7C15
_INDEX = 0xD1342543DE82EF95
_FACTOR = 0xBF58476D1CE4E5B9
MAX_DRAWS = 64
"""How often a token that may not come yet is drawn again before it is taken all the same."""


class InjectedError(RuntimeError):
    """What a `FakeRunner` raises when it was told to."""


def _mix(value: int, place: int) -> int:
    """Return a 64-bit hash of a number and its place: one round of a multiply and xor-shift."""
    value = (value + (place + 1) * _POSITION) & _MASK
    value = ((value ^ (value >> 31)) * _FACTOR) & _MASK
    return value ^ (value >> 29)


def _mix_array(values: UInt64Array, places: UInt64Array) -> UInt64Array:
    """The same as `_mix`, for arrays of one shape."""
    mixed = (places + np.uint64(1)) * np.uint64(_POSITION)
    mixed += values
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(_FACTOR)
    mixed ^= mixed >> np.uint64(29)
    return mixed


def kv_after(kv: int, token_id: int, position: int) -> int:
    """Return what the slot of a token holds, given what the slot before it holds (0 before the first)."""
    return (kv + _mix(token_id, position)) & _MASK


def _draw(read: int, salt: int, position: int, alphabet: int, banned: frozenset[int]) -> int:
    state = (read + salt) & _MASK
    token = 0
    for _ in range(MAX_DRAWS):
        state = _mix(state, position)
        token = state % alphabet
        if token not in banned:
            break
    return token


def _salt(seed: int, index: int) -> int:
    return (_mix(seed & _MASK, 0) + (index + 1) * _INDEX) & _MASK


class FakeRunner:
    """Runs steps on hashes in place of tensors, as fast as numpy allows.

    Args:
        num_blocks: of the KV pool, without the null block.
        block_size: tokens per block.
        max_num_seqs: rows.
        max_model_len: longest sequence, tokens.
        alphabet: sampled ids are below it; at most the vocabulary's size.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int, alphabet: int
    ) -> None:
        self.block_size = block_size
        self.alphabet = alphabet
        # A slot nobody has written holds what its last owner left; these bits are no sum of anything.
        self.slots: UInt64Array = np.full((num_blocks + 1) * block_size, 0xDEADDEADDEADDEAD, dtype=np.uint64)
        self.block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int64)
        self.token_ids = np.zeros((max_num_seqs, max_model_len), dtype=np.int64)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.sequences: list[NewSequence | None] = [None] * max_num_seqs
        self.fail_next: Literal["before", "after"] | None = None
        """Raise `InjectedError` in the next step, before or after its KV is written."""
        self.nan_rows: set[int] = set()
        """Rows that fail when they next sample."""
        self._salts: UInt64Array = np.zeros(max_num_seqs, dtype=np.uint64)
        self._is_special = np.zeros(max_num_seqs, dtype=np.bool_)

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Run one step on the host, at once.

        Raises:
            InjectedError: `fail_next` was set.
        """
        fail_next, self.fail_next = self.fail_next, None
        if fail_next == "before":
            raise InjectedError("told to fail before writing")
        self._apply(step)
        rows = step.rows.astype(np.int64)
        computed = step.num_computed_tokens.astype(np.int64)
        ends = computed + step.num_scheduled_tokens
        values = self._write(rows, computed, ends)
        if fail_next == "after":
            raise InjectedError("told to fail after writing")
        sampled = rows[step.sampled]
        reads = self._read(sampled, ends[step.sampled])
        token_ids = self._sample(sampled, reads)
        self.token_ids[sampled, self.num_tokens[sampled]] = token_ids
        self.num_tokens[sampled] += 1
        logprobs, prompt_logprobs, hidden_states = (
            self._extras(step, token_ids, reads, values) if self._is_special[rows].any() else ({}, {}, {})
        )
        return ModelOutput(
            token_ids=token_ids.astype(np.int32),
            failed=self._failed(sampled),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            hidden_states=hidden_states,
        )

    def _apply(self, step: SchedulerOutput) -> None:
        """Bring rows and block tables up to date."""
        for row in step.removed_rows.tolist():
            self.sequences[row] = None
            self.num_tokens[row] = 0
            self.block_table[row] = 0
        for sequence in step.new_sequences:
            row, params = sequence.row, sequence.params
            assert self.sequences[row] is None, f"row {row} is given twice"
            self.sequences[row] = sequence
            self.token_ids[row, : len(sequence.token_ids)] = sequence.token_ids
            self.num_tokens[row] = len(sequence.token_ids)
            self._salts[row] = _salt(sequence.seed, sequence.index)
            self._is_special[row] = (
                params.min_tokens > 0
                or params.logprobs is not None
                or params.prompt_logprobs is not None
                or params.return_hidden_states is not None
            )
        self.block_table[step.block_rows, step.block_columns] = step.block_ids

    def _slots_of(self, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the slot of each (row, position), both [n]."""
        columns, offsets = np.divmod(positions, self.block_size)
        return self.block_table[rows, columns] * self.block_size + offsets

    def _write(
        self, rows: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
    ) -> UInt64Array:
        """Write the KV of positions [starts, ends) of each row and return it, [num_tokens]."""
        lengths = ends - starts
        firsts = np.cumsum(lengths) - lengths
        which = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(len(which)) - firsts[which] + starts[which]
        token_rows = rows[which]
        values: UInt64Array = _mix_array(
            self.token_ids[token_rows, positions].astype(np.uint64), positions.astype(np.uint64)
        )
        going_on = np.flatnonzero(starts > 0)
        before = np.zeros(len(rows), dtype=np.uint64)
        before[going_on] = self.slots[self._slots_of(rows[going_on], starts[going_on] - 1)]
        sums = np.cumsum(values, dtype=np.uint64)
        values = sums + (before - (sums - values)[firsts])[which]
        self.slots[self._slots_of(token_rows, positions)] = values
        return values

    def _read(self, rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> UInt64Array:
        """Return the hash of all slots [0, length) of each row, [num_sampled]."""
        if len(rows) == 0:
            return np.empty(0, dtype=np.uint64)
        firsts = np.cumsum(lengths) - lengths
        which = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(len(which)) - firsts[which]
        values = self.slots[self._slots_of(rows[which], positions)]
        reads: UInt64Array = np.add.reduceat(_mix_array(values, positions.astype(np.uint64)), firsts)
        return reads

    def _sample(self, rows: npt.NDArray[np.int64], reads: UInt64Array) -> npt.NDArray[np.int64]:
        """Return one token for each row, at the position after its last."""
        states = _mix_array(reads + self._salts[rows], self.num_tokens[rows].astype(np.uint64))
        token_ids: npt.NDArray[np.int64] = (states % np.uint64(self.alphabet)).astype(np.int64)
        for place in np.flatnonzero(self._is_special[rows]).tolist():
            row = int(rows[place])
            sequence = self._sequence(row)
            num_outputs = int(self.num_tokens[row]) - sequence.num_prompt_tokens
            if num_outputs < sequence.params.min_tokens:
                salt, position = int(self._salts[row]), int(self.num_tokens[row])
                token_ids[place] = _draw(int(reads[place]), salt, position, self.alphabet, sequence.stop_token_ids)
        return token_ids

    def _failed(self, sampled: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_] | None:
        if not self.nan_rows:
            return None
        failed = np.isin(sampled, list(self.nan_rows))
        self.nan_rows -= set(sampled[failed].tolist())
        return failed

    def _extras(
        self, step: SchedulerOutput, token_ids: npt.NDArray[np.int64], reads: UInt64Array, kv: UInt64Array
    ) -> tuple[dict[int, LogprobEntry], dict[int, list[LogprobEntry]], dict[int, npt.NDArray[np.float32]]]:
        """Return log-probabilities, prompt log-probabilities and hidden states, made from hashes, where asked for."""
        logprobs: dict[int, LogprobEntry] = {}
        prompt_logprobs: dict[int, list[LogprobEntry]] = {}
        hidden_states: dict[int, npt.NDArray[np.float32]] = {}
        for place, (position, read) in enumerate(zip(step.sampled.tolist(), reads.tolist(), strict=True)):
            params = self._sequence(int(step.rows[position])).params
            if params.logprobs is not None:
                logprobs[place] = _entry(read, int(token_ids[place]))
            if params.return_hidden_states is not None:
                hidden_states[place] = np.full((len(params.return_hidden_states), 1), read % 1021, dtype=np.float32)
        firsts = np.cumsum(step.num_scheduled_tokens) - step.num_scheduled_tokens
        for position, row in enumerate(step.rows.tolist()):
            sequence = self._sequence(row)
            start, count = int(step.num_computed_tokens[position]), int(step.num_scheduled_tokens[position])
            end = min(start + count, sequence.num_prompt_tokens - 1)
            if sequence.params.prompt_logprobs is not None and start < end:
                chunk = kv[firsts[position] :][: end - start].tolist()
                following = self.token_ids[row, start + 1 : end + 1].tolist()
                prompt_logprobs[row] = [_entry(read, token) for read, token in zip(chunk, following, strict=True)]
        return logprobs, prompt_logprobs, hidden_states

    def _sequence(self, row: int) -> NewSequence:
        sequence = self.sequences[row]
        assert sequence is not None, f"row {row} runs but nobody is there"
        return sequence


def _entry(read: int, token_id: int) -> LogprobEntry:
    logprob = -(read % 997) / 100.0
    return LogprobEntry(logprob, 1, [token_id], [logprob])


def reference_stream(
    prompt_token_ids: Sequence[int],
    *,
    seed: int,
    index: int = 0,
    alphabet: int,
    min_tokens: int = 0,
    stop_token_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Generate without end the tokens a `FakeRunner` must sample after a prompt, one sequence at a time.

    Args:
        prompt_token_ids: at least one token.
        seed: of the request, resolved.
        index: which of its n choices.
        alphabet: the runner's.
        min_tokens: that many outputs are drawn without the stop tokens.
        stop_token_ids: the sequence's own; the stream goes on after them.
    """
    salt = _salt(seed, index)
    kv = read = position = 0
    waiting: list[int] = list(prompt_token_ids)
    num_outputs = 0
    while True:
        for token in waiting:
            kv = kv_after(kv, token, position)
            read = (read + _mix(kv, position)) & _MASK
            position += 1
        banned = stop_token_ids if num_outputs < min_tokens else frozenset()
        token = _draw(read, salt, position, alphabet, banned)
        yield token
        num_outputs += 1
        waiting = [token]


def reference_tokens(
    prompt_token_ids: Sequence[int],
    num_tokens: int,
    *,
    seed: int,
    index: int = 0,
    alphabet: int,
    min_tokens: int = 0,
    stop_token_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """Return the first tokens of `reference_stream`, up to and including the first stop token or `num_tokens`."""
    token_ids: list[int] = []
    stream = reference_stream(
        prompt_token_ids,
        seed=seed,
        index=index,
        alphabet=alphabet,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
    )
    for token in islice(stream, num_tokens):
        token_ids.append(token)
        if token in stop_token_ids:
            break
    return token_ids
