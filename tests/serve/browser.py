"""A Chromium on this machine, driven by playwright, that reaches one server and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str:
    """The path of one. Skips the test where there is none."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)}; apt-get install chromium")
    return found


class Browser:
    """Opens pages of a server."""

    def __init__(self, chromium: Any, url: str) -> None:
        self._chromium = chromium
        self._url = url
        self.elsewhere: list[str] = []
        """What pages have asked others for; nobody answers that."""
        self.complaints: list[str] = []
        """Errors and warnings on the console."""

    def open(self, **settings: Any) -> Any:
        """The page at `/`, when the model is ready. settings: of playwright's new_context."""
        page = self._chromium.new_context(**settings).new_page()
        page.set_default_timeout(120_000)  # of a machine that does much else
        page.route("**/*", self._route)
        page.on("console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(self._url)
        page.get_by_text("ready", exact=True).wait_for()
        return page

    def _route(self, route: Any) -> None:
        if route.request.url.startswith(self._url):
            route.continue_()
        else:
            self.elsewhere.append(route.request.url)
            route.abort()


@contextmanager
def browsing(url: str) -> Iterator[Browser]:
    """A browser, closed at the end."""
    from playwright.sync_api import sync_playwright

    # No name is resolved, so that what is not routed fails too; a sandbox of its own is not to be had in every container.
    arguments = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-sandbox"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_browser(), args=arguments)
        try:
            yield Browser(chromium, url)
        finally:
            chromium.close()
