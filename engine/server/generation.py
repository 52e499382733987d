"""This module holds the answering of one request, streamed or whole. It does not know what the answer looks like."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ..errors import RequestError
from ..process.readers import Push
from ..sampling_params import SamplingParams
from ..step import FinishReason, RequestOutput
from .body import Disconnected, send_response
from .context import Context, EncodedPrompt
from .errors import HTTPError, as_http_error
from .exchange import Exchange, Receive, Scope, Send
from .sse import DONE, EventStream
from .watch import Watch

__all__ = ["Answer", "Progress", "Work", "answer", "answer_head", "check_streaming", "usage"]

_MANY_TOKENS = 4096

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


@dataclass(frozen=True, slots=True)
class Work:
    """What one request asks of the engine."""

    answer_id: str
    """Of the answer, and of its prompts in the engine."""
    prompts: Sequence[EncodedPrompt]
    params: SamplingParams
    default_max_tokens: int | None
    """None: the context left."""
    stream: bool
    more_stops: Sequence[str] = ()
    """Strings that end the output besides those of the parameters."""


@dataclass(slots=True)
class Progress:
    """How much of one choice was sent."""

    num_chars: int = 0
    num_tokens: int = 0
    finished: bool = False


class Answer(Protocol):
    """Gives outputs the form of one route's answer."""

    def opening(self) -> bytes:
        """Return the events that come before everything."""
        ...

    def news(self, prompt: int, output: RequestOutput) -> bytes:
        """Return the events for what is new of one prompt's output; may be none."""
        ...

    def closing(self, outputs: Sequence[RequestOutput]) -> bytes:
        """Return the events that come after everything, before the last."""
        ...

    def whole(self, outputs: Sequence[RequestOutput]) -> object:
        """Return the answer as one object."""
        ...


Prepare = Callable[[], Awaitable[tuple[Work, Answer]]]
"""Makes tokens of a request's texts, which takes time."""


async def answer(context: Context, scope: Scope, receive: Receive, send: Send, prepare: Prepare) -> None:
    """Run a request and send its answer.

    Raises:
        HTTPError, RequestError, EngineDeadError, Disconnected: it failed, and no response has begun.
    """
    limits, exchange = context.settings.limits, Exchange.of(scope)
    stream: EventStream | None = None
    try:
        async with Watch(receive, limits.request_s) as watch:
            with context.admission.encoding(exchange.num_body_bytes):
                work, form = await prepare()
            _check_budget(context, work)
            ids = _engine_ids(work)
            lengths = {engine_id: len(prompt.token_ids) for engine_id, prompt in zip(ids, work.prompts, strict=True)}
            exchange.num_prompt_tokens = sum(lengths.values())
            with context.admission.enter(watch, lengths, work.params.n) as ticket:
                for engine_id in ids:
                    # One of this name may have just left, and the engine not know yet.
                    await context.llm.abort(engine_id)
                ticket.is_sent = True
                if work.stream:
                    stream = EventStream(scope, send, limits.ping_s, lambda: ticket.admitted)
                outputs: list[Any] = [None] * len(ids)
                pusher = _Pusher(stream, form) if stream is not None and len(ids) == 1 else None
                async with aclosing(_outputs(context, work, ids, exchange, pusher)) as news:
                    opening = form.opening() if stream is not None else b""
                    async for prompt, output in news:
                        _check_outcome(output)
                        outputs[prompt] = output
                        if stream is not None and (events := opening + form.news(prompt, output)):
                            opening = b""
                            await stream.write(events)
                            if pusher is not None:
                                pusher.is_open = True
                exchange.num_output_tokens = num_output_tokens(outputs)
                if stream is not None:
                    await stream.write(form.closing(outputs) + DONE)
                    await stream.end()
        if stream is None:
            await _send_whole(send, form, outputs)
    except Disconnected:
        raise
    except Exception as error:
        known = as_http_error(error)
        if stream is None or not stream.started:
            raise
        exchange.ended_by = "the server has failed" if known is None else str(known)
        await stream.fail(known or HTTPError(500, "the server has failed", code="internal_error"))
        if known is None:
            raise
    finally:
        if stream is not None:
            stream.close()


async def _send_whole(send: Send, form: Answer, outputs: Sequence[RequestOutput]) -> None:
    num_tokens = num_output_tokens(outputs) + sum(len(output.prompt_token_ids) for output in outputs)
    if num_tokens > _MANY_TOKENS:
        # With log-probabilities of all of them this takes longer than other clients should wait.
        body = await asyncio.to_thread(lambda: msgspec.json.encode(form.whole(outputs)))
    else:
        body = msgspec.json.encode(form.whole(outputs))
    await send_response(send, 200, body, "application/json")


def _check_budget(context: Context, work: Work) -> None:
    longest = max(len(prompt.token_ids) for prompt in work.prompts)
    max_tokens = work.params.max_tokens or work.default_max_tokens or max(1, context.llm.info.max_model_len - longest)
    num_tokens, allowed = len(work.prompts) * work.params.n * max_tokens, context.settings.limits.output_tokens
    if num_tokens > allowed:
        raise RequestError(
            f"n is {work.params.n}, times {len(work.prompts)} prompts of up to {max_tokens} tokens each; "
            f"allowed: {allowed} tokens in all",
            "n",
        )


def _engine_ids(work: Work) -> list[str]:
    ids = [f"{work.answer_id}-{index}" for index in range(len(work.prompts))] if len(work.prompts) > 1 else []
    return ids or [work.answer_id]


class _Pusher:
    """Sends news as they come, where the stream's task would do no more than that."""

    def __init__(self, stream: EventStream, form: Answer) -> None:
        self._stream = stream
        self._form = form
        self.is_open = False
        """What comes before the news has been sent."""

    def __call__(self, output: RequestOutput) -> bool:
        if not (self.is_open and self._stream.may_write):
            return False
        _check_outcome(output)
        if events := self._form.news(0, output):
            self._stream.write_now(events)
        return True


def _outputs(context: Context, work: Work, ids: Sequence[str], exchange: Exchange, push: Push | None = None) -> Outputs:
    generators = [
        context.llm.generate(
            prompt.token_ids,
            work.params,
            request_id=engine_id,
            prompt=prompt.text,
            stream=work.stream,
            default_max_tokens=work.default_max_tokens,
            more_stops=work.more_stops,
            cache_domain=exchange.cache_domain,
            arrived_s=exchange.started_s,
            push=push,
        )
        for engine_id, prompt in zip(ids, work.prompts, strict=True)
    ]
    return _lone(generators[0]) if len(generators) == 1 else _merged(generators)


async def _lone(generator: AsyncGenerator[RequestOutput, None]) -> Outputs:
    async with aclosing(generator):
        async for output in generator:
            yield 0, output


async def _merged(generators: Sequence[AsyncGenerator[RequestOutput, None]]) -> Outputs:
    """Read several generators at once; what one says while nobody reads counts as one piece of news."""
    changed: dict[int, RequestOutput] = {}
    wake = asyncio.Event()

    async def follow(index: int, generator: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(generator):
                async for output in generator:
                    changed[index] = output
                    wake.set()
        finally:
            wake.set()

    tasks = [asyncio.create_task(follow(index, generator)) for index, generator in enumerate(generators)]
    try:
        while changed or not all(task.done() for task in tasks):
            await wake.wait()
            wake.clear()
            news = list(changed.items())
            changed.clear()
            for each in news:
                yield each
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_outcome(output: RequestOutput) -> None:
    """Raise where a sequence has failed: its request has, then, whatever its other choices say."""
    for choice in output.outputs:
        if choice.finish_reason is FinishReason.ERROR and choice.error_param is not None:
            raise RequestError(f"the request cannot go on: {choice.error}", choice.error_param)
        if choice.finish_reason is FinishReason.ERROR:
            raise HTTPError(500, f"the request has failed: {choice.error}", code="generation_failed")
        if choice.finish_reason is FinishReason.ABORT:
            raise HTTPError(503, "the request was aborted", code="aborted")


def check_streaming(route: Mapping[str, Any], sampling: Mapping[str, Any]) -> bool:
    """Return whether the answer is to be streamed.

    Raises:
        RequestError: something is asked for that only one of both kinds has.
    """
    stream = bool(route.get("stream", False))
    if "stream_options" in route and not stream:
        raise RequestError("stream_options is given without stream; allowed: with stream only", "stream_options")
    if stream and "prompt_logprobs" in sampling:
        raise RequestError("prompt_logprobs is given with stream; allowed: without stream only", "prompt_logprobs")
    return stream


def answer_head(context: Context, answer_id: str, kind: str) -> dict[str, Any]:
    """Return what every answer and chunk begins with."""
    return {
        "id": answer_id,
        "object": kind,
        "created": int(time.time()),
        "model": context.model_names[0],
        "system_fingerprint": context.system_fingerprint,
    }


def num_output_tokens(outputs: Sequence[RequestOutput]) -> int:
    """Return the tokens of all choices."""
    return sum(len(choice.token_ids) for output in outputs for choice in output.outputs)


def usage(outputs: Sequence[RequestOutput], num_completion_tokens: int | None = None) -> dict[str, Any]:
    """Return what a request has used; a prompt counts once, whatever n."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = num_output_tokens(outputs) if num_completion_tokens is None else num_completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
