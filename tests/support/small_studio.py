"""A studio in a real browser: Debian's Chromium over a tiny server. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import small_server
from playwright.sync_api import Browser, Page, sync_playwright

from compose.app.server.api import make_app
from compose.app.server.workshop import Workshop
from compose.app.ui.studio import mount

TEXT = ":is(input, textarea)"


def chromium() -> str:
    """The browser that the system has."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise RuntimeError("the browser tests need Chromium: apt-get install chromium, or set CHROMIUM")
    return found


@contextmanager
def browsing() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def studio(workshop: Workshop, **more: Any) -> Iterator[str]:
    """The page served from a thread -> its address."""
    with small_server.serving(mount(make_app(workshop), workshop, **more)) as address:
        yield address


def opened(browser: Browser, address: str, **context: Any) -> Page:
    """A page of a browser of its own, ready for use; its faults are collected in `page.faults`."""
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context).new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.set_default_timeout(20_000)
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    page.wait_for_selector("#board .empty")
    return page


def settle(page: Page, steps: int = 6, size: str = "32x32", seed: int | None = 5) -> None:
    """Open the settings and make drawing quick."""
    page.click("#settings > button")
    page.fill(f"#steps {TEXT}", str(steps))
    page.fill(f"#size {TEXT}", size)
    if seed is not None:
        page.fill(f"#seed {TEXT}", str(seed))


def tab(page: Page, name: str) -> None:
    page.click(f'button[role=tab]:has-text("{name}")')
