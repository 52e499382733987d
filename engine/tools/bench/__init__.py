"""This package holds benchmarks without a server: an engine's throughput and latency, single ops, and how any result
compares with an earlier one. It does not know argv.
"""

from __future__ import annotations

from ...errors import OctavoError

__all__ = ["WrongResultError"]


class WrongResultError(OctavoError):
    """What was to be timed is wrong: its speed is not told."""
