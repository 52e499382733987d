"""This package holds the command line: one module per verb. It does not know tensors or the scheduler.

Nothing here imports torch before a verb needs a model, so that `octavo --help` answers at once.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the `octavo` command with the process's arguments; exits with its status."""
    from .app import app

    app(prog_name="octavo")
