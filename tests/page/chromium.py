"""Debian's Chromium without a window, driven by Playwright."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
needs_browser = pytest.mark.skipif(
    PROGRAM is None or not _HAS_PLAYWRIGHT, reason="needs chromium and Playwright: make gui"
)
_WITHIN_MS = 60_000


@asynccontextmanager
async def chromium(width: int) -> AsyncGenerator[Any]:
    """A tab of a new browser, so many pixels wide: Playwright's `Page`."""
    playwright: Any = importlib.import_module("playwright.async_api")  # only `make gui` installs it
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=PROGRAM, chromium_sandbox=False)
        tab = await browser.new_page(
            viewport={"width": width, "height": 900}, is_mobile=width < 600
        )
        tab.set_default_timeout(_WITHIN_MS)
        yield tab
        await browser.close()
