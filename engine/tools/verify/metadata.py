"""This module holds the metadata detector: positions, slots and tables recomputed from token ids. It does not know
hidden states.

It keeps books of its own, from what the scheduler hands out and nothing else: each row's tokens and blocks, and for
every slot of the cache a hash of the tokens that led to what was last written there. A step must read nothing but
slots whose hash is that of its own prefix, so a block that belongs to somebody else, a stale one, or one never written
is found when it is first read, whoever put it into the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...layers.attention import AttentionSlice
from ...step import SchedulerOutput
from .forced import Step
from .texts import Text

__all__ = ["ExpectedPart", "ExpectedStep", "MetadataDetector", "Mismatch"]

IntArray = npt.NDArray[np.integer[Any]]
_PRIME = 2**61 - 1


class ExpectedPart(NamedTuple):
    """What one attention call should be told; int32, on the host."""

    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


class ExpectedStep(NamedTuple):
    """What a step should be told, from the token ids and the scheduler's decision alone."""

    token_ids: IntArray
    positions: IntArray
    slots: IntArray
    """[T] each."""
    decode: ExpectedPart | None
    prefill: ExpectedPart | None


class Mismatch(NamedTuple):
    """Something that a step was told wrongly."""

    what: str
    """"positions", "slot_mapping", "block_table", ..."""
    reader: str
    """The op that reads it first."""
    row: int
    """Of the step's tokens: the first one concerned."""
    message: str


class MetadataDetector:
    """Follows a scheduler and checks what the decoder is told.

    Args:
        texts: by the seed of their sequences.
        num_blocks: blocks of the pool, without the null block.
        block_size: tokens per block.
    """

    def __init__(self, texts: Sequence[Text], num_blocks: int, block_size: int) -> None:
        self._texts = [text.token_ids for text in texts]
        self._chains = [_chain(text.token_ids) for text in texts]
        """Per text, a hash of each prefix."""
        self._block_size = block_size
        self._text_of: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}
        self._computed: dict[int, int] = {}
        self._written = np.zeros((num_blocks + 1) * block_size, dtype=np.int64)
        """[num_slots] the hash of the prefix whose last token's keys and values lie there; 0: nothing does."""
        self._found: list[Mismatch] = []

    def begin(self, work: SchedulerOutput) -> ExpectedStep:
        """Take in a step that is about to be run, and return what it should be told."""
        self._found = []
        for sequence in work.new_sequences:
            row, length = sequence.row, len(sequence.token_ids)
            self._text_of[row], self._tables[row] = sequence.seed, []
            self._computed.pop(row, None)
            text = self._texts[sequence.seed]
            assert sequence.token_ids.tolist() == text[:length], "a row begins with other tokens than its text"
        for row, column, block in zip(work.block_rows, work.block_columns, work.block_ids, strict=True):
            assert column == len(self._tables[int(row)]), "block tables grow at their end"
            self._tables[int(row)].append(int(block))
        slots = []
        starts = (np.cumsum(work.num_scheduled_tokens) - work.num_scheduled_tokens).tolist()
        for start, (row, first, count) in zip(starts, self._rows(work), strict=True):
            if self._computed.get(row, first) != first:
                self._note("num_computed_tokens", "the scheduler", start, first, self._computed[row])
            row_slots = self._slots(row, first + count)
            slots.append(row_slots[first:])
            wrong = np.flatnonzero(self._written[row_slots[:first]] != self._chains[self._text_of[row]][:first])
            if len(wrong):
                message = (
                    f"position {wrong[0]} is to be read from slot {row_slots[wrong[0]]} (block "
                    f"{row_slots[wrong[0]] // self._block_size}), where the keys of other tokens, or none, were written"
                )
                self._found.append(Mismatch("block_table", "paged attention", start, message))
            self._computed[row] = first + count
        rows = list(self._rows(work))
        token_ids = [self._texts[self._text_of[row]][first : first + count] for row, first, count in rows]
        return ExpectedStep(
            np.concatenate(token_ids),
            np.concatenate([np.arange(first, first + count) for _, first, count in rows]),
            np.concatenate(slots),
            self._part(rows[: work.num_decodes]),
            self._part(rows[work.num_decodes :]),
        )

    def end(self, step: Step, expected: ExpectedStep) -> list[Mismatch]:
        """Take in a step that has been run, and return what it was told wrongly, in the order in which it is read."""
        work, metadata = step.work, step.metadata
        self._compare("token_ids", "embedding", step.token_ids, expected.token_ids)
        self._compare("positions", "write_kv", metadata.positions, expected.positions)
        self._compare("slot_mapping", "write_kv", metadata.slot_mapping, expected.slots)
        if metadata.num_decode_tokens != work.num_decode_tokens:
            self._note("num_decode_tokens", "attention", 0, metadata.num_decode_tokens, work.num_decode_tokens)
        self._check_part("paged_attention_decode", metadata.decode, expected.decode, 0)
        self._check_part("paged_attention_prefill", metadata.prefill, expected.prefill, work.num_decode_tokens)
        chains = [self._chains[self._text_of[row]][first : first + count] for row, first, count in self._rows(work)]
        self._written[expected.slots] = np.concatenate(chains)
        return self._found

    def _rows(self, work: SchedulerOutput) -> Iterator[tuple[int, int, int]]:
        """Yield (row, first position, number of tokens)."""
        return zip(
            work.rows.tolist(), work.num_computed_tokens.tolist(), work.num_scheduled_tokens.tolist(), strict=True
        )

    def _slots(self, row: int, stop: int) -> IntArray:
        """Return the slots of a row's positions up to `stop`."""
        block, offset = np.divmod(np.arange(stop), self._block_size)
        return np.array(self._tables[row], dtype=np.int64)[block] * self._block_size + offset

    def _part(self, rows: Sequence[tuple[int, int, int]]) -> ExpectedPart | None:
        if not rows:
            return None
        seq_lens = [first + count for _, first, count in rows]
        columns = -(-max(seq_lens) // self._block_size)
        table = torch.zeros((len(rows), columns), dtype=torch.int32)
        for i, (row, _, _) in enumerate(rows):
            blocks = self._tables[row][:columns]
            table[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        starts = np.cumsum([0, *(count for _, _, count in rows)])
        return ExpectedPart(torch.tensor(starts, dtype=torch.int32), torch.tensor(seq_lens, dtype=torch.int32), table)

    def _check_part(self, op: str, found: AttentionSlice | None, expected: ExpectedPart | None, first: int) -> None:
        if found is None or expected is None:
            if (found is None) != (expected is None):
                self._note(op, op, first, "called" if found else "not called", "the other")
            return
        starts = expected.cu_seqlens_q.tolist()
        self._compare("cu_seqlens_q", op, found.cu_seqlens_q, expected.cu_seqlens_q.numpy(), [*starts[:-1], 0], first)
        self._compare("seq_lens", op, found.seq_lens, expected.seq_lens.numpy(), starts, first)
        for i, length in enumerate(expected.seq_lens.tolist()):
            columns = -(-length // self._block_size)
            where = [starts[i]] * columns
            row, wanted = found.block_table[i, :columns], expected.block_table[i, :columns].numpy()
            self._compare("block_table", op, row, wanted, where, first, f"sequence {i}: ")

    def _compare(
        self,
        what: str,
        reader: str,
        found: torch.Tensor,
        expected: IntArray,
        rows: Sequence[int] | None = None,
        first: int = 0,
        which: str = "",
    ) -> None:
        """Note the first entry that differs; `rows` says which token row an entry belongs to, None: its own."""
        values = found.cpu().numpy()
        if values.shape != expected.shape:
            self._note(what, reader, first, f"of shape {list(values.shape)}", f"{list(expected.shape)}")
            return
        wrong = np.flatnonzero(values != expected)
        if len(wrong):
            at = int(wrong[0])
            row = first + (at if rows is None else rows[at])
            message = f"{which}entry {at} is {values[at]}, and {expected[at]} from the token ids; {len(wrong):,} differ"
            self._found.append(Mismatch(what, reader, row, message))

    def _note(self, what: str, reader: str, row: int, found: object, expected: object) -> None:
        self._found.append(Mismatch(what, reader, row, f"is {found}, and {expected} from the token ids"))


def _chain(token_ids: Sequence[int]) -> IntArray:
    """Return a hash of each prefix, never 0."""
    chain, value = [], 1
    for token_id in token_ids:
        value = (value * 1_000_003 + token_id + 1) % _PRIME
        chain.append(value or 1)
    return np.array(chain, dtype=np.int64)
