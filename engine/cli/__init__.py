"""This package holds the command line: one module per verb. It does not know tensors or the scheduler.

Nothing here imports torch before a verb needs a model, so that `octavo --help` answers at once.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the `octavo` command with the process's arguments; exits with its status."""
    # Where the caller has closed stdout or stderr, Python has None in its place.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    from .app import app

    app(prog_name="octavo")
