"""This module runs any number of requests through an engine in bounded memory. It does not know files or terminals."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import EngineDeadError, RequestError
from .requests import BadRequest, BatchRequest

if TYPE_CHECKING:
    from ..llm import LLM
    from ..step import RequestOutput

__all__ = ["Finished", "run_batch"]


@dataclass(slots=True)
class Finished:
    """A request and how it ended: `output`, or `error` where there is no answer."""

    request: BatchRequest | BadRequest
    output: RequestOutput | None = None
    error: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or (self.output is not None and self.output.finished)


def run_batch(
    llm: LLM,
    requests: Iterable[BatchRequest | BadRequest],
    *,
    window: int,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[], None] = lambda: None,
    on_growth: Callable[[Finished], None] | None = None,
) -> Iterator[Finished]:
    """Run requests together, up to `window` of them taken from the iterable and not yet yielded.

    Args:
        llm: the engine; nothing else may run steps meanwhile.
        requests: read only as fast as they are needed.
        window: bounds what is held in memory.
        should_stop: asked before every step.
        on_step: called after every step.
        on_growth: called after every step with the first request that is not over, if it has any text.

    Yields:
        Every request in its order, as soon as it and all before it are over. When stopped: those over that are left.

    Raises:
        EngineDeadError: after those over were yielded.
    """
    source = iter(requests)
    held: deque[Finished] = deque()
    running: dict[str, Finished] = {}
    is_drained = False
    try:
        while True:
            while not is_drained and len(held) < window:
                request = next(source, None)
                is_drained = request is None
                if request is not None:
                    held.append(_start(llm, request, running, stream=on_growth is not None))
            while held and held[0].is_over:
                yield held.popleft()
            if not held and is_drained:
                return
            if not running:
                continue
            if should_stop():
                break
            for output in llm.step():
                if output.request_id in running:
                    _note(output, running)
            on_step()
            if on_growth is not None and held and held[0].output is not None:
                on_growth(held[0])
    except EngineDeadError:
        yield from (each for each in held if each.is_over)
        raise
    finally:
        for request_id in running:
            llm.abort(request_id)
    yield from (each for each in held if each.is_over)


def _start(llm: LLM, request: BatchRequest | BadRequest, running: dict[str, Finished], *, stream: bool) -> Finished:
    if isinstance(request, BadRequest):
        return Finished(request, error=request.error)
    entry = Finished(request)
    try:
        running[llm.add(request.prompt, request.params, stream=stream)] = entry
    except RequestError as error:
        entry.error = f"{request.place}: {error}"
    return entry


def _note(output: RequestOutput, running: dict[str, Finished]) -> None:
    entry = running[output.request_id]
    assert isinstance(entry.request, BatchRequest), "only these run"
    entry.output = output
    if not output.finished:
        return
    del running[output.request_id]
    failed = [each for each in output.outputs if each.finish_reason == "error"]
    if failed:
        entry.output = None
        entry.error = f"{entry.request.place}: {failed[0].error or 'the engine gave no reason'}"
