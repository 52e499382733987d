"""This module holds how far a run is and how fast, and shows it on stderr. It does not know who runs it."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from .terminal import stderr

if TYPE_CHECKING:
    from ..llm import LLM

__all__ = ["GenerationBar", "Speed"]

BAR_PERIOD_S = 0.1
LINE_PERIOD_S = 10.0
"""Between lines where stderr is no terminal."""
RATE_WINDOW_S = 5.0
"""The rates shown are those of the last seconds."""


class Shown(Protocol):
    """What is shown beside a bar."""

    @property
    def now(self) -> str:
        """How fast it goes."""
        ...


class Speed:
    """Measures tokens per second from the engine's own counts, step by step.

    A step that runs prompts and generates tokens too is shared out between prefill and decode by their tokens, so that
    the two times add up to the whole.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._stats = self._start = llm.stats
        self._time_s = self._start_s = time.monotonic()
        self._prefill_s = self._decode_s = 0.0
        self._recent: deque[tuple[float, int, int]] = deque([(self._time_s, 0, 0)])

    def step(self) -> None:
        """Note that a step has ended."""
        stats, now = self._llm.stats, time.monotonic()
        num_prefill = stats.num_prefill_tokens - self._stats.num_prefill_tokens
        num_output = stats.num_output_tokens - self._stats.num_output_tokens
        if num_prefill + num_output:
            part = num_prefill / (num_prefill + num_output)
            self._prefill_s += part * (now - self._time_s)
            self._decode_s += (1 - part) * (now - self._time_s)
        self._stats, self._time_s = stats, now
        self._recent.append((now, self.num_prefill_tokens, self.num_output_tokens))
        while len(self._recent) > 2 and now - self._recent[1][0] > RATE_WINDOW_S:
            self._recent.popleft()

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of prompts run so far, those computed again after preemption included."""
        return self._stats.num_prefill_tokens - self._start.num_prefill_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return self._stats.num_output_tokens - self._start.num_output_tokens

    @property
    def now(self) -> str:
        """The rates of the last seconds and what the engine holds."""
        (start, prefill, output), (end, prefill_end, output_end) = self._recent[0], self._recent[-1]
        seconds = max(end - start, 1e-9)
        return (
            f"prefill {(prefill_end - prefill) / seconds:,.0f} tokens/s  "
            f"decode {(output_end - output) / seconds:,.0f} tokens/s  "
            f"{self._stats.num_running} running, {self._stats.num_waiting} waiting"
        )

    @property
    def summary(self) -> str:
        """The whole run in one line."""
        seconds = time.monotonic() - self._start_s
        parts = [f"{self.num_prefill_tokens:,} prompt and {self.num_output_tokens:,} output tokens in {seconds:.1f} s"]
        if self._prefill_s:
            parts.append(f"prefill {self.num_prefill_tokens / self._prefill_s:,.0f} tokens/s")
        if self._decode_s:
            parts.append(f"decode {self.num_output_tokens / self._decode_s:,.0f} tokens/s")
        return " · ".join(parts)


class GenerationBar:
    """Shows how many requests are over: a bar on a terminal, a line now and then elsewhere.

    Args:
        speed: what to show beside it.
        total: number of requests; None: not known.
        num_over: those over before.
        quiet: show nothing.
    """

    def __init__(self, speed: Shown, total: int | None, *, num_over: int, quiet: bool) -> None:
        self._speed = speed
        self._total = total
        self._console = stderr()
        self._num_over = num_over
        self._shown_s = time.monotonic()
        self._is_bar = self._console.is_terminal and not quiet
        self._period_s = BAR_PERIOD_S if self._is_bar else float("inf") if quiet else LINE_PERIOD_S

    def __enter__(self) -> GenerationBar:
        if self._is_bar:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                *(BarColumn(bar_width=24), MofNCompleteColumn()),
                *(TextColumn("{task.description}", style="dim"), TimeRemainingColumn(compact=True)),
                console=self._console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._progress.add_task("", total=self._total, completed=self._num_over)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_bar:
            self._progress.stop()

    def over(self, count: int = 1) -> None:
        """Count more requests that are over."""
        self._num_over += count

    def step(self) -> None:
        """Note that a step has ended, and show it if it is time."""
        now = time.monotonic()
        if now - self._shown_s < self._period_s:
            return
        self._shown_s = now
        if self._is_bar:
            self._progress.update(self._task, completed=self._num_over, description=self._speed.now, refresh=True)
        else:
            total = "" if self._total is None else f" of {self._total:,}"
            self._console.print(f"{self._num_over:,}{total} finished  {self._speed.now}")
