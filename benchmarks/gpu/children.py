"""This module runs processes that tell of their cases, and outlives whatever happens to them. It does not know the
cases.

A process that dies or hangs in a case is started again without it: an illegal memory access breaks every later call of
its process, and none of the next one's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .lines import POISONED, missing_package

__all__ = ["Job", "Report", "run_job"]

Report = Callable[[str, dict[str, Any]], None]

POLL_S: Final = 0.05
STARTUP_S: Final = 60.0
"""On top of a case's time: imports, a CUDA context, collecting tests."""
MAX_OUTPUT: Final = 4000
HARMLESS: Final = (0, 1, 5, POISONED)
"""Exit statuses of a process that has told all: well, a test failed, no test was chosen, its last case failed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One process to run.

    Args:
        name: its name, and its case's where it does not tell of cases itself.
        argv: the command.
        case_timeout_s: how long one case may take.
        tells: whether it takes --lines and --skip; otherwise its exit status is its only outcome.
        env: added to the environment.
        collect: of one that does not tell: what its cases are after it succeeded.
    """

    name: str
    argv: list[str]
    case_timeout_s: float = 120.0
    tells: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    collect: Callable[[], dict[str, dict[str, Any]]] | None = None


class _Attempt:
    """One process of a job, followed to its end."""

    def __init__(self, job: Job, report: Report, skip: set[str], folder: Path) -> None:
        self.job, self._report, self._skip = job, report, skip
        self._lines, self._output = folder / "lines", folder / "output"
        self._lines.touch()
        argv = list(job.argv)
        if job.tells:
            (folder / "skip").write_text(json.dumps(sorted(skip)), encoding="utf-8")
            argv += ["--lines", str(self._lines), "--skip", str(folder / "skip")]
        self._read_bytes = 0
        self.left: set[str] = set()
        self.has_plan = False
        self.current: str | None = None
        self.num_finished = 0
        self._since = time.monotonic() + STARTUP_S
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                argv, env=os.environ | job.env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def follow(self, deadline: float) -> str:
        """Return how it ended: "exited", "timed out" or "out of time"."""
        try:
            while self._process.poll() is None:
                now = time.monotonic()
                if now > deadline:
                    return "out of time"
                if now - self._since > self.job.case_timeout_s:
                    return "timed out"
                self._read()
                time.sleep(POLL_S)
            return "exited"
        finally:
            self._stop()
            self._read()

    def _stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        with self._lines.open("rb") as file:
            file.seek(self._read_bytes)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.decode().splitlines():
            self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        self._since = time.monotonic()
        if "plan" in line:
            self.left, self.has_plan = set(line["plan"]) - self._skip, True
            return
        case = line.pop("case")
        self.left.discard(case)
        if line["status"] == "started":
            self.current = case
            return
        self.current = None
        self.num_finished += 1
        self._skip.add(case)
        self._report(case, line)

    @property
    def returncode(self) -> int:
        return int(self._process.returncode)

    @property
    def output(self) -> str:
        """The end of what it printed."""
        return self._output.read_text(encoding="utf-8", errors="replace")[-MAX_OUTPUT:]

    def end_case(self, case: str, status: str, reason: str) -> None:
        """Report a case that could not tell its own end."""
        missing = missing_package(self.output)
        if missing and status == "crashed":
            self._report(case, {"status": "not run", "reason": f"needs the package {missing}"})
        else:
            self._report(case, {"status": status, "reason": reason, "output": self.output})
        self._skip.add(case)


def run_job(job: Job, report: Report, finished: Iterable[str], deadline: float) -> int:
    """Run a job's cases, but for those finished, each reported as soon as it ends.

    Args:
        deadline: on the monotonic clock; then the process is killed.

    Returns:
        How many cases were not run for want of time.
    """
    skip = set(finished)
    if not job.tells and job.name in skip:
        return 0
    while True:
        with tempfile.TemporaryDirectory() as folder:
            attempt = _Attempt(job, report, skip, Path(folder))
            ended = attempt.follow(deadline)
            case = attempt.current or job.name
            if ended == "out of time":
                return len(attempt.left) + (attempt.current is not None) or 1
            if ended == "timed out":
                attempt.end_case(case, "timed out", f"no end after {job.case_timeout_s:.0f} s")
            elif not job.tells:
                _report_exit(job, attempt, report)
                return 0
            elif attempt.current is not None:
                attempt.end_case(case, "crashed", f"exit status {attempt.returncode}")
            elif attempt.returncode in HARMLESS and attempt.has_plan and not attempt.left:
                return 0
            elif not attempt.left or not attempt.num_finished:  # another try would end as this one
                attempt.end_case(job.name, "crashed", f"exit status {attempt.returncode}")
                return 0
            if attempt.current is None and not attempt.num_finished:
                return 0


def _report_exit(job: Job, attempt: _Attempt, report: Report) -> None:
    if attempt.returncode:
        attempt.end_case(job.name, "crashed", f"exit status {attempt.returncode}")
        return
    cases = job.collect() if job.collect else {job.name: {"status": "passed"}}
    for name, facts in cases.items():
        report(name, facts)
