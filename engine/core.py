"""This module holds the engine's loop: schedule, execute, update. It does not know text, HTTP or which device runs.

With overlap the loop is one step ahead: it hands step N + 1 to the runner before it waits for step N, so that the
device has work while the host takes N over. Steps come back in order, one at each `step`, and what goes wrong in one
is told when its turn has come.

It is the only place where a scheduler and a runner meet. What may never be added here: a loop over requests, a tensor,
a reading of the clock outside the injected one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import EngineDeadError, RequestError
from .events import KVSnapshot
from .request import Request
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .step import EngineOutput, Grammar, ModelOutput, ModelRunner, SchedulerOutput

if TYPE_CHECKING:
    from .step import StepHandle

__all__ = ["EngineCore"]

MAX_FAILED_STEPS = 3
"""Steps that may fail in a row before the engine gives up."""


class _Interrupted(Exception):  # noqa: N818 (nothing is wrong)
    """Ctrl-C came in the middle of a step."""


class _Raised:
    """The handle of a step that could not be started, or was left in the middle: what it wrote is unknown."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(self) -> ModelOutput:
        raise self._error


class EngineCore:
    """Runs many sequences together, one step at a time.

    Args:
        scheduler: decides what runs, and tells its recorder.
        runner: runs it.
        seed: where seeds of requests without one come from.
        grammars: turns a request's `structured_outputs` into a grammar; None: there is no text, so there are none.
        explain: given what a step has raised, returns what to tell of it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        seed: int = 0,
        grammars: Callable[[Mapping[str, Any]], Grammar] | None = None,
        explain: Callable[[Exception], Exception] = lambda error: error,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._rng = Random(seed)
        self._grammars = grammars
        self._explain = explain
        self._num_failed_steps = 0
        self._num_arrived = 0
        self._flights: deque[tuple[SchedulerOutput, StepHandle]] = deque()
        """Steps that are out, in order."""

    def compile_grammar(self, params: SamplingParams) -> Grammar | None:
        """Compile what a request wants its output to look like; None where it wants nothing.

        Takes up to seconds and may be called from any thread, so that a loop need not stand still for it.

        Raises:
            RequestError: it cannot be compiled; `param` is "structured_outputs".
        """
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise RequestError(
                "structured_outputs is given and the model has no tokenizer; leave it out", "structured_outputs"
            )
        return self._grammars(params.structured_outputs)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = False,
        cache_domain: str = "",
        grammar: Grammar | None = None,
        arrived_s: float | None = None,
    ) -> None:
        """Queue a request: `params.n` sequences over one prompt.

        Args:
            request_id: unique among the requests that are not finished.
            prompt_token_ids: token ids below the width of the logits.
            params: `max_tokens` of None means up to the engine's limit.
            stream: report each token as it comes, instead of all at the end.
            cache_domain: whom the request comes from; prefix blocks never cross domains, whatever `params.cache_salt`.
            grammar: what `compile_grammar` returned for these parameters; None: compiled here if there is one.
            arrived_s: when it reached the front, on the engine's clock; None: now. Waiting times count from there.

        Raises:
            RequestError: the request can never run, or its id is taken.
        """
        limits = self.scheduler.limits
        max_tokens = params.validate_for(
            vocab_size=limits.vocab_size,
            max_model_len=min(limits.max_model_len, limits.num_slots),
            prompt_len=len(prompt_token_ids),
        )
        tokens = _checked_tokens(prompt_token_ids, limits.vocab_size)
        stops = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= limits.eos_token_ids
        if grammar is None:
            grammar = self.compile_grammar(params)
        seed = self._rng.getrandbits(63) if params.seed is None else params.seed
        self._num_arrived += 1
        self.scheduler.add(
            [
                Request(
                    request_id=request_id,
                    index=index,
                    token_ids=tokens,
                    num_prompt_tokens=len(tokens),
                    max_num_tokens=len(tokens) + max_tokens,
                    params=params,
                    seed=seed,
                    stop_token_ids=stops,
                    priority=params.priority,
                    grammar=grammar,
                    arrival=self._num_arrived,
                    cache_salt=f"{len(cache_domain)}:{cache_domain}{params.cache_salt or ''}",
                    stream=stream,
                )
                for index in range(params.n)
            ],
            arrived_s,
        )

    def abort(self, request_id: str) -> list[EngineOutput]:
        """End every sequence of a request now and free its blocks; an unknown or finished id is not an error."""
        return self.scheduler.abort(request_id)

    def finish(self, request_id: str, index: int, num_output_tokens: int) -> EngineOutput | None:
        """End one sequence at a stop string the front has found, keeping its first `num_output_tokens` tokens."""
        return self.scheduler.finish(request_id, index, num_output_tokens)

    def snapshot(self) -> KVSnapshot:
        """Return who holds what between two steps, for the live view."""
        return self.scheduler.snapshot()

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs, or a step is out."""
        return self.scheduler.has_unfinished

    def step(self) -> list[EngineOutput]:
        """Hand out what may be out, take the oldest step back and return the news of those sequences that have any.

        Raises:
            EngineDeadError: several steps in a row have failed.
        """
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineDeadError(f"{MAX_FAILED_STEPS} steps failed in a row, and nothing runs since")
        scheduler, flights = self.scheduler, self._flights
        # Nothing can follow a step that the runner has never had.
        while len(flights) < scheduler.limits.max_steps_in_flight and not (
            flights and isinstance(flights[-1][1], _Raised)
        ):
            work = scheduler.schedule()
            if work is None:
                break
            self._execute(work)
        if not flights:
            return []
        work, handle = flights.popleft()
        try:
            output = handle.wait()
        except Exception as error:
            return self._fail(work, error)
        except BaseException:
            flights.appendleft((work, _Raised(_Interrupted())))
            raise
        self._num_failed_steps = 0
        return scheduler.update(work, output)

    def _execute(self, work: SchedulerOutput) -> None:
        try:
            handle: StepHandle = self.runner.execute(work)
        except Exception as error:
            handle = _Raised(error)
        except BaseException:
            self._flights.append((work, _Raised(_Interrupted())))
            raise
        self._flights.append((work, handle))

    def _fail(self, work: SchedulerOutput, error: Exception) -> list[EngineOutput]:
        if isinstance(error, _Interrupted):  # the engine can go on with other requests
            return self.scheduler.fail(work, "the step that ran this request was interrupted")
        self._num_failed_steps += 1
        error = self._explain(error)
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            message = f"{MAX_FAILED_STEPS} steps failed in a row, last with {error!r}"
            self.scheduler.fail(work, message)  # for its events: they are the last that will be known
            raise EngineDeadError(message) from error
        return self.scheduler.fail(work, f"the step that ran this request failed: {error!r}")


def _checked_tokens(token_ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int32]:
    """Return the prompt as an array, with every id inside the logits' width: a larger one would index past a table."""
    try:
        tokens = np.asarray(token_ids)
    except (TypeError, ValueError):
        tokens = np.empty(0)
    # Integers beyond 64 bits become objects, fractions floats, and true or "5" their own kinds.
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise RequestError(
            f"the prompt's token ids are not all allowed; allowed: 0 to {vocab_size - 1}", param="prompt"
        )
    return tokens.astype(np.int32)
