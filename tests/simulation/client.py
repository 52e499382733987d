"""This module holds what a user of the engine knows and may expect of one sequence. It does not know the scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import EngineOutput, FinishReason

__all__ = ["Sequence", "Violation", "check"]


class Violation(AssertionError):  # noqa: N818 (what it reports is a broken invariant, by its name)
    """An invariant does not hold; `name` says which."""

    def __init__(self, name: str, message: str) -> None:
        self.name = name
        super().__init__(f"{name}: {message}")


def check(name: str, holds: object, message: str) -> None:
    """Raise where an invariant does not hold."""
    if not holds:
        raise Violation(name, message)


@dataclass(slots=True)
class Sequence:
    """One of the n sequences of a request, as its user sees it."""

    request_id: str
    index: int
    arrival: int
    priority: int
    salt: str
    prompt: list[int]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    max_tokens: int
    reference: Iterator[int]
    stop_pair: tuple[int, int] | None
    """A stop string that straddles two tokens: the sequence is cut where they first follow each other."""
    tokens: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    finished: bool = False
    may_abort: bool = False
    may_fail: bool = False

    @property
    def order(self) -> tuple[int, int, int]:
        """Place in service order, from what the user knows alone."""
        return (self.priority, self.arrival, self.index)

    def hear(self, output: EngineOutput) -> None:
        """Check news against everything that may be said."""
        who = f"{self.request_id}[{self.index}]"
        check("I11", not self.finished, f"{who} has news after its end")
        for token in output.new_token_ids:
            stopped = bool(self.tokens) and self.tokens[-1] in self.stop_token_ids
            check("I11", not stopped and len(self.tokens) < self.max_tokens, f"{who} goes on past its end")
            expected = next(self.reference)
            check("I12", token == expected, f"{who} token {len(self.tokens)} is {token}, alone it is {expected}")
            self.tokens.append(token)
        if self.params.logprobs is not None:
            heard, told = len(output.new_logprobs), len(output.new_token_ids)
            check("I12", heard == told, f"{who} has {told} tokens with {heard} log-probabilities")
        if output.finish_reason is not None:
            self.finished = True
            self._check_end(output, who)

    def _check_end(self, output: EngineOutput, who: str) -> None:
        reason = output.finish_reason
        if reason == FinishReason.STOP:
            check("I12", self.tokens, f"{who} stopped before its first token")
            check("I12", output.stop_reason == self.tokens[-1], f"{who} stopped at {output.stop_reason}")
            check("I12", self.tokens[-1] in self.stop_token_ids, f"{who} stopped without a stop token")
        elif reason == FinishReason.LENGTH:
            check("I12", len(self.tokens) == self.max_tokens, f"{who} ended at {len(self.tokens)} tokens")
        elif reason == FinishReason.ABORT:
            check("I11", self.may_abort, f"{who} was aborted by nobody")
        else:
            check("I11", self.may_fail, f"{who} failed without a fault: {output.error}")
        if self.params.prompt_logprobs is not None and reason in (FinishReason.STOP, FinishReason.LENGTH):
            entries = output.prompt_logprobs or []
            right = [entry.top_ids for entry in entries] == [[token] for token in self.prompt[1:]]
            check("I12", right, f"{who} has the wrong prompt log-probabilities")

    def cut(self) -> int | None:
        """Return how many tokens a stop string leaves, or None where it has not come."""
        if self.stop_pair is not None:
            for i in range(len(self.tokens) - 1):
                if (self.tokens[i], self.tokens[i + 1]) == self.stop_pair:
                    return i
        return None

    def hear_cut(self, output: EngineOutput) -> None:
        """Check the last news of a sequence that the front has cut."""
        check("I11", not self.finished, f"{self.request_id}[{self.index}] is cut after its end")
        check("I11", output.finish_reason == FinishReason.STOP, f"a cut sequence ends with {output.finish_reason}")
        check("I12", output.new_token_ids == [], "a cut sequence has new tokens")
        self.finished = True
