"""This module holds `octavo replay`: a recorded schedule run again, and what is said of it. It does not know how."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .endings import FAILED, INTERRUPTED, OK, Interrupt
from .outputs import STDOUT, check_output, write_output
from .terminal import error_line, show, stderr

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..observe.recording import Recording
    from ..tools.replay import Difference, Minimal, Script

__all__ = ["ReplayOptions", "replay"]

REFRESH_S = 0.1


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What to do with a recording besides replaying it.

    Raises:
        ConfigError: a file cannot be written.
    """

    shrink: bool = True
    """Where it differs: look for the fewest requests that show the same difference."""
    output: Path | None = None
    """Write these there, as a recording; not given: the bundle's name with -minimal, in this folder."""
    json: Path | None = None
    """Write what was found there as JSON, or to stdout with -."""

    def __post_init__(self) -> None:
        check_output("--output", self.output)
        check_output("--json", self.json)
        if self.output is not None and not self.shrink:
            raise ConfigError("--output takes what --no-shrink does not look for; leave one of them out")


def replay(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", show_default=False)],
    *,
    options: ReplayOptions,
    quiet: bool,
) -> int:
    """Run a recorded schedule again, without a model, and name the first step that differs.

    BUNDLE is a recording (GET /recording of a server, --recording of octavo generate) or a crash bundle. The scheduler
    and the block pool are those of this version of octavo; requests come, stop and are aborted in the steps in which
    they did. The exit status is 1 where the schedule is another.
    """
    from ..tools.replay import Script, read_bundle, replay

    path = options.output or Path(f"{bundle.stem}-minimal.json")
    recording = read_bundle(bundle)
    if path.exists() and path.samefile(bundle):
        raise ConfigError(f"--output {path} is the bundle itself; name another file")
    script = Script.of(recording)
    if not quiet:
        for line in _notes(bundle, recording, script):
            stderr().print(line, style="dim")
    start = time.monotonic()
    with _Bar(len(script.steps), quiet=quiet) as bar:
        outcome = replay(script, on_step=bar.step)
    found: dict[str, Any] = {"same": outcome.difference is None, "num_steps": outcome.num_steps}
    found["first_step"] = script.steps[0].event.step
    if outcome.difference is None:
        words = f"same schedule: {_some(outcome.num_steps, 'step')}, {_some(script.num_requests, 'request')}"
        if options.json != STDOUT:
            show(words)
        if not quiet:
            stderr().print(f"replayed in {time.monotonic() - start:.1f} s", style="dim")
        if options.json is not None:
            write_output(options.json, json.dumps(found, indent=2) + "\n")
        return OK
    found["difference"] = _as_json(script, outcome.difference)
    if options.json != STDOUT:
        _show_difference(script, outcome.difference)
    status = FAILED
    if options.shrink and script.limits.max_steps_in_flight > 1:
        if options.json != STDOUT:
            show("\nfewer requests are not looked for: the steps of this run overlap")
    elif options.shrink:
        minimal, was_stopped = _shrink(script, outcome.difference, quiet=quiet)
        write_output(path, json.dumps(minimal.recording, separators=(",", ":")))
        num_requests, num_steps = minimal.script.num_requests, len(minimal.script.steps)
        found["minimal"] = {"file": str(path), "num_requests": num_requests, "num_steps": num_steps}
        if options.json != STDOUT:
            kept = f"{num_requests:,} of {_some(script.num_requests, 'request')} in {_some(num_steps, 'step')}"
            show(f"\n{kept} show the same difference: {path}")
        if was_stopped:
            error_line("fewer may do; run it again to go on looking", label="interrupted: ")
            status = INTERRUPTED
    if options.json is not None:
        write_output(options.json, json.dumps(found, indent=2) + "\n")
    return status


def _notes(bundle: Path, recording: Recording, script: Script) -> list[str]:
    facts, limits, last = recording.facts, script.limits, script.steps[-1].event
    lines = [
        f"{bundle.name}: {_some(len(script.steps), 'step')}, {_some(script.num_requests, 'request')}, "
        f"model {facts.get('model', 'unknown')}, {limits.num_blocks:,} blocks of {limits.block_size}, "
        f"{limits.max_num_seqs:,} sequences, {limits.max_num_batched_tokens:,} tokens a step"
    ]
    if script.previous is not None:
        lines.append(
            f"it begins in the middle of a run: replayed are steps {script.previous.step + 1:,} to {last.step:,}, "
            "after a moment when nothing was under way"
        )
        if limits.prefix_caching:
            lines.append(
                "what was cached then is guessed from what was found later, and the number of cached blocks is not "
                "compared; a full pool can make the guess wrong"
            )
    return lines


def _show_difference(script: Script, difference: Difference) -> None:
    from ..tools.replay.difference import table

    step = script.steps[difference.place].event.step
    head, *sides = difference.lines(script)
    show(f"step {step:,} differs in {head}" if difference.field != "error" else f"step {step:,}: {head}", "bold")
    for line in sides:
        show(line)
    rows = table(script, difference)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    show("")
    for row in rows:
        cells = [
            cell.ljust(width) if i in (1, 8, 9) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        show("  ".join(cells).rstrip(), "dim" if row is rows[0] else None)


def _as_json(script: Script, difference: Difference) -> dict[str, Any]:
    if difference.field == "error":
        recorded, here = "", difference.here["error"]
    else:
        recorded, here = difference.words(script)
    step = script.steps[difference.place].event.step
    return {"step": step, "field": difference.field, "recorded": recorded, "here": here}


def _shrink(script: Script, difference: Difference, *, quiet: bool) -> tuple[Minimal, bool]:
    from ..tools.replay import shrink

    with Interrupt() as interrupt, _Bar(None, quiet=quiet) as bar:
        minimal = shrink(script, difference, on_try=bar.tried, should_stop=lambda: interrupt.wanted)
    return minimal, interrupt.wanted


class _Bar:
    """Shows on a terminal how far a replay is, or how small a recording has become."""

    def __init__(self, total: int | None, *, quiet: bool) -> None:
        self._progress: Progress | None = None
        self._shown_s = 0.0
        self._num_done = 0
        console = stderr()
        if console.is_terminal and not quiet:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(bar_width=24), TextColumn("{task.description}", style="dim"))
            self._progress = Progress(
                *columns, TimeRemainingColumn(compact=True), console=console, auto_refresh=False, transient=True
            )
            self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> _Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self) -> None:
        """Note that a step was replayed."""
        self._num_done += 1
        self._show(lambda: f"{self._num_done:,} steps")

    def tried(self, num_tries: int, num_requests: int) -> None:
        """Note that a smaller recording is tried."""
        self._show(lambda: f"looking for fewer requests: {num_requests:,} left after {num_tries:,} tries")

    def _show(self, words: Callable[[], str]) -> None:
        if self._progress is not None and time.monotonic() - self._shown_s > REFRESH_S:
            self._shown_s = time.monotonic()
            self._progress.update(self._task, completed=self._num_done, description=words(), refresh=True)


def _some(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
