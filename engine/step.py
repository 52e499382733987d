"""This module holds the contract of one step: what scheduler, runner and fronts tell each other. It does not know them.

Everything that goes with every row of every step is an array by position in the batch; full data of a sequence crosses
once, when it gets its row, and differences after that. All arrays are numpy, on the host, and are never written again
after they were handed over.

Order of rows in a step: first those with at most `MAX_DECODE_QUERY_LEN` tokens to run, then the others, so that two
slices of every tensor suffice, each with its own attention call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .sampling_params import SamplingParams

__all__ = [
    "MAX_DECODE_QUERY_LEN",
    "CompletionOutput",
    "EngineOutput",
    "FinishReason",
    "Grammar",
    "GrammarState",
    "LogprobEntry",
    "ModelOutput",
    "ModelRunner",
    "NewSequence",
    "RequestMetrics",
    "RequestOutput",
    "RowError",
    "SchedulerOutput",
    "StepHandle",
]

MAX_DECODE_QUERY_LEN = 16
"""Rows with at most this many tokens to run go through decode attention."""

Int32Array = npt.NDArray[np.int32]


class FinishReason(StrEnum):
    """Why a sequence ended, as users are told."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class GrammarState(Protocol):
    """How far one sequence is in its grammar. Only one thread at a time may use it."""

    @property
    def may_end(self) -> bool:
        """Whether the output so far is complete; more may still follow."""
        ...

    @property
    def must_end(self) -> bool:
        """Whether the output so far is complete and no token can follow."""
        ...

    @property
    def error(self) -> str:
        """Why the grammar cannot be followed any further; "" while it can."""
        ...

    def fill(self, bitmask: Int32Array) -> None:
        """Write which tokens may come next; may run beside the model, without holding up other threads.

        Args:
            bitmask: [ceil(vocab_size / 32)] one bit per token id, low bits first. No tokens where there is an error.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Go on by a token that `fill` allowed."""
        ...


class Grammar(Protocol):
    """What outputs must look like: immutable, shared by the n choices of a request and by requests."""

    def start(self, output_token_ids: Sequence[int]) -> GrammarState:
        """Return the state after some output: none at first, all so far where a sequence resumes."""
        ...


@dataclass(frozen=True, slots=True)
class NewSequence:
    """Everything the runner needs of a sequence that gets a row: started, or resumed after preemption."""

    row: int
    token_ids: Int32Array
    """[num_tokens] prompt plus output so far."""
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    index: int
    """Which of the n choices; part of the sampling noise."""
    stop_token_ids: frozenset[int]
    """Banned while fewer than `params.min_tokens` outputs exist."""
    grammar: Grammar | None = None
    """What the output must look like; None: anything."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The work of one step."""

    step: int
    """Counts from 0."""
    removed_rows: Int32Array
    """Rows whose sequence left since the last step; to be applied before `new_sequences`, which may reuse them.

    A step that failed is repeated here, so a row may be named that the runner has already taken out or never had.
    """
    new_sequences: tuple[NewSequence, ...]
    rows: Int32Array
    """[num_seqs] rows that run, in batch order; each once."""
    num_computed_tokens: Int32Array
    """[num_seqs] KV entries each row has before this step."""
    num_scheduled_tokens: Int32Array
    """[num_seqs] tokens each row runs in this step; at least 1."""
    num_tokens: int
    """Sum of `num_scheduled_tokens`."""
    num_decodes: int
    """The first so many rows run at most `MAX_DECODE_QUERY_LEN` tokens."""
    num_decode_tokens: int
    """Tokens of those rows."""
    sampled: Int32Array
    """[num_sampled] positions in the batch, ascending, of rows that catch up with their tokens and sample one."""
    block_rows: Int32Array
    """[num_new_blocks] row of each block that joins a block table in this step."""
    block_columns: Int32Array
    """[num_new_blocks] its place in that row's table."""
    block_ids: Int32Array
    """[num_new_blocks] its physical block."""


class LogprobEntry(NamedTuple):
    """Log-probabilities at one position, of the model's own distribution over the ids that the tokenizer has, before
    penalties and temperature.
    """

    logprob: float
    """Of the token that is there; -inf where it is an id of a prompt that the tokenizer does not have."""
    rank: int
    """How many tokens are at least as likely as it: 1 for the likeliest."""
    top_ids: list[int]
    """The likeliest tokens, in descending order; ties to the lower id."""
    top_logprobs: list[float]


class RowError(NamedTuple):
    """What a request has asked for that leaves no token to sample."""

    reason: str
    param: str
    """The field of the request that says so."""


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What one step computed; rows that asked for more than a token have it by their position in `sampled`."""

    token_ids: Int32Array
    """[num_sampled] one token per entry of `SchedulerOutput.sampled`."""
    failed: npt.NDArray[np.bool_] | None = None
    """[num_sampled] rows whose logits were not finite, or for which `errors` has another reason; their token means
    nothing. None: no row failed.
    """
    errors: Mapping[int, RowError] = field(default_factory=dict)
    """By position in `sampled`: why a row failed although its logits were finite."""
    ended: npt.NDArray[np.bool_] | None = None
    """[num_sampled] rows whose grammar lets nothing follow their token. None: no row."""
    logprobs: Mapping[int, LogprobEntry] = field(default_factory=dict)
    """By position in `sampled`."""
    prompt_logprobs: Mapping[int, list[LogprobEntry]] = field(default_factory=dict)
    """By row: one entry for each position of this chunk whose next token belongs to the prompt, about that token."""
    hidden_states: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    """By position in `sampled`: [num_chosen_layers, hidden_size] of the position that produced the token."""

    def wait(self) -> ModelOutput:
        """Return the output once the device has finished."""
        return self


class StepHandle(Protocol):
    """A step that has been started."""

    def wait(self) -> ModelOutput:
        """Return the output once the device has finished; to be called once, in the order of the steps.

        Whatever went wrong in this step since `execute` returned is raised here.
        """
        ...


class ModelRunner(Protocol):
    """Runs steps, one after the other.

    A step may be started before the one before it has been waited for, but not before the one before that. Its rows
    may then have, as their last token, one that the step before samples and only the device knows:
    `num_computed_tokens` and `num_scheduled_tokens` count it. What an older handle says of a row that has since been
    removed means nothing.
    """

    def execute(self, step: SchedulerOutput) -> StepHandle:
        """Start the step and return a handle to its output, without waiting for the device."""
        ...


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Where the time of a sequence went, in seconds of the engine's clock; None: never got there."""

    arrival_time_s: float
    first_scheduled_time_s: float | None
    first_token_time_s: float | None
    finish_time_s: float | None
    num_cached_tokens: int
    num_preemptions: int


class EngineOutput(NamedTuple):
    """News of one sequence: its tokens since the last news, and how it ended if it did.

    One is made for every row that streams in every step: a tuple takes a quarter of a frozen dataclass's time, and
    crosses a pipe as an array, without the names of its fields.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of news
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token that ended it."""
    error: str | None = None
    """Why, where the reason is ERROR."""
    error_param: str | None = None
    """The field of the request that it comes from; None: the request is not to blame."""
    new_logprobs: Sequence[LogprobEntry] = ()
    prompt_logprobs: list[LogprobEntry] | None = None
    """Complete, with the last news."""
    hidden_states: npt.NDArray[np.float32] | None = None
    """[num_output_tokens, num_chosen_layers, hidden_size], with the last news."""
    metrics: RequestMetrics | None = None
    """With the last news."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the n answers to a request."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for an end-of-sequence token or a limit."""
    logprobs: list[LogprobEntry] | None = None
    hidden_states: npt.NDArray[np.float32] | None = None
    error: str | None = None
    error_param: str | None = None
    """See `EngineOutput.error_param`."""
    metrics: RequestMetrics | None = None


@dataclass(slots=True)
class RequestOutput:
    """The answer to one request, as the fronts return it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[LogprobEntry | None] | None = None
    """One entry per prompt token; None for the first, which nothing predicts."""
    num_cached_tokens: int = 0
