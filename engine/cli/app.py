"""This module holds the list of verbs. It does not know what they do."""

from __future__ import annotations

import typer

from .chat import chat
from .flags import with_flags
from .generate import generate
from .help import GroupedCommand

__all__ = ["app"]

app = typer.Typer(
    help="octavo, an LLM inference engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=GroupedCommand)(with_flags(generate))
app.command(cls=GroupedCommand)(with_flags(chat))


@app.callback()
def _root() -> None:
    """Keep the verbs verbs, even where there is only one."""
