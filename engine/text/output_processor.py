"""This module holds the way from an engine's token ids to the texts users see. It does not know the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..sampling_params import SamplingParams
from ..step import CompletionOutput, EngineOutput, FinishReason, RequestOutput
from .detokenizer import Detokenizer
from .stop import StopMatcher
from .tokenizer import Tokenizer

__all__ = ["OutputProcessor", "StopFound"]


@dataclass(frozen=True, slots=True)
class StopFound:
    """A stop string has ended a sequence that the engine still runs."""

    request_id: str
    index: int
    num_output_tokens: int
    """Output tokens up to the one that completed the stop string."""


class _Sequence:
    """One of the n sequences of a request: its answer so far and what is needed to continue it."""

    __slots__ = ("_detokenizer", "_include_stop", "_matcher", "_min_tokens", "_stop_token_ids", "answer", "closed")

    def __init__(
        self, index: int, params: SamplingParams, tokenizer: Tokenizer | None, more_stops: Sequence[str]
    ) -> None:
        self.answer = CompletionOutput(
            index=index, text="", token_ids=[], logprobs=[] if params.logprobs is not None else None
        )
        self._detokenizer = (
            Detokenizer(tokenizer, params.skip_special_tokens) if params.detokenize and tokenizer is not None else None
        )
        self._include_stop = params.include_stop_str_in_output
        self._stop_token_ids = frozenset(params.stop_token_ids)
        stops = (*params.stop, *more_stops)
        self._matcher = StopMatcher(stops, self._include_stop) if stops else None
        self._min_tokens = params.min_tokens
        self.closed = False
        """A stop string was found: what the engine still sends of this sequence is not wanted."""

    def take(self, news: EngineOutput) -> bool:
        """Append what the engine has sent; return whether a stop string ended the sequence just now."""
        if self.closed:
            self._close(news)
            return False
        answer, token_ids = self.answer, news.new_token_ids
        # A stop token is reported as a token but not as text; a complete grammar stops a sequence without one.
        hides_last = news.stop_reason is not None and not self._include_stop
        if self._matcher is None or len(token_ids) == 1:
            answer.token_ids += token_ids
            self._show(token_ids[:-1] if hides_last else token_ids)
        else:
            for left, token_id in enumerate(token_ids, 1 - len(token_ids)):
                answer.token_ids.append(token_id)
                if self._show([] if left == 0 and hides_last else [token_id]):
                    break
        if answer.logprobs is not None:
            answer.logprobs += news.new_logprobs
        if news.finish_reason is None:
            return self.closed
        # An abort leaves the text as it was last seen.
        if not self.closed and news.finish_reason is not FinishReason.ABORT:
            self._flush()
        self._close(news)
        return False

    def _show(self, token_ids: Sequence[int]) -> bool:
        """Turn tokens into text; return whether that completed a stop string."""
        if self._detokenizer is None or not token_ids:
            return False
        return self._show_text(self._detokenizer.append(token_ids))

    def _show_text(self, text: str) -> bool:
        if self._matcher is None or self._matcher.passes(text):
            self.answer.text += text
            return False
        # As with stop tokens, the first to end the output is the one after min_tokens; the stop may begin before it.
        result = self._matcher.append(text, may_end=len(self.answer.token_ids) > self._min_tokens)
        self.answer.text += result.text
        if result.hit is None:
            return False
        self.closed = True
        self.answer.finish_reason = FinishReason.STOP
        self.answer.stop_reason = result.hit
        return True

    def _flush(self) -> None:
        if self._detokenizer is not None and not self._show_text(self._detokenizer.finish()) and self._matcher:
            self.answer.text += self._matcher.finish()

    def _close(self, news: EngineOutput) -> None:
        answer = self.answer
        if not self.closed:
            answer.finish_reason = news.finish_reason
            answer.stop_reason = news.stop_reason if news.stop_reason in self._stop_token_ids else None
        num_tokens = len(answer.token_ids)
        if answer.logprobs is not None:
            del answer.logprobs[num_tokens:]
        if news.hidden_states is not None:
            answer.hidden_states = np.ascontiguousarray(news.hidden_states[:num_tokens])
        answer.error, answer.error_param = news.error, news.error_param
        answer.metrics = news.metrics


class _Answers:
    """A request and the answers to it."""

    __slots__ = ("num_open", "output", "sequences", "wants_prompt_logprobs")

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        more_stops: Sequence[str],
    ) -> None:
        self.sequences = [_Sequence(index, params, tokenizer, more_stops) for index in range(params.n)]
        self.num_open = params.n
        self.wants_prompt_logprobs = params.prompt_logprobs is not None
        self.output = RequestOutput(
            request_id, prompt, prompt_token_ids, [sequence.answer for sequence in self.sequences], finished=False
        )


class OutputProcessor:
    """Turns news of sequences into answers to requests.

    Args:
        tokenizer: None leaves all texts empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _Answers] = {}

    @staticmethod
    def needs_every_token(params: SamplingParams) -> bool:
        """Whether the engine must report each token as it comes, for a stop string to end the sequence in time."""
        return bool(params.stop)

    def add(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        more_stops: Sequence[str] = (),
    ) -> RequestOutput:
        """Expect news of a request, which `more_stops` end besides its own; return its answer, which grows."""
        request = _Answers(request_id, prompt, prompt_token_ids, params, self._tokenizer, more_stops)
        self._requests[request_id] = request
        return request.output

    def discard(self, request_id: str) -> None:
        """Forget a request; news of it will be ignored."""
        self._requests.pop(request_id, None)

    def process(self, news: Sequence[EngineOutput]) -> tuple[list[RequestOutput], list[StopFound]]:
        """Take in what a step has brought.

        Returns:
            The requests that have something new, each once (the same growing object every time), and the sequences
            that the engine must be told to finish.
        """
        changed: dict[str, RequestOutput] = {}
        stops: list[StopFound] = []
        for item in news:
            request = self._requests.get(item.request_id)
            if request is None:
                continue
            sequence = request.sequences[item.index]
            if sequence.take(item):
                stops.append(StopFound(item.request_id, item.index, len(sequence.answer.token_ids)))
            if item.finish_reason is not None:
                self._finish(request, item)
            changed[item.request_id] = request.output
        return list(changed.values()), stops

    def _finish(self, request: _Answers, news: EngineOutput) -> None:
        request.num_open -= 1
        if news.index == 0:
            if request.wants_prompt_logprobs and news.prompt_logprobs is not None:
                request.output.prompt_logprobs = [None, *news.prompt_logprobs]
            if news.metrics is not None:
                request.output.num_cached_tokens = max(news.metrics.num_cached_tokens, 0)
        if request.num_open == 0:
            request.output.finished = True
            del self._requests[news.request_id]
