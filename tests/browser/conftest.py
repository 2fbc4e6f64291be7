"""A real Chromium, Debian's, driven by Playwright, and pages from an origin of their own."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.patience import PATIENCE

# Playwright's own limit is five seconds.
expect.set_options(timeout=1000 * PATIENCE)

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium is not None, "chromium is missing: apt-get install chromium"
    async with async_playwright() as playwright:
        made = await playwright.chromium.launch(
            executable_path=chromium, args=CHROMIUM_FLAGS, ignore_default_args=["--disable-back-forward-cache"]
        )
        yield made
        await made.close()


OpenPage = Callable[[], Awaitable[Page]]


@pytest.fixture
async def open_page(browser: Browser) -> AsyncIterator[OpenPage]:
    """Opens tabs of one person's browser, in which an error of a script fails the test."""
    context = await browser.new_context()
    context.set_default_timeout(1000 * PATIENCE)
    errors: list[str] = []

    async def open_one() -> Page:
        page = await context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield open_one
    await context.close()
    assert errors == []


@pytest.fixture
async def page(open_page: OpenPage) -> Page:
    return await open_page()


@pytest.fixture
def origin() -> Iterator[str]:
    """An origin with an empty page, for scripts to run on."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<!doctype html><link rel=icon href='data:,'><title>test</title>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
