"""`make proxies`: the checks of test_proxies.py one by one and with more load, replicas that die, and Chromium.

It prints what it measures: docs/proxies.md has these figures. `make test` does not collect this file, because of its
name.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import BrowserContext, async_playwright

from tests.browser.engines import CHROMIUM_FLAGS
from tests.conftest import StartService
from tests.deploy import checks
from tests.deploy.checks import Reader, Setup, publishing, reading
from tests.deploy.proxies import EDGES, Edge
from tests.rabbit import Vhost, cloudevent
from tests.service import mint

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(params=EDGES, ids=lambda kind: kind.name)
async def setup(
    request: pytest.FixtureRequest, start: StartService, vhost: Vhost, tmp_path: Path
) -> AsyncIterator[Setup]:
    kind: type[Edge] = request.param
    async with checks.proxy_with_bridges(kind, start, vhost, tmp_path) as made:
        yield made


@pytest.fixture
async def tabs(setup: Setup) -> AsyncIterator[BrowserContext]:
    """One person's browser, logged in."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "chromium is missing: apt-get install chromium"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        context = await browser.new_context(ignore_https_errors=True)
        await context.add_cookies([{"name": "bridge_token", "value": mint("browser"), "url": setup.edge.url}])
        yield context
        await browser.close()


def report(setup: Setup, figures: dict[str, float]) -> None:
    print(f"\n  {setup.edge.name}: " + "; ".join(f"{name} {figure:g}" for name, figure in figures.items()), flush=True)


async def test_events_come_at_once(setup: Setup) -> None:
    figures = await checks.events_at_once(setup, 100)
    report(setup, {name: round(figure, 1) for name, figure in figures.items()})


async def test_heartbeats_keep_streams_open_that_the_idle_limit_would_cut(setup: Setup) -> None:
    figures = await checks.idle_limit(setup)
    report(setup, {name: round(figure, 2) for name, figure in figures.items()})


async def test_last_event_id_arrives(setup: Setup) -> None:
    for _ in range(10):
        await checks.resume(setup)


async def test_the_stream_of_a_closed_page_ends(setup: Setup) -> None:
    figures = await checks.closed_pages(setup)
    report(setup, {name: round(figure) for name, figure in figures.items()})


async def test_fifty_streams_on_one_connection(setup: Setup) -> None:
    await checks.many_on_one_connection(setup, 50)


async def test_nothing_private_is_shown(setup: Setup) -> None:
    await checks.nothing_private(setup)


async def test_reloads_while_events_are_published_lose_nothing(setup: Setup) -> None:
    figures = await checks.reload(setup, readers=8, every=0.01, times=4, between=100)
    report(setup, {name: round(figure, 1) for name, figure in figures.items()})


async def test_no_bridge_is_up(setup: Setup) -> None:
    await checks.no_bridge(setup)


async def test_bridges_that_stop_and_restart_lose_nothing(setup: Setup) -> None:
    """One drains and restarts, then the other is killed and restarts, as in a rollout that goes wrong."""
    readers = [Reader(setup, "roll") for _ in range(8)]
    async with reading(*readers):
        async with publishing(setup.vhost, "user.roll.job.completed", every=0.025) as published:
            for bridge, how in zip(setup.bridges, (signal.SIGTERM, signal.SIGKILL), strict=True):
                await readers[0].has(len(published) + 20)
                address = bridge.public.removeprefix("http://")
                bridge.signal(how)
                await bridge.ended()
                # It restarts at the same address, which is in the proxy's configuration.
                bridge.set("BIND", address)
                await bridge.start()
            await readers[0].has(len(published) + 20)
        await asyncio.gather(*(reader.has(len(published)) for reader in readers))
    ids = list(published)
    assert [reader.ids == ids for reader in readers] == [True] * 8
    assert [reader.unresumed for reader in readers] == [0] * 8
    refused = sum(reader.refused for reader in readers)
    assert refused == 0 or not setup.edge.answers_without_bridges
    ends = sum(len(reader.ends) for reader in readers)
    report(setup, {"ends seen by 8 readers": ends, "of them an end for an EventSource": refused})


LISTEN = """
() => {
  window.ids = [];
  window.readies = [];
  window.errors = 0;
  window.source = new EventSource("/events", { withCredentials: true });
  source.onerror = () => errors++;
  source.addEventListener("bridge.ready", (message) => readies.push(JSON.parse(message.data).resumed));
  source.addEventListener("job.completed", (message) => ids.push(JSON.parse(message.data).id));
}
"""


async def test_eight_tabs_of_a_browser(setup: Setup, tabs: BrowserContext) -> None:
    """More tabs than HTTP/1.1 allows, and a reload meanwhile."""
    pages = [await tabs.new_page() for _ in range(8)]
    for page in pages:
        await page.goto(f"{setup.edge.url}/schemas")
        assert await page.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol") == "h2"
        await page.evaluate(LISTEN)
    for page in pages:
        await page.wait_for_function("readies.length > 0")
    async with publishing(setup.vhost, "user.browser.job.completed", every=0.02) as published:
        await pages[0].wait_for_function("ids.length > 50")
        await setup.edge.reload()
        await pages[0].wait_for_function(f"ids.length > {len(published) + 50}")
    for page in pages:
        await page.wait_for_function(f"ids.length >= {len(published)}", timeout=30_000)
        assert await page.evaluate("ids") == list(published)
        assert await page.evaluate("readies.slice(1).every(Boolean)")
    cut = sum([await page.evaluate("errors") for page in pages])
    # Close one tab; the connection stays. Streams that the reload cut have ended, too.
    await pages[0].close()
    gone = await checks.ended_at_the_bridges(setup, "browser", cut + 1)
    report(setup, {"cut in 8 tabs by a reload": cut, "a closed tab is gone after, ms": round(gone * 1000)})


async def test_a_page_reconnects_when_no_bridge_was_up(setup: Setup, tabs: BrowserContext) -> None:
    page = await tabs.new_page()
    await page.goto(f"{setup.edge.url}/schemas")
    await page.evaluate(LISTEN)
    await page.wait_for_function("readies.length > 0")
    await setup.vhost.publish("user.browser.job.completed", cloudevent("b1"))
    await page.wait_for_function("ids.length == 1")
    for bridge in setup.bridges:
        bridge.set("BIND", bridge.public.removeprefix("http://"))
        bridge.set("RETRY_SECONDS", "0.1")
        await bridge.stop()
    await setup.vhost.publish("user.browser.job.completed", cloudevent("b2"))
    if not setup.edge.answers_without_bridges:
        # See docs/proxies.md: such a page must create a new EventSource, as client.js does.
        await page.wait_for_function("source.readyState === EventSource.CLOSED", timeout=30_000)
        return
    # The first try is after the bridge's pause, the next one after the proxy's. The page has not given up.
    await page.wait_for_function("errors >= 3", timeout=60_000)
    assert await page.evaluate("source.readyState !== EventSource.CLOSED")
    for bridge in setup.bridges:
        await bridge.start()
    await page.wait_for_function("ids.length == 2", timeout=60_000)
    assert await page.evaluate("[ids, readies]") == [["b1", "b2"], [False, True]]
