"""This module holds a bar for work that has parts: what is done now, how far it is, how long it will take. It does not
know the work.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from .terminal import stderr

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["PartsBar"]


class PartsBar:
    """Shows a bar on a terminal, and nothing elsewhere unless lines are wanted.

    Args:
        quiet: show nothing anywhere.
        lines: where stderr is no terminal, print a line as each part begins.
    """

    def __init__(self, *, quiet: bool, lines: bool = False) -> None:
        self._console = stderr()
        self._bar: Progress | None = None
        self._what = ""
        self._is_lines = lines and not quiet and not self._console.is_terminal
        if self._console.is_terminal and not quiet:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                *(TextColumn("  {task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(compact=True)),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> PartsBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_progress(self, what: str, done: int, total: int) -> None:
        """Note how far a part of the work is; a part whose count goes on from the last one's keeps the bar going."""
        is_new, self._what = what != self._what, what
        if self._is_lines and is_new:
            self._console.print(what, style="dim")
        if self._bar is None:
            return
        if is_new and done == 0:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
        if not self._bar.task_ids:
            self._bar.add_task(what, total=total)
        self._bar.update(self._bar.task_ids[0], description=what, completed=done, total=total)
