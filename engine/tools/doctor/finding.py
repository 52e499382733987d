"""This module holds what is found of one thing that was looked at. It does not know what was looked at."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

__all__ = ["Finding", "Status"]


class Status(StrEnum):
    """How something is."""

    OK = "ok"
    WARN = "warn"
    """octavo runs, but something of it does not, or not well."""
    FAIL = "fail"
    """octavo does not run, or not what was asked for."""


class Finding(NamedTuple):
    """One line of a doctor's report."""

    section: str
    name: str
    status: Status
    text: str
    fix: str = ""
    """What to do, a command where there is one."""
