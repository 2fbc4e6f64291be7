"""Real browsers, Debian's, and pages from an origin of their own.

`page` and `open_page` are Chromium's, with all that Playwright offers. A test with `engine` runs in three engines.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.browser.engines import (
    CHROMIUM_FLAGS,
    NAMES,
    Engine,
    find_program,
    run_display,
    run_firefox,
    start_chromium,
    start_webkit,
    use_firefox,
)
from tests.patience import PATIENCE

# Playwright's own limit is five seconds.
expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        made = await playwright.chromium.launch(
            executable_path=find_program("chromium", "chromium"),
            args=CHROMIUM_FLAGS,
            ignore_default_args=["--disable-back-forward-cache"],
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
    """An origin with an empty page, for scripts to run on. `/cookie` is the request's cookie."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<!doctype html><link rel=icon href='data:,'><title>test</title>"
            if self.path == "/cookie":
                body = self.headers.get("Cookie", "").encode()
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


@pytest.fixture(scope="session")
def firefox() -> Iterator[str]:
    with run_firefox() as address:
        yield address


@pytest.fixture(scope="session")
def display() -> Iterator[str]:
    with run_display() as name:
        yield name


@pytest.fixture(params=NAMES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """A browser of each engine, one after the other, in which an error of a script fails the test."""
    if request.param == "chromium":
        started = start_chromium()
    elif request.param == "firefox":
        started = use_firefox(request.getfixturevalue("firefox"))
    else:
        started = start_webkit(request.getfixturevalue("display"))
    async with started as made:
        yield made
    assert made.errors == []
