"""This module holds requests, their states, and the only code that appends tokens. It does not know how they are run.

A user's request with n choices is n sequences; a `Request` here is one sequence, told apart by (request_id, index).
While a request waits it owns its tokens. While it runs it has a persistent row of a `RowTable`, which holds the
tokens and counters of all running requests as arrays, so that a decode step costs a few vector operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from .sampling_params import SamplingParams
from .step import FinishReason, Grammar, LogprobEntry

__all__ = ["Request", "RequestStatus", "RowTable"]

Int32Array = npt.NDArray[np.int32]


class RequestStatus(IntEnum):
    """Where a request is in its life; everything from FINISHED_STOPPED on is final."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOPPED = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORTED = 5
    FINISHED_ERROR = 6

    @property
    def is_finished(self) -> bool:
        """Whether nothing can happen to the request any more."""
        return self >= RequestStatus.FINISHED_STOPPED

    @property
    def finish_reason(self) -> FinishReason | None:
        """What users are told; None while the request lives."""
        return _FINISH_REASONS.get(self)


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: FinishReason.STOP,
    RequestStatus.FINISHED_LENGTH: FinishReason.LENGTH,
    RequestStatus.FINISHED_ABORTED: FinishReason.ABORT,
    RequestStatus.FINISHED_ERROR: FinishReason.ERROR,
}


@dataclass(slots=True, eq=False)
class Request:
    """One autoregressive sequence.

    `token_ids` is prompt plus output, [num_tokens] int32, and is current only while the request has no row.
    Times are in seconds of the engine's clock; None: not reached yet.
    """

    request_id: str
    index: int
    """Which of the n choices this is."""
    token_ids: Int32Array
    num_prompt_tokens: int
    max_num_tokens: int
    """Prompt plus output never grows beyond this."""
    params: SamplingParams
    seed: int
    """Resolved: never None."""
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end this sequence: the request's own, and the model's end-of-sequence ids unless ignored."""
    priority: int = 0
    """Smaller is served earlier, under the priority policy."""
    arrival: int = 0
    """Order of arrival, kept across preemption."""
    grammar: Grammar | None = None
    """What the output must look like; None: anything."""
    cache_salt: str = ""
    """Prefix blocks are shared only between requests of equal salt."""
    stream: bool = False
    """Report every token as it comes, instead of all of them at the end."""
    status: RequestStatus = RequestStatus.WAITING
    row: int = -1
    num_cached_tokens: int = -1
    """Prefix hit of the first admission; -1: not admitted yet."""
    num_preemptions: int = 0
    num_reported_tokens: int = 0
    """Output tokens that have left in an EngineOutput."""
    stop_reason: int | None = None
    logprobs: list[LogprobEntry] = field(default_factory=list)
    """Of output tokens that have not been reported yet."""
    prompt_logprobs: list[LogprobEntry] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as they are computed; kept across preemption."""
    hidden_states: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """One [num_chosen_layers, hidden_size] per output token."""
    digests: list[bytes] = field(default_factory=list)
    """Root of the prefix chain, then the names of the full blocks hashed so far; kept across preemption."""
    arrival_time_s: float = 0.0
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    finish_time_s: float | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """The key by which requests are served: nobody overtakes a smaller one."""
        return (self.priority, self.arrival, self.index)

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether prompt positions must still be computed for the sake of their log-probabilities."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1


class RowTable:
    """Tokens and counters of the running requests, as arrays by row.

    A row is taken at admission and given back at finish or preemption; it never moves in between.

    Args:
        max_num_seqs: number of rows.
        max_model_len: the longest sequence, in tokens.
        vocab_size: width of the logits; all token ids are below it.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, vocab_size: int) -> None:
        # np.empty leaves the pages of rows and positions never reached untouched: they cost no memory.
        self.token_ids: Int32Array = np.empty((max_num_seqs, max_model_len), dtype=np.int32)
        self.num_tokens: Int32Array = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_computed_tokens: Int32Array = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_ahead: Int32Array = np.zeros(max_num_seqs, dtype=np.int32)
        """By row: `num_computed_tokens` once the steps that are out are back."""
        self.num_prompt_tokens: Int32Array = np.zeros(max_num_seqs, dtype=np.int32)
        self.max_num_tokens: Int32Array = np.zeros(max_num_seqs, dtype=np.int32)
        self.streams: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=np.bool_)
        self.requests: list[Request | None] = [None] * max_num_seqs
        # Ids that stop any request seen so far. It only grows: a token that stops somebody else costs one look at the
        # row's own set in `finish_status`, so rows with stop tokens of their own cost nothing until one is sampled.
        self._may_stop: npt.NDArray[np.bool_] = np.zeros(vocab_size, dtype=np.bool_)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        """How many more requests can run."""
        return len(self._free_rows)

    def admit(self, request: Request, num_computed_tokens: int) -> int:
        """Give the request a row, copy its tokens there and return the row."""
        assert request.row < 0, f"{request.request_id} already has row {request.row}"
        row = self._free_rows.pop()
        num_tokens = len(request.token_ids)
        self.token_ids[row, :num_tokens] = request.token_ids
        self.num_tokens[row] = num_tokens
        self.num_computed_tokens[row] = self.num_ahead[row] = num_computed_tokens
        self.num_prompt_tokens[row] = request.num_prompt_tokens
        self.max_num_tokens[row] = request.max_num_tokens
        self.streams[row] = request.stream
        if request.stop_token_ids:
            self._may_stop[list(request.stop_token_ids)] = True
        self.requests[row] = request
        request.row = row
        request.status = RequestStatus.RUNNING
        return row

    def num_tokens_ahead(self, rows: npt.NDArray[np.integer]) -> Int32Array:
        """Return how many tokens rows have once the steps that are out are back: a row that has run all it has samples
        one more.
        """
        num_tokens: Int32Array = np.maximum(self.num_tokens[rows], self.num_ahead[rows] + 1)
        return num_tokens

    def append(self, rows: npt.NDArray[np.integer], token_ids: Int32Array) -> npt.NDArray[np.bool_]:
        """Append one sampled token to each row.

        Args:
            rows: [num_sampled] int32, distinct.
            token_ids: [num_sampled] int32.

        Returns:
            [num_sampled] bool: rows that may be finished now (a stop token or the length limit); `finish_status`
            says of one such row whether and why.
        """
        position = self.num_tokens[rows]
        self.token_ids[rows, position] = token_ids
        position += 1
        self.num_tokens[rows] = position
        done = self._may_stop[token_ids]
        done |= position >= self.max_num_tokens[rows]
        return done

    def finish_status(self, row: int) -> tuple[RequestStatus, int | None] | None:
        """Return the final status and the stop token of a row that `append` pointed out, or None if it goes on."""
        request = self.request(row)
        num_tokens = int(self.num_tokens[row])
        last = int(self.token_ids[row, num_tokens - 1])
        if last in request.stop_token_ids:
            return RequestStatus.FINISHED_STOPPED, last
        if num_tokens >= request.max_num_tokens:
            return RequestStatus.FINISHED_LENGTH, None
        return None

    def request(self, row: int) -> Request:
        """Return the request that has this row."""
        request = self.requests[row]
        assert request is not None, f"row {row} is free"
        return request

    def release(self, row: int) -> Request:
        """Take the row back, with its tokens copied into the request, and return the request."""
        request = self.request(row)
        request.token_ids = self.token_ids[row, : self.num_tokens[row]].copy()
        request.row = -1
        self.requests[row] = None
        self._free_rows.append(row)
        return request

    def output_token_ids(self, request: Request, start: int = 0) -> list[int]:
        """Return the output tokens of a request from the `start`-th on, whether it has a row or not."""
        start += request.num_prompt_tokens
        if request.row < 0:
            return request.token_ids[start:].tolist()  # type: ignore[no-any-return]
        return self.token_ids[request.row, start : self.num_tokens[request.row]].tolist()  # type: ignore[no-any-return]
