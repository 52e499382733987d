"""This module holds the look of a verb's help: one section per group of flags. It does not know the flags."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

__all__ = ["GroupedCommand"]


class GroupedCommand(TyperCommand):
    """A verb whose help never cuts a flag's name, however narrow the terminal; `rich_help_panel` names the sections."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all sections, in the order of their first flag."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None or param.param_type_name == "argument":
                continue
            names, text = record
            if param.secondary_opts:
                names = f"--[no-]{param.opts[0].removeprefix('--')}"
            sections.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append((names, text))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)
