"""This module holds `LLM`, the front for programs that generate offline. It does not know argv, HTTP or tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import EngineConfig
from .errors import ConfigError, RequestError, describe
from .events import Recorder
from .intake import DEFAULT_MAX_TOKENS, Intake, Prompt, is_list
from .sampling_params import SamplingParams
from .scheduler import SchedulerStats
from .startup import Engine, start_engine
from .step import RequestOutput
from .text import ChatTemplate, Tokenizer
from .text.output_processor import OutputProcessor

__all__ = ["LLM", "GenerationProgress", "Prompt"]


@dataclass(slots=True)
class GenerationProgress:
    """How far a batch of requests is; the same growing object every time."""

    num_requests: int
    num_finished: int = 0
    num_prefill_tokens: int = 0
    """Tokens run in chunks: prompts, and what preemption had to compute again."""
    num_output_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0


class LLM:
    """A model that generates text for many prompts at once.

    Args:
        model: a bundled name, a folder, a .gguf file or a hub id; see `EngineConfig` for all settings.
        config: all settings as one object, instead of names.
        on_phase, on_weights, recorder: see `start_engine`.
        settings: any setting of `EngineConfig` and its parts by its flat name, such as `block_size=16`.

    Raises:
        ConfigError, CheckpointError, CapacityError: the engine cannot be started.

    Example:
        >>> llm = LLM("smollm2-135m")
        >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        on_phase: Callable[[str], None] | None = None,
        on_weights: Callable[[int, int], None] | None = None,
        recorder: Recorder | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and (model is not None or settings):
            raise ConfigError("config is given together with other settings; allowed: one or the other")
        if config is None:
            config = EngineConfig.from_settings(({} if model is None else {"model": model}) | settings)
        self.engine: Engine = start_engine(config, on_phase=on_phase, on_weights=on_weights, recorder=recorder)
        self._core = self.engine.core
        self._intake = Intake(
            self.engine.tokenizer,
            vocab_size=self.engine.model_config.vocab_size,
            max_model_len=self.engine.resolved.max_model_len,
            num_layers=self.engine.model_config.num_layers,
            defaults=self.engine.generation_config if config.generation_config == "auto" else None,
            special_in_prompts=config.special_in_prompts,
        )
        self._texts = OutputProcessor(self.engine.tokenizer)
        self._num_requests = 0
        # Whoever runs a step runs everybody's requests: what it brings to others is kept for them here.
        self._progress: dict[str, GenerationProgress] = {}
        """Of `generate` and `chat`, by request that is not finished: where to count it when it is."""
        self._news: dict[str, RequestOutput] = {}
        """Of `add`: what `step` has not returned yet."""
        self._added: set[str] = set()
        """Those of `add` that are not finished."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ConfigError: the model came without one.
        """
        return self._intake.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template."""
        return self._intake.chat_template

    def params(self, mapping: Mapping[str, Any] | None = None) -> SamplingParams:
        """Build sampling parameters from names and values, with the checkpoint's defaults where none are given."""
        return self._complete(SamplingParams.from_mapping(mapping or {}))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[GenerationProgress], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for all prompts in one batch.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one per prompt; None: the defaults. `max_tokens` defaults to 16.
            on_progress: called after every step.

        Returns:
            One answer per prompt, in their order.

        Raises:
            RequestError: a prompt or parameter is not allowed; nothing has been run.
        """
        if not isinstance(prompts, str) and not is_list(prompts):
            allowed = "a text, a list of token ids, or a list of either"
            raise RequestError(f"prompts is {describe(prompts)}; allowed: {allowed}", "prompt")
        lone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several: Sequence[Any] = [prompts] if lone else prompts
        all_params = self._per_request(params, len(several))
        encoded = [(prompt if isinstance(prompt, str) else None, self.encode(prompt)) for prompt in several]
        return self._run(encoded, all_params, DEFAULT_MAX_TOKENS, on_progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_progress: Callable[[GenerationProgress], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several in one batch.

        Args:
            messages: [{"role": ..., "content": ...}, ...], or a list of such lists.
            params: as in `generate`; `max_tokens` defaults to the context that is left.
            chat_template_kwargs: see `ChatTemplate.render`.
        """
        if not is_list(messages):
            allowed = "a list of messages, or a list of such lists"
            raise RequestError(f"messages is {describe(messages)}; allowed: {allowed}", "messages")
        lone = len(messages) > 0 and isinstance(messages[0], Mapping)
        several: Sequence[Any] = [messages] if lone else messages
        all_params = self._per_request(params, len(several))
        encoded = [
            (None, self._intake.encode_chat(each, chat_template_kwargs=chat_template_kwargs)) for each in several
        ]
        return self._run(encoded, all_params, None, on_progress)

    def stream(
        self, prompt: Prompt | Sequence[Mapping[str, Any]], params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Generate for one prompt or conversation, token by token.

        Yields:
            The same growing answer after every token; after several at once where others have run steps meanwhile.
            Closing the generator aborts the request.
        """
        answer = self._queue(prompt, params, stream=True)
        num_told, finished = 0, False
        try:
            while not finished:
                finished = answer.finished
                num_tokens = sum(len(choice.token_ids) for choice in answer.outputs)
                if finished or num_tokens > num_told:
                    num_told = num_tokens
                    yield answer
                else:
                    self._advance()
        finally:
            self.abort(answer.request_id)

    def add(
        self,
        prompt: Prompt | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
    ) -> str:
        """Queue one request for `step` to run together with all others.

        Args:
            prompt: a text, its token ids, or the messages of a conversation.
            params: `max_tokens` defaults to 16, and to the context that is left for a conversation.
            stream: `step` returns the request after every token, not only at its end.

        Returns:
            The request's id.

        Raises:
            RequestError: the prompt or a parameter is not allowed; no other request is concerned.
        """
        request_id = self._queue(prompt, params, stream=stream).request_id
        self._added.add(request_id)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step; return the requests of `add` with something new, each the same growing object every time.

        What they got from the steps of a `generate`, `chat` or `stream` meanwhile is new here, too.

        Raises:
            EngineDeadError: several steps in a row have failed.
        """
        self._advance()
        news, self._news = self._news, {}
        return list(news.values())

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks; `step` does not return it. An unknown or finished id is not an error."""
        self._texts.process(self._core.abort(request_id))
        self._texts.discard(request_id)
        self._news.pop(request_id, None)
        self._count_finished(request_id)

    @property
    def stats(self) -> SchedulerStats:
        """What the engine has done so far and holds now."""
        return self._core.scheduler.stats

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, checked against the vocabulary.

        Raises:
            RequestError: it is no valid text, or holds something else than token ids.
        """
        return self._intake.encode(prompt)

    def _per_request(
        self, params: SamplingParams | Sequence[SamplingParams] | None, num_requests: int
    ) -> list[SamplingParams]:
        if params is None:
            params = SamplingParams()
        if isinstance(params, SamplingParams):
            return [self._complete(params)] * num_requests
        if not is_list(params) or not all(isinstance(each, SamplingParams) for each in params):
            raise RequestError(f"params is {describe(params)}; allowed: SamplingParams, or a list of them", "params")
        if len(params) != num_requests:
            raise RequestError(f"{len(params)} sampling parameters for {num_requests} prompts; allowed: one each")
        return [self._complete(each) for each in params]

    def _complete(self, params: SamplingParams) -> SamplingParams:
        return self._intake.with_bad_words(self._intake.with_defaults(params))

    def _queue(
        self, prompt: Prompt | Sequence[Mapping[str, Any]], params: SamplingParams | None, *, stream: bool
    ) -> RequestOutput:
        chat = is_list(prompt) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        token_ids = self._intake.encode_chat(prompt) if chat else self.encode(prompt)  # type: ignore[arg-type]
        params = self._intake.resolved(
            self._per_request(params, 1)[0], len(token_ids), None if chat else DEFAULT_MAX_TOKENS
        )
        return self._add(prompt if isinstance(prompt, str) else None, token_ids, params, stream=stream)

    def _add(
        self, prompt: str | None, token_ids: list[int], params: SamplingParams, *, stream: bool = False
    ) -> RequestOutput:
        request_id = f"request-{self._num_requests}"
        self._num_requests += 1
        stream = stream or self._texts.needs_every_token(params)
        self._core.add_request(request_id, token_ids, params, stream=stream)
        return self._texts.add(request_id, prompt, token_ids, params)

    def _advance(self) -> None:
        """Run one step, and keep what it brought where its owner will look."""
        changed, stops = self._texts.process(self._core.step())
        for stop in stops:
            news = self._core.finish(stop.request_id, stop.index, stop.num_output_tokens)
            if news is not None:
                self._texts.process([news])
        for output in changed:
            if output.request_id in self._added:
                self._news[output.request_id] = output
            if output.finished:
                self._count_finished(output.request_id)

    def _count_finished(self, request_id: str) -> None:
        self._added.discard(request_id)
        progress = self._progress.pop(request_id, None)
        if progress is not None:
            progress.num_finished += 1

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        all_params: Sequence[SamplingParams],
        default_max_tokens: int | None,
        on_progress: Callable[[GenerationProgress], None] | None,
    ) -> list[RequestOutput]:
        resolved = [
            self._intake.resolved(params, len(token_ids), default_max_tokens)
            for (_, token_ids), params in zip(prompts, all_params, strict=True)
        ]
        answers: list[RequestOutput] = []
        progress = GenerationProgress(len(prompts))
        before = self.stats
        try:
            for (text, token_ids), params in zip(prompts, resolved, strict=True):
                answers.append(self._add(text, token_ids, params))
                self._progress[answers[-1].request_id] = progress
            while progress.num_finished < len(prompts):
                self._advance()
                if on_progress is not None:
                    stats = self.stats
                    progress.num_prefill_tokens = stats.num_prefill_tokens - before.num_prefill_tokens
                    progress.num_output_tokens = stats.num_output_tokens - before.num_output_tokens
                    progress.num_running, progress.num_waiting = stats.num_running, stats.num_waiting
                    on_progress(progress)
            while not self._core.scheduler.requests and self._core.has_unfinished:
                self._core.step()  # nobody is in it any more
        finally:
            for answer in answers:
                if not answer.finished:
                    self.abort(answer.request_id)
        return answers
