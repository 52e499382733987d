"""This module holds a browser for tests of the page. It does not know what is looked at."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
WAIT_MS = 60_000
"""For what takes a fraction of a second on a machine that does nothing else."""

# What is expected is otherwise waited for five seconds, whatever a context's own patience is.
expect.set_options(timeout=WAIT_MS)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

Open = Callable[..., Page]


@contextmanager
def launched() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser) -> Iterator[Open]:
    """Open pages that may talk to nobody else, raise no error and log none but those that are expected."""
    context: Any = None
    said: list[str] = []
    asked: list[str] = []
    allowed: list[str] = []
    origin = ""

    def visit(url: str, expected: str = "", **options: Any) -> Page:
        nonlocal context, origin
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        context.set_default_timeout(WAIT_MS)
        page: Page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        if expected:
            allowed.append(expected)
        origin = urlsplit(url).netloc
        page.goto(url)
        return page

    yield visit
    if context is not None:
        context.close()
    assert [text for text in said if not any(re.search(each, text) for each in allowed)] == []
    assert {urlsplit(url).netloc for url in asked if not url.startswith("blob:")} == {origin}
