"""This module holds `AsyncLLM`, the front for programs with an event loop: many requests at once, each a stream of its
own growing answer. It does not know HTTP, argv or tensors.

The engine runs in a process of its own, or on a thread of this one; everything here is the same for both. All methods
belong to the event loop on which `start` was called.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from .config import EngineConfig
from .errors import EngineDeadError, RequestError
from .events import KVSnapshot, Recorder
from .intake import Intake
from .observe.crash import write_bundle
from .observe.recording import schedule_facts
from .observe.ring import EventRing
from .process.client import ProcessLink
from .process.health import Health, Vitals
from .process.link import START_ENGINE, EngineLink
from .process.messages import (
    AddRequest,
    Call,
    EngineInfo,
    FromEngine,
    Heartbeat,
    News,
    Reply,
    packed_params,
)
from .process.readers import Push, Readers
from .process.thread import ThreadLink
from .sampling_params import SamplingParams
from .step import RequestOutput
from .text import ChatTemplate, Tokenizer
from .text.output_processor import OutputProcessor

__all__ = ["AsyncLLM", "EngineInfo", "Health"]

NUM_TEXT_THREADS = 2
"""Tokenising and rendering run on these; what is asked beyond them waits."""
CLOSE_TIMEOUT_S = 1.0
"""For an engine to end by itself; nobody wants the step any more that it may be in."""

_log = logging.getLogger("octavo")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class AsyncLLM:
    """A model that generates for many readers at once. Made by `start`.

    Example:
        >>> llm = await AsyncLLM.start(EngineConfig(model="smollm2-135m"))
        >>> token_ids = await llm.encode("The capital of France is")
        >>> async for answer in llm.generate(token_ids, llm.params({"temperature": 0})):
        ...     print(answer.outputs[0].text)
        >>> await llm.shutdown()
    """

    info: EngineInfo
    """What the engine is and what it can hold."""
    ring: EventRing
    """The latest events of the run; always kept, so that its end can be explained."""

    def __init__(self, crash_folder: str | Path | None) -> None:
        self._crash_folder = crash_folder
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Future[KVSnapshot | None]] = {}
        self._num_requests = 0
        self._num_calls = 0
        self._dead: str | None = None
        self._draining = False
        # Before the start: signs of life come while the front still builds its tokenizer.
        self._vitals = Vitals()
        self._threads = ThreadPoolExecutor(NUM_TEXT_THREADS, "octavo-text")
        self.ring = EventRing()
        self._recorders: list[Recorder] = [self.ring]

    @classmethod
    async def start(
        cls,
        config: EngineConfig | None = None,
        *,
        in_process: bool = False,
        on_phase: Callable[[str], None] | None = None,
        on_weights: Callable[[int, int], None] | None = None,
        chat_template: str | None = None,
        max_unread: int = 256,
        crash_folder: str | Path | None = None,
        engine_factory: str = START_ENGINE,
    ) -> AsyncLLM:
        """Start an engine and return once it takes requests.

        Args:
            config: the engine's settings.
            in_process: run the engine on a thread instead of in a process of its own.
            on_phase, on_weights: see `start_engine`; called on the event loop.
            chat_template: Jinja source to use in place of the model's.
            max_unread: a reader that is busy elsewhere while news come more often than this is ended.
            crash_folder: where to leave a bundle of metadata (`observe.crash`) should the engine die; None: nowhere.
            engine_factory: "module:function" to start the engine with, called as `start_engine` is: for tests and
                benchmarks, which run engines without a model.

        Raises:
            ConfigError, CheckpointError, CapacityError: it cannot be started.
            EngineDeadError: it died while it started.
        """
        llm = cls(crash_folder)
        kind = ThreadLink if in_process else ProcessLink
        llm._link = kind(llm._on_message, lambda: llm._readers.deliver(), llm._on_lost, on_phase, on_weights)
        llm.info, llm._tokenizer = await llm._link.start(config or EngineConfig(), engine_factory)
        llm._intake = Intake(
            llm._tokenizer,
            vocab_size=llm.info.vocab_size,
            max_model_len=llm.info.max_model_len,
            num_layers=llm.info.num_layers,
            defaults=llm.info.generation_config if llm.info.config.generation_config == "auto" else None,
            chat_template=chat_template,
            special_in_prompts=llm.info.config.special_in_prompts,
        )
        llm._texts = OutputProcessor(llm._tokenizer)
        llm._readers = Readers(llm._link.send, llm._texts, max_unread)
        return llm

    _link: EngineLink
    _intake: Intake
    _texts: OutputProcessor
    _readers: Readers
    _tokenizer: Tokenizer | None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template.

        Raises:
            ConfigError, CheckpointError: there is none.
        """
        return self._intake.chat_template

    def params(self, mapping: Mapping[str, Any] | None = None) -> SamplingParams:
        """Build sampling parameters from names and values, with the checkpoint's defaults where none are given."""
        return self._intake.with_defaults(SamplingParams.from_mapping(mapping or {}))

    async def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Return the token ids of a text, without holding up the event loop. See `Tokenizer.encode`.

        Raises:
            RequestError: it is no valid text, or the model has no tokenizer.
        """
        self._need_tokenizer("prompt")
        return await self.on_text_thread(self._intake.encode, text, add_bos=add_bos)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, without holding up the event loop. See `ChatTemplate.render`.

        Raises:
            RequestError: the messages are not valid, or the template refuses them.
            CheckpointError: the model has no chat template.
        """
        self._need_tokenizer("messages")

        return await self.on_text_thread(
            self._intake.encode_chat,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            chat_template_kwargs=chat_template_kwargs,
        )

    async def on_text_thread(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run work on texts where tokenising runs, a few at a time; what was not begun when its caller left never is.

        Raises:
            EngineDeadError: the engine is dead.
        """
        self._check_alive()
        return await self._loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        stream: bool = True,
        default_max_tokens: int | None = None,
        more_stops: Sequence[str] = (),
        cache_domain: str = "",
        arrived_s: float | None = None,
        push: Push | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one prompt.

        Args:
            prompt_token_ids: token ids below the logits' width.
            params: None: the defaults.
            request_id: unique among the requests that are not finished; None: a new one.
            prompt: the prompt's text, for the answer to repeat.
            stream: say something whenever there are new tokens, instead of at the end only.
            default_max_tokens: where `params` has no `max_tokens`; None: the context left.
            more_stops: strings that end the output besides those of `params`.
            cache_domain: whom the request comes from: prefix blocks never cross domains.
            arrived_s: when it did, by `time.monotonic`; None: now. Metrics and explanations count from there.
            push: offered the answer where its reader has nothing else to do, but for its end; what it takes, and
                returns True for, is not yielded. That saves waking a task for every token.

        Yields:
            The same growing answer each time. News that came while the reader was busy count as one. Closing the
            generator, or cancelling who reads it, aborts the request.

        Raises:
            RequestError: the request is refused; or its reader has left too much unread.
            EngineDeadError: the engine has died or was shut down, and the answer is not complete.
        """
        params = self._intake.with_defaults(params or SamplingParams())
        if params.bad_words:
            self._need_tokenizer("bad_words")
            params = await self.on_text_thread(self._intake.with_bad_words, params)
        token_ids = self._intake.checked_ids(prompt_token_ids)
        params = self._intake.resolved(params, len(token_ids), default_max_tokens)
        request_id = await self._new_id(request_id)
        answer = self._texts.add(request_id, prompt, token_ids, params, more_stops=more_stops)
        reader = self._readers.add(answer, stream, push)
        try:
            engine_streams = stream or bool(more_stops) or self._texts.needs_every_token(params)
            arrived_s = time.monotonic() if arrived_s is None else arrived_s
            packed = packed_params(params)
            self._link.send(AddRequest(request_id, token_ids, *packed, engine_streams, cache_domain, arrived_s))
            async with contextlib.aclosing(reader.answers()) as answers:
                async for answer in answers:
                    yield answer
        finally:
            self._readers.remove(reader)

    async def abort(self, request_id: str) -> None:
        """End a request and return once it holds no blocks; its reader gets what there is, with the reason "abort".

        An unknown or finished id is not an error.
        """
        await self._readers.abort(request_id)

    def subscribe(self, recorder: Recorder) -> None:
        """Hand every event to a recorder from now on, in order, on the event loop."""
        self._recorders.append(recorder)

    async def snapshot(self) -> KVSnapshot:
        """Return who holds what, at a moment between two steps.

        Raises:
            EngineDeadError: the engine is dead.
        """
        snapshot = await self._call("snapshot")
        assert snapshot is not None, "the engine has sent no snapshot"
        return snapshot

    async def reset_prefix_cache(self) -> None:
        """Forget every cached block; who uses one keeps it.

        Raises:
            EngineDeadError: the engine is dead.
        """
        await self._call("reset_prefix_cache")

    @property
    def health(self) -> Health:
        """Whether requests make progress, by the engine's own reports."""
        trouble = "the engine is shutting down" if self._draining else None
        return self._vitals.health(self._dead or trouble, len(self._readers))

    @property
    def is_dead(self) -> bool:
        """Whether nothing can be served any more, ever."""
        return self._dead is not None

    async def shutdown(self, grace_s: float = 0.0) -> None:
        """Take no more requests, let those that run finish, then end the engine; a second call does nothing.

        Args:
            grace_s: seconds to finish in; readers that are not done by then get an `EngineDeadError`.
        """
        self._draining = True
        if self._dead is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._readers.until_none_is_left(), grace_s)
        await self._link.close(CLOSE_TIMEOUT_S)
        self._end("the engine was shut down")

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    async def _new_id(self, request_id: str | None) -> str:
        """Return an id that nobody uses, the engine included: it may still hold one that was left a moment ago."""
        if request_id is None:
            request_id = f"request-{self._num_requests}"
            self._num_requests += 1
        await self._readers.until_gone(request_id)
        self._check_alive()
        if self._draining:
            raise EngineDeadError("the engine is shutting down")
        if request_id in self._readers:
            raise RequestError(f"request_id is {request_id!r}; allowed: one that is not in use", "request_id")
        return request_id

    def _need_tokenizer(self, param: str) -> None:
        if self._tokenizer is None:
            raise RequestError("the model has no tokenizer; allowed: token ids", param)

    async def _call(self, what: Literal["snapshot", "reset_prefix_cache"]) -> KVSnapshot | None:
        self._check_alive()
        self._num_calls += 1
        answer: asyncio.Future[KVSnapshot | None] = self._loop.create_future()
        self._calls[self._num_calls] = answer
        self._link.send(Call(self._num_calls, what))
        return await answer

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case News():
                self._on_news(message)
            case Heartbeat():
                self._vitals.heartbeat = message
            case Reply():
                answer = self._calls.pop(message.call_id)
                if not answer.done():
                    answer.set_result(message.snapshot)
            case _:
                raise AssertionError(f"a running engine sends {type(message).__name__}")

    def _on_news(self, news: News) -> None:
        self._readers.take(news)
        if news.step is not None:
            self._vitals.step_s = news.step.end_s
        for recorder in self._recorders.copy():
            try:
                _record(recorder, news)
            except Exception:
                _log.exception("a recorder has failed and is told nothing more")
                self._recorders.remove(recorder)

    def _on_lost(self, reason: str) -> None:
        _log.error("the engine is dead: %s", reason)
        if self._crash_folder is not None:
            # Not on the event loop, which has readers to tell; nobody writes to the ring any more.
            self._threads.submit(self._leave_bundle, Path(self._crash_folder), reason)
        self._end(f"the engine is dead: {reason}")

    def _leave_bundle(self, folder: Path, reason: str) -> None:
        facts = {field.name: getattr(self.info, field.name) for field in fields(self.info)}
        facts |= schedule_facts(self.info.config, overlap=self.info.overlap) | {"model": Path(self.info.model).name}
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = write_bundle(folder, self.ring, facts, reason)
        if path is not None:
            _log.error("what is known of its end is in %s", path)

    def _end(self, reason: str) -> None:
        """Nothing can be served any more: say so to everybody who waits."""
        if self._dead is not None:
            return
        self._dead = reason
        self._threads.shutdown(wait=False)
        self._readers.end(reason)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))
        self._calls.clear()


def _record(recorder: Recorder, news: News) -> None:
    for event in news.events[: news.num_events_before_step]:
        recorder.on_request(event)
    if news.step is not None:
        recorder.on_step(news.step)
    for event in news.events[news.num_events_before_step :]:
        recorder.on_request(event)
