"""This module holds whether an engine makes progress, by its own reports. It does not know what is done about it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .messages import Heartbeat

__all__ = ["Health", "Vitals"]

MAX_HEARTBEAT_AGE_S = 10.0
MAX_STEP_AGE_S = 120.0


@dataclass(frozen=True, slots=True)
class Health:
    """Whether requests make progress."""

    ok: bool
    reason: str
    """Why not; "" where all is well."""
    heartbeat_age_s: float
    """Since the engine's process last gave a sign of life."""
    last_step_age_s: float | None
    """Since the last step ended, or work began; None: nothing to do."""
    num_unfinished: int


class Vitals:
    """The latest signs of life of an engine that has just started."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat(time.monotonic(), None)
        self.step_s = 0.0
        """When the last step ended that the front has heard of."""

    def health(self, trouble: str | None, num_unfinished: int) -> Health:
        """Judge by what is known now.

        Args:
            trouble: why nothing more is served, where that is known.
            num_unfinished: requests that wait for something.
        """
        now = time.monotonic()
        heartbeat_age_s = now - self.heartbeat.time_s
        progress_s = self.heartbeat.progress_s
        step_age_s = None
        if progress_s is not None and num_unfinished:
            step_age_s = now - max(self.step_s, progress_s)
        reason = trouble or ""
        if not reason and heartbeat_age_s > MAX_HEARTBEAT_AGE_S:
            reason = f"the engine has given no sign of life for {heartbeat_age_s:.0f} s"
        elif not reason and step_age_s is not None and step_age_s > MAX_STEP_AGE_S:
            reason = f"no step has ended for {step_age_s:.0f} s"
        return Health(not reason, reason, heartbeat_age_s, step_age_s, num_unfinished)
