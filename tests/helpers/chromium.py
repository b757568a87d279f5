"""A headless Chromium and axe-core for tests of pages, and what to watch a page for."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""

FETCHED = Path(__file__).resolve().parents[2] / "node_modules"
CHROMIUM = (
    os.environ.get("OPENPALM_CHROMIUM")
    or shutil.which("chromium")
    or shutil.which(FETCHED / ".bin/chromium")
)
AXE = Path(os.environ.get("OPENPALM_AXE") or FETCHED / "axe-core/axe.min.js")


def missing() -> str | None:
    """Why no browser can be started here."""
    if not find_spec("playwright"):
        return "no playwright: pip install playwright"
    if not CHROMIUM:
        return "no chromium: run tests/browser/fetch, or name one in OPENPALM_CHROMIUM"
    if not AXE.exists():
        return "no axe-core: run tests/browser/fetch, or name its axe.min.js in OPENPALM_AXE"
    return None


@contextmanager
def launched() -> Iterator[Any]:
    """The browser of playwright's synchronous interface."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield found
        found.close()


class Pages:
    """Pages in fresh profiles: `close` returns what went wrong in them.

    That is errors and warnings in the console, violations of the content security policy and
    requests that leave the server's origin.
    """

    def __init__(self, browser: Any):
        self.browser = browser
        self.opened: list[tuple[Any, Any]] = []
        self.problems: list[str] = []

    def open(self, url: str, **options: Any) -> Any:
        """A page of `url`; `options` are those of playwright's `new_context`."""
        options = {"viewport": {"width": 1100, "height": 760}} | options
        context = self.browser.new_context(**options)
        context.set_default_timeout(8000)
        context.add_init_script(WATCH)
        page = context.new_page()
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", self._console)
        origin = urlsplit(url).netloc
        page.on("request", lambda request: self._request(request.url, origin))
        self.opened.append((context, page))
        page.goto(url)
        return page

    def close(self) -> list[str]:
        for context, page in self.opened:
            # Without JavaScript nothing has collected violations; the console reports them too.
            self.problems += page.evaluate("window.violations || []")
            context.close()
        return self.problems

    def _console(self, message: Any) -> None:
        # Chromium itself reports every request that fails, whatever the page makes of it.
        refused = message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning") and not refused:
            self.problems.append(message.text)

    def _request(self, url: str, origin: str) -> None:
        parts = urlsplit(url)
        if parts.netloc != origin and parts.scheme not in ("blob", "data"):
            self.problems.append(f"left the origin: {url}")
