"""This module holds the page: one file that needs nothing else. It does not know what stands in it."""

from __future__ import annotations

from html import escape
from pathlib import Path

from .markup import SORTABLE, Html, note, tag

__all__ = ["Page"]

_FOLDER = Path(__file__).parent


class Page:
    """A report, section by section.

    Args:
        title: its name.
        subtitle: what it is about, in one line.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._body = [tag("h1", title), *([note(subtitle)] if subtitle else [])]

    def add(self, title: str, *parts: str) -> None:
        """Add a section.

        Args:
            title: its heading; "": none.
            parts: `Html` as it is, any other text as a paragraph.
        """
        if title:
            self._body.append(tag("h2", title))
        self._body += [part if isinstance(part, Html) else note(part) for part in parts]

    def html(self) -> str:
        """Return the whole page."""
        body = "\n".join(self._body)
        script = f"<script>\n{_read('sort.js')}</script>\n" if SORTABLE in body else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title>\n<style>\n{_read('style.css')}</style></head>\n"
            f"<body>\n{body}\n{script}</body>\n</html>\n"
        )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
