"""This module holds /v1/chat/completions: messages in, a message out. It does not know how it is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import RequestError, describe
from ..sampling_params import SamplingParams
from ..step import CompletionOutput, FinishReason, RequestOutput
from .body import read_object
from .constraints import Constraints
from .context import Context, EncodedPrompt, check_model, encode_messages
from .exchange import Exchange, Receive, Scope, Send
from .fields import CHAT, read_fields
from .generation import Answer, Progress, Work, answer, answer_head, check_streaming, usage
from .logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from .message import Delta, MessageReader, whole_message
from .sse import event

__all__ = ["Chat"]

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class _Options:
    """How the answer is to look."""

    num_top: int | None
    """Top tokens to show; None: no log-probabilities."""
    num_prompt_top: int | None
    include_usage: bool
    return_token_ids: bool


class _ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Chat:
    """The route."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._texts = TokenTexts(context.llm.tokenizer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        context = self._context
        given = read_fields(CHAT, await read_object(scope, receive, context.settings.limits))
        route = given.route
        check_model(context, route.get("model"))
        stream = check_streaming(route, given.sampling)
        constraints = Constraints(context.llm, route, given.sampling)
        session = constraints.session
        with constraints.named():
            params, options = self._read(given.sampling, route)

        async def prepare() -> tuple[Work, Answer]:
            token_ids = await encode_messages(
                context.llm,
                route["messages"],
                tools=None if session is None else session.tools,
                add_generation_prompt=route.get("add_generation_prompt", True),
                chat_template_kwargs=route.get("chat_template_kwargs"),
            )
            work = Work(
                answer_id=f"chatcmpl-{Exchange.of(scope).request_id}",
                prompts=[EncodedPrompt(token_ids)],
                params=params,
                default_max_tokens=None,
                stream=stream,
                more_stops=constraints.stops,
            )
            prompt_end = None
            if context.llm.tokenizer is not None and context.llm.chat_template.thinks:
                prompt_end = context.llm.tokenizer.decode(token_ids[-8:], skip_special_tokens=False)
            readers = [MessageReader(session, prompt_end) for _ in range(params.n)]
            return work, _ChatAnswer(context, work, options, self._texts, readers)

        with constraints.named():
            await answer(context, scope, receive, send, prepare)

    def _read(self, sampling: dict[str, Any], route: dict[str, Any]) -> tuple[SamplingParams, _Options]:
        """Return what goes to the sampler, and what is left for the answer's form."""
        if "top_logprobs" in route and not route.get("logprobs"):
            allowed = "with logprobs true only"
            raise RequestError(f"top_logprobs is {route['top_logprobs']}; allowed: {allowed}", "top_logprobs")
        num_top = route.get("top_logprobs", 0) if route.get("logprobs") else None
        num_prompt_top = sampling.get("prompt_logprobs")
        limits = [route[name] for name in ("max_completion_tokens", "max_tokens") if name in route]
        if len(set(limits)) > 1:
            raise RequestError(
                f"max_tokens is {describe(limits[1])} and max_completion_tokens {describe(limits[0])}; "
                "allowed: one of them",
                "max_tokens",
            )
        if limits:
            sampling["max_tokens"] = limits[0]
        if num_top is not None:
            sampling["logprobs"] = num_top
        options = _Options(
            num_top=num_top,
            num_prompt_top=num_prompt_top,
            include_usage=route.get("stream_options", {}).get("include_usage", False),
            return_token_ids=route.get("return_token_ids", False),
        )
        return self._context.llm.params(sampling), options


class _ChatAnswer:
    """OpenAI's chat.completion objects and chunks."""

    def __init__(
        self,
        context: Context,
        work: Work,
        options: _Options,
        texts: TokenTexts,
        readers: Sequence[MessageReader],
    ) -> None:
        self._options = options
        self._readers = readers
        self._texts = texts
        self._head = answer_head(context, work.answer_id, "chat.completion")
        self._chunk_head = self._head | {"object": "chat.completion.chunk"}
        # A chunk is these with a choice between; the head is the same for all of them.
        self._opening = b"data: " + _encode(self._chunk_head)[:-1] + b',"choices":['
        self._ending = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"
        self._progress = [Progress() for _ in range(work.params.n)]
        self._prompt_token_ids = work.prompts[0].token_ids

    def opening(self) -> bytes:
        """Return the chunk that says who speaks."""
        speakers = [_ChunkChoice(index, Delta("assistant", ""), None, None) for index in range(len(self._progress))]
        opening = self._chunk_head | {"choices": speakers}
        if self._options.return_token_ids:
            opening["prompt_token_ids"] = self._prompt_token_ids
        return event(opening | ({"usage": None} if self._options.include_usage else {}))

    def news(self, prompt: int, output: RequestOutput) -> bytes:
        """Return the chunks of each choice that has something new."""
        chunks = b""
        for choice in output.outputs:
            sent = self._progress[choice.index]
            if not sent.finished:
                chunks += self._news_of(choice, sent)
        return chunks

    def _news_of(self, choice: CompletionOutput, sent: Progress) -> bytes:
        options, first, reader = self._options, sent.num_tokens, self._readers[choice.index]
        finished = choice.finish_reason is not None
        deltas = reader.feed(choice.text[sent.num_chars :], is_last=finished)
        tells_tokens = options.num_top is not None or options.return_token_ids
        if not deltas and tells_tokens and len(choice.token_ids) > first:
            deltas = [Delta(content="")]
        chunks = [_ChunkChoice(choice.index, delta, None, None) for delta in deltas]
        if chunks and options.num_top is not None:
            chunks[0].logprobs = self._logprobs(choice, first)
        if chunks and options.return_token_ids:
            chunks[0].token_ids = choice.token_ids[first:]
        if finished:
            sent.finished = True
            reason = _finish_reason(choice, reader)
            chunks.append(_ChunkChoice(choice.index, Delta(), None, reason, stop_reason=choice.stop_reason))
        sent.num_chars = len(choice.text)
        sent.num_tokens = len(choice.token_ids)
        return b"".join(map(self._chunk, chunks))

    def closing(self, outputs: Sequence[RequestOutput]) -> bytes:
        """Return the usage, where it was asked for."""
        return (
            event(self._chunk_head | {"choices": [], "usage": usage(outputs)}) if self._options.include_usage else b""
        )

    def whole(self, outputs: Sequence[RequestOutput]) -> object:
        """Return the answer."""
        (output,) = outputs
        whole = self._head | {
            "choices": [self._whole_choice(choice) for choice in output.outputs],
            "usage": usage(outputs),
        }
        if self._options.return_token_ids:
            whole["prompt_token_ids"] = output.prompt_token_ids
        if self._options.num_prompt_top is not None and output.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(
                self._texts, output.prompt_token_ids, output.prompt_logprobs, self._options.num_prompt_top
            )
        return whole

    def _whole_choice(self, choice: CompletionOutput) -> dict[str, Any]:
        reader = self._readers[choice.index]
        message = whole_message(reader.feed(choice.text, is_last=True))
        whole: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": None if self._options.num_top is None else self._logprobs(choice, 0),
            "finish_reason": _finish_reason(choice, reader),
            "stop_reason": choice.stop_reason,
        }
        if self._options.return_token_ids:
            whole["token_ids"] = choice.token_ids
        return whole

    def _logprobs(self, choice: CompletionOutput, first: int) -> dict[str, Any]:
        entries = (choice.logprobs or [])[first : len(choice.token_ids)]
        return chat_logprobs(self._texts, choice.token_ids[first:], entries, self._options.num_top or 0)

    def _chunk(self, choice: _ChunkChoice) -> bytes:
        return self._opening + _encode(choice) + self._ending


def _finish_reason(choice: CompletionOutput, reader: MessageReader) -> str | None:
    """Return OpenAI's reason: an answer that ended by itself and calls something waits for the results."""
    called = reader.has_called and choice.finish_reason is FinishReason.STOP
    return "tool_calls" if called else choice.finish_reason
