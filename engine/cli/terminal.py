"""This module holds what goes to a terminal and how. It does not know what is said."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["error_line", "printable", "show", "stderr"]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def stderr() -> Console:
    """Return a console on stderr, which all but answers goes to; only a terminal's lines are wrapped."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stderr.isatty())


def show(text: str, style: str | None = None, *, end: str = "\n") -> None:
    """Write text of a model or a user to stdout at once; on a terminal in a style and without control characters."""
    if sys.stdout.isatty():
        text = printable(text)
        if style is not None:
            from rich.console import Console

            console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
            console.print(text, style=style, end=end)
            return
    sys.stdout.write(text + end)
    sys.stdout.flush()


def printable(text: str) -> str:
    r"""Return the text with control characters other than newline and tab written out, as in \x1b."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def error_line(message: str, *, label: str = "error: ") -> None:
    """Print one message on stderr, in red where there is colour."""
    from rich.text import Text

    stderr().print(Text.assemble((label, "bold red"), printable(message)))
