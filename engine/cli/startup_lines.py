"""This module holds what a verb shows of a start-up: what it waits for, then where the seconds went. It does not know
what a phase does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING

from ..config import EngineConfig, GenerationConfig
from .terminal import printable, stderr

if TYPE_CHECKING:
    from ..events import Recorder
    from ..llm import LLM
    from ..resolve import Choice
    from ..startup import StartupPhase

__all__ = ["StartBar", "start_llm", "startup_lines"]

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def start_llm(config: EngineConfig, *, quiet: bool, recorder: Recorder | None = None) -> LLM:
    """Start an engine; unless quiet, stderr shows what it waits for, then a table of phases and choices.

    Raises:
        ConfigError, CheckpointError, CapacityError: it cannot be started.
    """
    start = time.monotonic()
    with StartBar(quiet=quiet) as bar:
        from ..llm import LLM

        llm = LLM(config=config, on_phase=bar.on_phase, on_weights=bar.on_weights, recorder=recorder)
    engine = llm.engine
    if not quiet:
        seconds = time.monotonic() - start
        for line, style in startup_lines(
            config, engine.phases, engine.resolved.choices, engine.generation_config, seconds
        ):
            stderr().print(printable(line), style=style)
    return llm


class StartBar:
    """Shows on a terminal which phase a start-up is in, and how much of the weights is read; nothing elsewhere.

    Args:
        quiet: show nothing anywhere.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._console = stderr()
        self._is_shown = self._console.is_terminal and not quiet

    def __enter__(self) -> StartBar:
        if self._is_shown:
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            self._waiting = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), console=self._console, transient=True
            )
            self._loading = Progress(
                *(TextColumn("  load the weights"), BarColumn(bar_width=24), DownloadColumn(binary_units=True)),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
            )
            self._phase = self._waiting.add_task("start", total=None)
            self._weights = self._loading.add_task("", total=None)
            self._waiting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_shown:
            self._loading.stop()
            self._waiting.stop()

    def on_phase(self, name: str) -> None:
        """Note that a phase has begun."""
        if not self._is_shown:
            return
        self._loading.stop()
        if name == "load the weights":
            self._waiting.stop()
            self._loading.start()
        else:
            self._waiting.update(self._phase, description=name)
            self._waiting.start()

    def on_weights(self, num_bytes: int, total_bytes: int) -> None:
        """Note how much of the weights is read."""
        if self._is_shown:
            self._loading.update(self._weights, completed=num_bytes, total=total_bytes)


def startup_lines(
    config: EngineConfig,
    phases: Sequence[StartupPhase],
    choices: Sequence[Choice],
    generation_config: GenerationConfig,
    seconds: float,
) -> list[tuple[str, str]]:
    """Return what to say of a start, each line with its style."""
    width = max(len(phase.name) for phase in phases)
    lines = [(f"octavo  {config.model}", "bold")]
    lines += [(f"{phase.seconds:6.2f} s  {phase.name:<{width}}  {phase.detail}", "dim") for phase in phases]
    lines += [(f"{seconds:6.2f} s  ready", "green")]
    lines += [(f"  {choice.name} {choice.value}: {choice.reason}", "dim") for choice in choices]
    if config.generation_config == "auto" and (found := _sampling_defaults(generation_config)):
        lines.append((f"  {found}: the model's sampling defaults (--generation-config none: octavo's own)", "dim"))
    return lines


def _sampling_defaults(config: GenerationConfig) -> str:
    values = asdict(config)
    return ", ".join(f"{name} {values[name]:g}" for name in DEFAULTS if values[name] is not None)
