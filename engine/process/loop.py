"""This module holds the loop around an engine: messages in, steps while there is work, news out. It does not know
whether the front is another process or another thread.

Charter. One thread runs the core, and this loop is all that runs on it: it takes what has come in, runs one step, and
sends one message with everything that came of it. What may never be added here: text, a wait for anything but messages
while there is work, a second thread that touches the core.
"""

from __future__ import annotations

import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from ..core import EngineCore
from ..errors import BusyError, EngineDeadError, RequestError
from ..events import KVSnapshot, RequestEvent, StepEvent
from ..sampling_params import SamplingParams
from ..startup import Engine
from ..step import EngineOutput, Grammar
from .messages import (
    Abort,
    AddRequest,
    Call,
    Died,
    Finish,
    FromEngine,
    Heartbeat,
    Hello,
    News,
    Refusal,
    Reply,
    Shutdown,
    ToEngine,
    unpacked_params,
)

__all__ = ["EngineLoop", "EventLog", "Inbox", "Outbox"]

HEARTBEAT_S = 0.5
NUM_COMPILERS = 2
MAX_COMPILING = 256
"""Requests whose grammars are compiled or wait for it."""
MAX_HIDDEN_STATES_BYTES = 256 << 20
"""Of one request: they are kept until it ends, and leave in one message."""


class Outbox(Protocol):
    """Where news goes."""

    def send(self, message: FromEngine) -> None:
        """Send a message; waits while the front is behind with reading, so that no more than a few are ever kept."""
        ...

    def beat(self, heartbeat: Heartbeat) -> None:
        """Send a heartbeat, or leave it while other messages wait to be read; from any thread."""
        ...


@dataclass(slots=True)
class _Compiled:
    """A request whose grammar is ready, or has failed to be."""

    message: AddRequest
    grammar: Grammar | None = None
    error: RequestError | None = None


Inbox = SimpleQueue[ToEngine | _Compiled]
"""Messages from the front, in order; any thread may put some."""


class EventLog:
    """A `Recorder` that keeps events until the loop sends them."""

    def __init__(self) -> None:
        self.events: list[RequestEvent] = []
        self.step: StepEvent | None = None
        self.num_before_step = 0

    def on_request(self, event: RequestEvent) -> None:
        """Keep what happened to a sequence."""
        self.events.append(event)

    def on_step(self, event: StepEvent) -> None:
        """Keep the step; the loop sends it before the next."""
        assert self.step is None, f"step {event.step} ended before step {self.step.step} was sent"
        self.step = event
        self.num_before_step = len(self.events)


class _Pulse:
    """Gives signs of life on a thread of its own, which holds nothing of the engine: it may outlive it for a moment."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._ended = threading.Event()
        self.progress_s: float | None = None
        """See `Heartbeat`."""

    def start(self) -> None:
        threading.Thread(target=self._run, name="octavo-heartbeat", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self._outbox.beat(Heartbeat(time.monotonic(), self.progress_s))


class EngineLoop:
    """Runs an engine for a front.

    Args:
        engine: nobody else may touch its core from now on.
        log: the recorder the engine was started with.
        inbox: messages from the front.
        outbox: where news goes.
    """

    def __init__(self, engine: Engine, log: EventLog, inbox: Inbox, outbox: Outbox) -> None:
        self._core: EngineCore = engine.core
        self._bytes_per_state = 4 * engine.model_config.hidden_size
        self._log = log
        self._inbox = inbox
        self._outbox = outbox
        self._serving = True
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, "octavo-grammar")
        self._compiling: dict[str, tuple[AddRequest, Future[None]]] = {}
        self._pulse = _Pulse(outbox)
        self._outputs: list[EngineOutput] = []
        self._refusals: list[Refusal] = []
        self._aborted: list[str] = []

    def run(self) -> None:
        """Serve until told to shut down.

        Raises:
            EngineDeadError: the core has given up; the front has been told.
        """
        core = self._core
        self._pulse.start()
        try:
            while True:
                self._take_messages(wait=not core.has_unfinished)
                if not self._serving:
                    return
                if core.has_unfinished:
                    self._outputs += core.step()
                self._tell()
        except EngineDeadError as error:
            self._tell()  # the events of the last step
            self._outbox.send(Died(str(error)))
            raise
        except Exception as error:
            traceback.print_exc()
            self._outbox.send(Died(f"the engine's loop failed: {error!r}"))
            raise EngineDeadError(f"the engine's loop failed: {error!r}") from error
        finally:
            self._pulse.end()
            self._compilers.shutdown(wait=False, cancel_futures=True)

    def _take_messages(self, *, wait: bool) -> None:
        """Act on all messages that are there; where there is no work, wait for the first."""
        if wait:
            self._pulse.progress_s = None
            self._act(self._inbox.get())
        self._pulse.progress_s = time.monotonic()
        while True:
            try:
                message = self._inbox.get_nowait()
            except Empty:
                return
            self._act(message)

    def _act(self, message: ToEngine | _Compiled) -> None:
        match message:
            case AddRequest():
                self._add(message)
            case _Compiled():
                self._add_compiled(message)
            case Abort():
                for request_id in message.request_ids:
                    if request_id in self._compiling:
                        self._compiling.pop(request_id)[1].cancel()
                    self._outputs += self._core.abort(request_id)
                self._aborted += message.request_ids
            case Finish():
                last = self._core.finish(message.request_id, message.index, message.num_output_tokens)
                if last is not None:
                    self._outputs.append(last)
            case Call():
                self._tell()  # what came before the answer is known before it
                self._outbox.send(Reply(message.call_id, self._answer(message)))
            case Shutdown():
                self._serving = False
            case Hello():
                raise AssertionError("a running engine is started")

    def _add(self, message: AddRequest, grammar: Grammar | None = None) -> None:
        try:
            params = unpacked_params(message.params, message.given)
            if params.structured_outputs is not None and grammar is None:
                if len(self._compiling) >= MAX_COMPILING:
                    raise BusyError(
                        f"structured_outputs is given while those of {MAX_COMPILING} other requests wait to be "
                        "compiled; allowed: later",
                        "structured_outputs",
                    )
                self._compiling[message.request_id] = message, self._compilers.submit(self._compile, message, params)
                return
            self._check_hidden_states(params)
            self._core.add_request(
                message.request_id,
                message.prompt_token_ids,
                params,
                stream=message.stream,
                cache_domain=message.cache_domain,
                grammar=grammar,
                arrived_s=message.arrived_s,
            )
        except RequestError as error:
            self._refuse(message, error)

    def _refuse(self, message: AddRequest, error: RequestError) -> None:
        self._refusals.append(Refusal(message.request_id, str(error), error.param, isinstance(error, BusyError)))

    def _compile(self, message: AddRequest, params: SamplingParams) -> None:
        """Compile a grammar, which may take a second, while steps go on; runs on a thread of its own."""
        compiled = _Compiled(message)
        try:
            compiled.grammar = self._core.compile_grammar(params)
        except RequestError as error:
            compiled.error = error
        except Exception as error:
            traceback.print_exc()
            compiled.error = RequestError(f"structured_outputs cannot be compiled: {error!r}", "structured_outputs")
        self._inbox.put(compiled)

    def _add_compiled(self, compiled: _Compiled) -> None:
        message = compiled.message
        waiting = self._compiling.get(message.request_id)
        if waiting is None or waiting[0] is not message:
            return  # aborted meanwhile
        del self._compiling[message.request_id]
        if compiled.error is not None:
            self._refuse(message, compiled.error)
        else:
            self._add(message, compiled.grammar)

    def _check_hidden_states(self, params: SamplingParams) -> None:
        num_states = len(params.return_hidden_states or ()) * (params.max_tokens or 0) * params.n
        if num_states * self._bytes_per_state > MAX_HIDDEN_STATES_BYTES:
            raise RequestError(
                f"return_hidden_states asks for up to {num_states * self._bytes_per_state} bytes; "
                f"allowed: {MAX_HIDDEN_STATES_BYTES}, with fewer layers or a smaller max_tokens",
                "return_hidden_states",
            )

    def _answer(self, call: Call) -> KVSnapshot | None:
        if call.what == "snapshot":
            return self._core.snapshot()
        self._core.scheduler.reset_prefix_cache()
        return None

    def _tell(self) -> None:
        """Send everything that has come up, if anything has."""
        log = self._log
        if self._outputs or self._refusals or self._aborted or log.events or log.step:
            news = News(self._outputs, self._refusals, self._aborted, log.events, log.step, log.num_before_step)
            self._outputs, self._refusals, self._aborted, log.events, log.step = [], [], [], [], None
            self._outbox.send(news)
