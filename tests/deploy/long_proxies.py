"""`make proxies`: the checks of test_proxies.py one by one and at length, replicas that die, and Chromium.

Prints what it measures, which is where the figures of docs/proxies.md come from. By its name `make test` does not
collect it.
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
from tests.deploy.checks import Place, Reader, flow, reading
from tests.deploy.proxies import EDGES, Edge
from tests.rabbit import Vhost, cloudevent
from tests.service import mint

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(params=EDGES, ids=lambda kind: kind.name)
async def place(
    request: pytest.FixtureRequest, start: StartService, vhost: Vhost, tmp_path: Path
) -> AsyncIterator[Place]:
    kind: type[Edge] = request.param
    async with checks.behind(kind, start, vhost, tmp_path) as made:
        yield made


@pytest.fixture
async def tabs(place: Place) -> AsyncIterator[BrowserContext]:
    """One person's browser, logged in."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "chromium is missing: apt-get install chromium"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        context = await browser.new_context(ignore_https_errors=True)
        await context.add_cookies([{"name": "bridge_token", "value": mint("browser"), "url": place.edge.url}])
        yield context
        await browser.close()


def report(place: Place, figures: dict[str, float]) -> None:
    print(f"\n  {place.edge.name}: " + "; ".join(f"{name} {figure:g}" for name, figure in figures.items()), flush=True)


async def test_events_come_at_once(place: Place) -> None:
    figures = await checks.each_at_once(place, 100)
    report(place, {name: round(figure, 1) for name, figure in figures.items()})


async def test_heartbeats_hold_what_the_idle_limit_would_cut(place: Place) -> None:
    figures = await checks.idle_limit(place)
    report(place, {name: round(figure, 2) for name, figure in figures.items()})


async def test_last_event_id_arrives(place: Place) -> None:
    for _ in range(10):
        await checks.resume(place)


async def test_who_goes_is_gone(place: Place) -> None:
    figures = await checks.leaves(place)
    report(place, {name: round(figure) for name, figure in figures.items()})


async def test_fifty_streams_on_one_connection(place: Place) -> None:
    await checks.many_on_one_connection(place, 50)


async def test_nothing_private_is_shown(place: Place) -> None:
    await checks.nothing_private(place)


async def test_reloads_under_a_flow_lose_nothing(place: Place) -> None:
    figures = await checks.reload(place, readers=8, every=0.01, times=4, between=100)
    report(place, {name: round(figure, 1) for name, figure in figures.items()})


async def test_no_bridge_is_up(place: Place) -> None:
    await checks.away(place)


async def test_bridges_that_go_and_come_lose_nothing(place: Place) -> None:
    """One drains and comes back, then the other is killed and comes back, as in a rollout that goes wrong."""
    readers = [Reader(place, "roll") for _ in range(8)]
    async with reading(*readers):
        async with flow(place.vhost, "user.roll.job.completed", every=0.025) as published:
            for bridge, how in zip(place.bridges, (signal.SIGTERM, signal.SIGKILL), strict=True):
                await readers[0].has(len(published) + 20)
                address = bridge.public.removeprefix("http://")
                bridge.signal(how)
                await bridge.ended()
                # It comes back where it was: what stands in the proxy's configuration is its address.
                bridge.set("BIND", address)
                await bridge.start()
            await readers[0].has(len(published) + 20)
        await asyncio.gather(*(reader.has(len(published)) for reader in readers))
    ids = list(published)
    assert [reader.ids == ids for reader in readers] == [True] * 8
    assert [reader.unresumed for reader in readers] == [0] * 8
    refused = sum(reader.refused for reader in readers)
    assert refused == 0 or not place.edge.answers_when_away
    ends = sum(len(reader.ends) for reader in readers)
    report(place, {"ends seen by 8 readers": ends, "of them an end for an EventSource": refused})


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


async def test_eight_tabs_of_a_browser(place: Place, tabs: BrowserContext) -> None:
    """More than HTTP/1.1 would let it open; and a reload on the way."""
    pages = [await tabs.new_page() for _ in range(8)]
    for page in pages:
        await page.goto(f"{place.edge.url}/schemas")
        assert await page.evaluate("performance.getEntriesByType('navigation')[0].nextHopProtocol") == "h2"
        await page.evaluate(LISTEN)
    for page in pages:
        await page.wait_for_function("readies.length > 0")
    async with flow(place.vhost, "user.browser.job.completed", every=0.02) as published:
        await pages[0].wait_for_function("ids.length > 50")
        await place.edge.reload()
        await pages[0].wait_for_function(f"ids.length > {len(published) + 50}")
    for page in pages:
        await page.wait_for_function(f"ids.length >= {len(published)}", timeout=30_000)
        assert await page.evaluate("ids") == list(published)
        assert await page.evaluate("readies.slice(1).every(Boolean)")
    cut = sum([await page.evaluate("errors") for page in pages])
    # One tab of a connection that stays. What a reload cut has ended as well.
    await pages[0].close()
    gone = await checks.ended_at_the_bridges(place, "browser", cut + 1)
    report(place, {"cut in 8 tabs by a reload": cut, "a closed tab is gone after, ms": round(gone * 1000)})


async def test_a_page_comes_back_when_no_bridge_was_up(place: Place, tabs: BrowserContext) -> None:
    page = await tabs.new_page()
    await page.goto(f"{place.edge.url}/schemas")
    await page.evaluate(LISTEN)
    await page.wait_for_function("readies.length > 0")
    await place.vhost.publish("user.browser.job.completed", cloudevent("b1"))
    await page.wait_for_function("ids.length == 1")
    for bridge in place.bridges:
        bridge.set("BIND", bridge.public.removeprefix("http://"))
        bridge.set("RETRY_SECONDS", "0.1")
        await bridge.stop()
    await place.vhost.publish("user.browser.job.completed", cloudevent("b2"))
    if not place.edge.answers_when_away:
        # Said in docs/proxies.md: such a page has to make its EventSource anew, as client.js does.
        await page.wait_for_function("source.readyState === EventSource.CLOSED", timeout=30_000)
        return
    # The first try is after the pause that the bridge named, the next one after the proxy's; the page has not given up.
    await page.wait_for_function("errors >= 3", timeout=60_000)
    assert await page.evaluate("source.readyState !== EventSource.CLOSED")
    for bridge in place.bridges:
        await bridge.start()
    await page.wait_for_function("ids.length == 2", timeout=60_000)
    assert await page.evaluate("[ids, readies]") == [["b1", "b2"], [False, True]]
