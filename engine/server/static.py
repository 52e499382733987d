"""This module holds the files that browsers get: the page, and the description of the routes. It does not know data."""

from __future__ import annotations

from importlib.resources import files

from .body import send_response
from .errors import HTTPError
from .exchange import Receive, Scope, Send
from .openapi import DOCS_CSS, docs_page

__all__ = ["StaticFiles"]

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "json": "application/json",
    "png": "image/png",
}
_HEADERS = [
    (
        "content-security-policy",
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cache-control", "no-cache"),
]


class StaticFiles:
    """All files, read once; a path that is not among them does not exist, whatever it looks like."""

    def __init__(self) -> None:
        page = files(__package__) / "page"
        self._files: dict[str, tuple[bytes, str]] = {
            "/docs": (docs_page().encode(), _TYPES["html"]),
            "/docs.css": (DOCS_CSS.encode(), _TYPES["css"]),
        }
        names = (
            [each.name for each in page.iterdir() if each.name.rpartition(".")[2] in _TYPES] if page.is_dir() else []
        )
        for name in names:
            path = "/" if name == "index.html" else f"/{name}"
            self._files[path] = ((page / name).read_bytes(), _TYPES[name.rpartition(".")[2]])

    @property
    def paths(self) -> list[str]:
        """Where the files are; none needs a key, as they hold no data."""
        return list(self._files)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one file."""
        found = self._files.get(scope["path"])
        if found is None:
            raise HTTPError(404, "there is no such file")
        content, kind = found
        await send_response(send, 200, content, kind, _HEADERS)
