"""This module holds `octavo doctor`: what is found of this machine, by line. It does not know what is looked at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .endings import FAILED, OK
from .outputs import STDOUT, check_output, write_output
from .terminal import show, stderr

if TYPE_CHECKING:
    from ..tools.doctor import Finding

__all__ = ["DoctorOptions", "doctor"]

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
INDENT = 8


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What to look at besides the machine.

    Raises:
        ConfigError: a value is not allowed.
    """

    port: int = 8000
    """That a server would take."""
    self_test: bool = True
    """Run the engine with a tiny model, and some kernels against their references."""
    json: Path | None = None
    """Write what was found there as JSON, or to stdout with -."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port is {self.port}; allowed: 0 to 65535")
        check_output("--json", self.json)


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)] = None,
    *,
    options: DoctorOptions,
    quiet: bool,
) -> int:
    """Look at this machine: what octavo can run here, what is missing, and what to do about it.

    With a MODEL (a folder, a config.json, a bundled name, a .gguf file or a hub id) also whether it fits. The exit
    status is 1 where something fails.
    """
    console = stderr()
    findings: list[Finding] = []
    as_lines = options.json != STDOUT
    with console.status("") if console.is_terminal and not quiet else _Nothing() as status:
        from ..tools.doctor import examine

        def looking(at: str) -> None:
            status.update(f"looking at {at}")
            status.start()

        for finding in examine(model, port=options.port, self_test=options.self_test, on_section=looking):
            status.stop()
            if as_lines:
                _show(finding, is_first=not findings or findings[-1].section != finding.section, quiet=quiet)
            findings.append(finding)
    counts = {status: sum(finding.status == status for finding in findings) for status in STYLES}
    if as_lines:
        show(f"\n{counts['ok']} ok, {_some(counts['warn'], 'warning')}, {_some(counts['fail'], 'failure')}")
    if options.json is not None:
        found = {"counts": counts, "findings": [finding._asdict() for finding in findings]}
        write_output(options.json, json.dumps(found, indent=2) + "\n")
    return FAILED if counts["fail"] else OK


class _Nothing:
    """Stands for a status line where nobody sees one."""

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, text: str) -> None:
        """Say nothing."""

    def start(self) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Go on showing nothing."""


def _show(finding: Finding, *, is_first: bool, quiet: bool) -> None:
    if quiet and finding.status == "ok":
        return
    if is_first and not quiet:
        show(f"\n{finding.section}", "bold")
    show(f"  {finding.status.value:<{INDENT - 2}}", STYLES[finding.status], end="")
    show(f"{finding.name}: {finding.text}")
    if finding.fix:
        show(f"{'':{INDENT}}{finding.fix}", "dim")


def _some(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
