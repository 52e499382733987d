"""This module starts an engine for a verb and says where the seconds went. It does not know what a phase does."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..config import EngineConfig, GenerationConfig
from .terminal import printable, stderr

if TYPE_CHECKING:
    from rich.console import Console

    from ..llm import LLM
    from ..startup import Engine

__all__ = ["start_llm"]

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def start_llm(config: EngineConfig, *, quiet: bool) -> LLM:
    """Start an engine; unless quiet, stderr shows what it waits for, then a table of phases and choices.

    Raises:
        ConfigError, CheckpointError, CapacityError: it cannot be started.
    """
    start = time.monotonic()
    console = stderr()
    if console.is_terminal and not quiet:
        llm = _start_with_bar(config, console)
    else:
        from ..llm import LLM

        llm = LLM(config=config)
    for line, style in [] if quiet else _lines(llm.engine, time.monotonic() - start):
        console.print(printable(line), style=style)
    return llm


def _start_with_bar(config: EngineConfig, console: Console) -> LLM:
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    waiting = Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True)
    loading = Progress(
        *(TextColumn("  load the weights"), BarColumn(bar_width=24), DownloadColumn(binary_units=True)),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
    phase = waiting.add_task("start", total=None)
    weights = loading.add_task("", total=None)

    def on_phase(name: str) -> None:
        loading.stop()
        if name == "load the weights":
            waiting.stop()
            loading.start()
        else:
            waiting.update(phase, description=name)
            waiting.start()

    try:
        waiting.start()
        from ..llm import LLM

        return LLM(
            config=config,
            on_phase=on_phase,
            on_weights=lambda done, total: loading.update(weights, completed=done, total=total),
        )
    finally:
        loading.stop()
        waiting.stop()


def _lines(engine: Engine, seconds: float) -> list[tuple[str, str]]:
    """Return what to say of a start, each line with its style."""
    width = max(len(phase.name) for phase in engine.phases)
    lines = [(f"octavo  {engine.config.model}", "bold")]
    lines += [(f"{phase.seconds:6.2f} s  {phase.name:<{width}}  {phase.detail}", "dim") for phase in engine.phases]
    lines += [(f"{seconds:6.2f} s  ready", "green")]
    lines += [(f"  {choice.name} {choice.value}: {choice.reason}", "dim") for choice in engine.resolved.choices]
    if engine.config.generation_config == "auto" and (found := _sampling_defaults(engine.generation_config)):
        lines.append((f"  {found}: the model's sampling defaults (--generation-config none: octavo's own)", "dim"))
    return lines


def _sampling_defaults(config: GenerationConfig) -> str:
    values = asdict(config)
    return ", ".join(f"{name} {values[name]:g}" for name in DEFAULTS if values[name] is not None)
