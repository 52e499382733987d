"""This package holds the replay of recordings: a recorded schedule run again without a model, and compared by step.
It does not know argv.
"""

from __future__ import annotations

from .difference import Difference
from .run import Outcome, replay
from .script import Script, read_bundle
from .shrink import Minimal, shrink

__all__ = ["Difference", "Minimal", "Outcome", "Script", "read_bundle", "replay", "shrink"]
