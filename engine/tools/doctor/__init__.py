"""This package holds the examination of a machine: what it can run, what is missing, and the command that mends it. It
does not know argv.
"""

from __future__ import annotations

from .examine import examine
from .finding import Finding, Status

__all__ = ["Finding", "Status", "examine"]
