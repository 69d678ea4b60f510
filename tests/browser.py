"""Chromium of the system, driven by playwright; tests are skipped where one of them is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def skip_without() -> None:
    """Skip where there is no playwright or no Chromium."""
    pytest.importorskip("playwright.sync_api", reason="wants playwright")
    if CHROMIUM is None:
        pytest.skip("wants a Chromium on PATH")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Yield a headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as started_up:
        found = started_up.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


def blank_page(chromium: Any, size: dict[str, int], language: str) -> tuple[Any, list[str]]:
    """Return a page of a new context, and a list of what it will ask and complain of."""
    context = chromium.new_context(viewport=size, locale=language)
    page, told = context.new_page(), []
    page.on("console", lambda each: told.append(f"{each.type}: {each.text}"))
    page.on("pageerror", lambda each: told.append(f"error: {each}"))
    page.on("request", lambda each: told.append(each.url))
    return page, told
