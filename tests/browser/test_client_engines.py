"""The client in three engines: tabs that crash, freeze, or are left and opened again, and a network that breaks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.browser.engines import Engine, Tab
from tests.browser.site import Answer, Site
from tests.conftest import StartService
from tests.rabbit import Vhost, cloudevent
from tests.service import mint

pytestmark = pytest.mark.any_rabbitmq

SUBSCRIBE = """
async (site) => {
  const { subscribe } = await import(site + "/client.js");
  window.seen = [];
  window.gaps = [];
  window.subscription = subscribe({
    url: site + "/events",
    onEvent: (event) => seen.push(event.id),
    onGap: ({ reason }) => gaps.push(reason),
  });
}
"""


class Pages:
    """Tabs of one user, with pages of another origin than the bridge's."""

    def __init__(self, engine: Engine, origin: str, site: Site, vhost: Vhost) -> None:
        self.engine = engine
        self.origin = origin
        self.site = site
        self._vhost = vhost
        self._published = 0

    async def open(self, first: str | None = None) -> Tab:
        """
        Args:
            first: a function that the page runs before it subscribes.
        """
        tab = await self.engine.open_tab(self.origin)
        if first is not None:
            await tab.call(first)
        await tab.call(SUBSCRIBE, self.site.origin)
        await tab.until("subscription.state.status === 'live'")
        return tab

    async def publish(self, count: int = 5) -> None:
        events = [f"e{number}" for number in range(self._published, self._published + count)]
        self._published += count
        await self._vhost.publish_all([("user.42.job.completed", cloudevent(event)) for event in events])

    async def check(self, *tabs: Tab) -> None:
        """Asserts that each tab has seen every event, in order and once, and no gap."""
        for tab in tabs:
            await tab.until(f"seen.length >= {self._published}")
            assert await tab.get("seen") == [f"e{number}" for number in range(self._published)]
            assert await tab.get("gaps") == []


@pytest.fixture
async def pages(engine: Engine, start: StartService, vhost: Vhost, origin: str) -> AsyncIterator[Pages]:
    async with Site("") as site:
        service = await start(ALLOWED_ORIGINS=origin, HEARTBEAT_SECONDS="1", RETRY_SECONDS="0.2")
        site.bridge = service.public
        client = await service.get("/client.js")
        script = Answer(200, client.text, "text/javascript", {"Access-Control-Allow-Origin": "*"})
        site.routes["/client.js"] = lambda _: script
        await engine.set_cookie(origin, "bridge_token", mint("42"))
        yield Pages(engine, origin, site, vhost)


@pytest.mark.contract("7.13")
async def test_tabs_share_a_stream_and_continue_after_leaders_crash(pages: Pages) -> None:
    one, two, three = [await pages.open() for _ in range(3)]
    assert len(pages.site.streams) == 1
    await pages.publish()
    await pages.check(one, two, three)
    await one.crash()
    await pages.publish()
    await pages.check(two, three)
    leads = "subscription.state.leads"
    second, third = (two, three) if await two.get(leads) else (three, two)
    await second.crash()
    await pages.publish()
    await pages.check(third)
    assert await third.get(leads)


ADD_HEADERS = """
() => {
  const { fetch } = window;
  const traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
  const traced = { traceparent, baggage: "a=1", "sentry-trace": "1-2" };
  window.fetch = (url, options = {}) => {
    const headers = new Headers(options.headers);
    for (const [name, value] of Object.entries(traced)) headers.set(name, value);
    return fetch(url, { ...options, headers });
  };
}
"""
"""What the packages of Sentry and OpenTelemetry do in a page."""


@pytest.mark.contract("2.16")
async def test_a_page_whose_fetch_adds_headers_of_its_own_connects(pages: Pages) -> None:
    tab = await pages.open(ADD_HEADERS)
    await pages.publish()
    await pages.check(tab)
    (stream,) = pages.site.streams
    assert stream.headers["baggage"] == "a=1"


@pytest.mark.contract("7.15")
async def test_a_frozen_leader_is_replaced_and_catches_up(pages: Pages) -> None:
    one, two = [await pages.open() for _ in range(2)]
    await one.freeze()
    await pages.publish()
    await pages.check(two)
    await one.thaw()
    await pages.publish()
    await pages.check(one, two)


async def test_a_page_that_was_left_resumes(pages: Pages) -> None:
    tab = await pages.open()
    await pages.publish()
    await pages.check(tab)
    await tab.goto(f"{pages.origin}/elsewhere")
    await pages.publish()
    await tab.back()
    await tab.until("location.pathname === '/'")
    if await tab.get("'subscription' in window"):  # Otherwise it was loaded again, as Firefox does.
        await pages.check(tab)


Break = Callable[[Site], Awaitable[None]]


async def refuse(site: Site) -> None:
    site.refuse()
    site.cut()


async def answer_502(site: Site) -> None:
    site.answer = Answer(502, "no bridge")
    site.cut()


@pytest.mark.parametrize("breaks", [refuse, answer_502])
async def test_a_stream_that_breaks_resumes(pages: Pages, breaks: Break) -> None:
    tab = await pages.open()
    await breaks(pages.site)
    await tab.until("subscription.state.attempt >= 2")
    await pages.publish()
    pages.site.answer = None
    if breaks is refuse:
        await pages.site.open()
    await pages.check(tab)
