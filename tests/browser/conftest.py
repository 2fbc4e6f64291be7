"""Debian's browsers, and pages from another origin than the bridge's.

`page` and `open_page` use Chromium with Playwright. A test with `engine` runs in three engines.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

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
from tests.browser.site import serve
from tests.conftest import StartService
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import ROOT, Service, mint

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
    """Opens tabs of one user's browser. An error of a script in them fails the test."""
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


@contextlib.contextmanager
def empty_pages() -> Iterator[str]:
    """An origin with an empty page, for scripts to run on. `/cookie` is the request's cookie."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> tuple[str, bytes]:
        if request.path == "/cookie":
            return "text/html", request.headers.get("Cookie", "").encode()
        return "text/html", b"<!doctype html><link rel=icon href='data:,'><title>test</title>"

    with serve(answer) as port:
        yield f"http://localhost:{port}"


@pytest.fixture
def origin() -> Iterator[str]:
    with empty_pages() as made:
        yield made


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
    """A browser of each engine, one after the other. An error of a script in it fails the test."""
    if request.param == "chromium":
        started = start_chromium()
    elif request.param == "firefox":
        started = use_firefox(request.getfixturevalue("firefox"))
    else:
        started = start_webkit(request.getfixturevalue("display"))
    async with started as made:
        yield made
    assert made.errors == []


class Freezer:
    """Freezes pages with a synchronous request: the page runs nothing until this server answers.

    Chromium freezes only hidden pages, and with Playwright no page is hidden.
    """

    def __init__(self) -> None:
        self._thaw = threading.Event()
        thaw = self._thaw

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                thaw.wait(2 * PATIENCE)
                self.send_response(204)
                self.send_header("Access-Control-Allow-Origin", "*")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    async def freeze(self, page: Page) -> None:
        await page.evaluate(
            """(url) => { setTimeout(() => {
                 const request = new XMLHttpRequest(); request.open("GET", url, false); request.send();
               }) }""",
            f"http://127.0.0.1:{self._server.server_port}/",
        )

    def thaw(self) -> None:
        self._thaw.set()

    def stop(self) -> None:
        self.thaw()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    made = Freezer()
    yield made
    made.stop()


# Pages with the client.

SUBSCRIBE = """
async ([client, options, changes]) => {
  let status = "connecting";
  const check = (next) => {
    if (next !== status && !changes[status].includes(next))
      setTimeout(() => { throw new Error(`docs/states.md has no change from ${status} to ${next}`); });
    status = next;
  };
  const { subscribe } = await import(client);
  window.seen = []; window.gaps = []; window.states = []; window.loads = []; window.tokens = []; window.errors = [];
  window.reportError = (error) => errors.push(String(error));
  window.start = () => (status = "connecting", window.subscription = subscribe({
    onEvent: (event) => seen.push(event.id),
    onGap: ({ reason }) => gaps.push(reason),
    onState: (state) => { check(state.status); states.push(state); },
    ...options,
    ...(window.extra ?? {}),
  }));
  start();
}
"""


@functools.cache
def status_changes() -> dict[str, list[str]]:
    """For each status, the statuses that may follow it, from the table in docs/states.md."""
    lines = (ROOT / "docs" / "states.md").read_text().splitlines()
    head = next(at for at, line in enumerate(lines) if line.startswith("| from |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[head : head + 9]]
    statuses = rows[0][1:]
    changes = {row[0]: [to for to, why in zip(statuses, row[1:], strict=True) if why] for row in rows[2:]}
    assert list(changes) == statuses
    return changes


class Tab:
    """A page with a subscription. A change of its status that docs/states.md does not have fails the test."""

    def __init__(self, page: Page, service_url: str) -> None:
        self.page = page
        self._url = service_url

    async def subscribe(self, extra: str = "", **options: Any) -> Tab:
        if extra:
            await self.page.evaluate(f"window.extra = {extra}; 0")
        asked = {"url": f"{self._url}/events", **options}
        await self.page.evaluate(SUBSCRIBE, [f"{self._url}/client.js", asked, status_changes()])
        return self

    async def live(self) -> Tab:
        await self.page.wait_for_function("window.subscription.state.status === 'live'")
        return self

    async def status(self, status: str) -> None:
        await self.page.wait_for_function("(s) => window.subscription.state.status === s", arg=status)

    async def seen(self, count: int) -> list[str]:
        await self.page.wait_for_function("(count) => window.seen.length >= count", arg=count)
        found: list[str] = await self.page.evaluate("window.seen")
        return found

    async def get(self, expression: str, given: Any = None) -> Any:
        return await self.page.evaluate(expression, given)

    async def leads(self) -> bool:
        return bool(await self.get("window.subscription.state.leads"))


class OpenTab:
    def __init__(self, open_page: OpenPage, origin: str) -> None:
        self._open_page = open_page
        self.origin = origin

    async def __call__(self, service: Service, user: str | None = "42") -> Tab:
        page = await self._open_page()
        if user is not None:
            await page.context.add_cookies(
                [{"name": "bridge_token", "value": mint(user), "url": self.origin, "httpOnly": True}]
            )
        await page.goto(self.origin)
        return Tab(page, service.public.replace("127.0.0.1", "localhost"))


@pytest.fixture
def tab(open_page: OpenPage, origin: str) -> OpenTab:
    return OpenTab(open_page, origin)


@pytest.fixture
async def bridge(start: StartService, origin: str) -> Service:
    # With the default heartbeat, no page treats a stream as dead when the machine pauses for five seconds.
    return await start(ALLOWED_ORIGINS=origin)


async def publish(vhost: Vhost, first: int, last: int, *, user: str = "42", prefix: str = "e") -> None:
    key = f"user.{user}.job.completed"
    await vhost.publish_all([(key, cloudevent(f"{prefix}{number}")) for number in range(first, last)])


def ids(first: int, last: int, *, prefix: str = "e") -> list[str]:
    return [f"{prefix}{number}" for number in range(first, last)]
