"""This module holds /v1/completions: prompts in, texts out. It does not know how they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import RequestError
from ..intake import DEFAULT_MAX_TOKENS
from ..sampling_params import SamplingParams
from ..step import CompletionOutput, RequestOutput
from .body import read_object
from .context import Context, EncodedPrompt, check_model, encode_prompts
from .exchange import Exchange, Receive, Scope, Send
from .fields import COMPLETIONS, read_fields
from .generation import Answer, Progress, Work, answer, answer_head, check_streaming, usage
from .logprobs import CompletionLogprobs, Offsets, TokenTexts, prompt_logprobs
from .sse import event

__all__ = ["Completions"]

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class _Options:
    """How the answer is to look."""

    num_top: int | None
    """Top tokens to show; None: no log-probabilities."""
    num_prompt_top: int | None
    """The same for the prompt, in vLLM's shape."""
    echo: bool
    scores_only: bool
    """Nothing was to be generated, and what was is left out."""
    include_usage: bool
    return_token_ids: bool
    skip_special_tokens: bool


class _Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[dict[str, Any] | None] | msgspec.UnsetType = msgspec.UNSET


class Completions:
    """The route."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._texts = TokenTexts(context.llm.tokenizer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        context = self._context
        given = read_fields(COMPLETIONS, await read_object(scope, receive, context.settings.limits))
        route = given.route
        check_model(context, route.get("model"))
        stream = check_streaming(route, given.sampling)
        params, options = self._read(given.sampling, route, stream=stream)

        async def prepare() -> tuple[Work, Answer]:
            work = Work(
                answer_id=f"cmpl-{Exchange.of(scope).request_id}",
                prompts=await encode_prompts(context.llm, route["prompt"]),
                params=params,
                default_max_tokens=DEFAULT_MAX_TOKENS,
                stream=stream,
            )
            return work, _CompletionAnswer(context, work, options, self._texts)

        await answer(context, scope, receive, send, prepare)

    def _read(
        self, sampling: dict[str, Any], route: dict[str, Any], *, stream: bool
    ) -> tuple[SamplingParams, _Options]:
        """Return what goes to the sampler, and what is left for the answer's form."""
        echo, num_top, max_tokens = route.get("echo", False), route.get("logprobs"), route.get("max_tokens")
        num_prompt_top = sampling.get("prompt_logprobs")
        if max_tokens == 0 and not echo:
            raise RequestError(
                "max_tokens is 0; allowed: an integer from 1 to the context left, or 0 with echo", "max_tokens"
            )
        if stream and echo and num_top is not None:
            raise RequestError("echo is given with stream and logprobs; allowed: with one of them only", "echo")
        if echo and num_top is not None:
            # What is wrong with the value itself is said by the sampler's table.
            both = isinstance(num_prompt_top, int) and not isinstance(num_prompt_top, bool)
            sampling["prompt_logprobs"] = max(num_prompt_top or 0, num_top) if both else num_prompt_top or num_top
        if num_top is not None:
            sampling["logprobs"] = num_top
        if max_tokens is not None:
            sampling["max_tokens"] = max(max_tokens, 1)
        params = self._context.llm.params(sampling)
        options = _Options(
            num_top=num_top,
            num_prompt_top=num_prompt_top,
            echo=echo,
            scores_only=max_tokens == 0,
            include_usage=route.get("stream_options", {}).get("include_usage", False),
            return_token_ids=route.get("return_token_ids", False),
            skip_special_tokens=params.skip_special_tokens,
        )
        return params, options


class _CompletionAnswer:
    """OpenAI's text_completion objects."""

    def __init__(self, context: Context, work: Work, options: _Options, texts: TokenTexts) -> None:
        self._prompts = work.prompts
        self._n = work.params.n
        self._options = options
        self._texts = texts
        self._tokenizer = context.llm.tokenizer
        self._head = answer_head(context, work.answer_id, "text_completion")
        # A chunk is these with a choice between; the head is the same for all of them.
        self._opening = b"data: " + _encode(self._head)[:-1] + b',"choices":['
        self._ending = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"
        num_choices = len(work.prompts) * self._n
        self._progress = [Progress() for _ in range(num_choices)]
        self._offsets = [texts.offsets(options.skip_special_tokens) for _ in range(num_choices)]

    def opening(self) -> bytes:
        """Return the prompts where they are echoed."""
        if not self._options.echo:
            return b""
        return b"".join(
            self._chunk(_Choice(index, self._prompt_text(self._prompts[index // self._n]), None, None, None))
            for index in range(len(self._progress))
        )

    def news(self, prompt: int, output: RequestOutput) -> bytes:
        """Return a chunk for each choice that has something new."""
        chunks = b""
        for choice in output.outputs:
            index = prompt * self._n + choice.index
            if not self._progress[index].finished:
                chunks += self._news_of(index, choice, self._progress[index])
        return chunks

    def _news_of(self, index: int, choice: CompletionOutput, sent: Progress) -> bytes:
        first, options = sent.num_tokens, self._options
        finished = choice.finish_reason is not None
        text = "" if options.scores_only else choice.text[sent.num_chars :]
        tells_tokens = options.num_top is not None or options.return_token_ids
        if not (text or finished or (tells_tokens and len(choice.token_ids) > first)):
            return b""
        chunk = _Choice(index, text, None, choice.finish_reason, choice.stop_reason)
        if options.num_top is not None:
            chunk.logprobs = self._logprobs(CompletionLogprobs(), choice, first, self._offsets[index])
        if options.return_token_ids:
            chunk.token_ids = [] if options.scores_only else choice.token_ids[first:]
            if first == 0:
                chunk.prompt_token_ids = self._prompts[index // self._n].token_ids
        sent.num_chars = len(choice.text)
        sent.num_tokens = len(choice.token_ids)
        sent.finished = finished
        return self._chunk(chunk)

    def closing(self, outputs: Sequence[RequestOutput]) -> bytes:
        """Return the usage, where it was asked for."""
        return (
            event(self._head | {"choices": [], "usage": self._usage(outputs)}) if self._options.include_usage else b""
        )

    def whole(self, outputs: Sequence[RequestOutput]) -> object:
        """Return the answer."""
        choices = [
            self._whole_choice(prompt, output, choice)
            for prompt, output in enumerate(outputs)
            for choice in output.outputs
        ]
        return self._head | {"choices": choices, "usage": self._usage(outputs)}

    def _whole_choice(self, prompt: int, output: RequestOutput, choice: CompletionOutput) -> _Choice:
        options = self._options
        before = self._prompt_text(self._prompts[prompt]) if options.echo else ""
        text = before if options.scores_only else before + choice.text
        whole = _Choice(prompt * self._n + choice.index, text, None, choice.finish_reason, choice.stop_reason)
        if options.scores_only:
            whole.finish_reason, whole.stop_reason = "length", None
        if options.num_top is not None:
            whole.logprobs = CompletionLogprobs()
            if options.echo and output.prompt_logprobs is not None:
                offsets = self._texts.offsets(options.skip_special_tokens).of(output.prompt_token_ids)
                entries = output.prompt_logprobs
                whole.logprobs.add(self._texts, output.prompt_token_ids, entries, options.num_top, offsets)
            offsets_after = self._texts.offsets(options.skip_special_tokens, len(before))
            self._logprobs(whole.logprobs, choice, 0, offsets_after)
        if options.return_token_ids:
            whole.token_ids = [] if options.scores_only else choice.token_ids
            whole.prompt_token_ids = output.prompt_token_ids
        if options.num_prompt_top is not None and output.prompt_logprobs is not None:
            whole.prompt_logprobs = prompt_logprobs(
                self._texts, output.prompt_token_ids, output.prompt_logprobs, options.num_prompt_top
            )
        return whole

    def _logprobs(
        self, result: CompletionLogprobs, choice: CompletionOutput, first: int, offsets: Offsets
    ) -> CompletionLogprobs:
        """Append the tokens of a choice from the given one on."""
        if not self._options.scores_only:
            token_ids = choice.token_ids[first:]
            entries = (choice.logprobs or [])[first : len(choice.token_ids)]
            result.add(self._texts, token_ids, entries, self._options.num_top or 0, offsets.of(token_ids))
        return result

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return usage(outputs, 0 if self._options.scores_only else None)

    def _prompt_text(self, prompt: EncodedPrompt) -> str:
        if prompt.text is not None or self._tokenizer is None:
            return prompt.text or ""
        known = [token_id for token_id in prompt.token_ids if token_id < self._tokenizer.vocab_size]
        return self._tokenizer.decode(known, self._options.skip_special_tokens)

    def _chunk(self, choice: _Choice) -> bytes:
        return self._opening + _encode(choice) + self._ending
