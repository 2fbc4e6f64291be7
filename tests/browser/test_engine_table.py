"""Measures the table in docs/resume.md: what the EventSource of each engine does when its stream ends."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.browser.engines import NAMES, Engine, Tab
from tests.browser.site import Answer, Site
from tests.conftest import StartService
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq

LISTEN = """
(url) => {
  window.seen = [];
  window.received = [];
  window.source = new EventSource(url, { withCredentials: true });
  const record = (word, message) => {
    received.push(word);
    if (message.lastEventId) window.last = message.lastEventId;
  };
  for (const name of ["bridge.ready", "bridge.gap", "bridge.bye"])
    source.addEventListener(name, (message) => record(name, message));
  source.addEventListener("job.completed", (message) => {
    record("event", message);
    seen.push(JSON.parse(message.data).id);
  });
  source.onerror = () => received.push(source.readyState === EventSource.CLOSED ? "closed" : "connecting");
  addEventListener("pageshow", (event) => received.push(event.persisted ? "kept" : "shown"));
}
"""

COMES_BACK = "comes back"
GIVES_UP = "gives up"
STAYS_OPEN = "stays open"
LOADS_AGAIN = "loads again"

PAUSE = Answer(200, "retry: 200\n", "text/event-stream")
"""The answer of the proxies in deploy/proxies while no bridge is up."""


@dataclass
class Setup:
    """A browser, an application that forwards `/events` to a bridge, and a page of another origin."""

    engine: Engine
    site: Site
    elsewhere: Site
    vhost: Vhost
    services: list[Service]
    tabs: list[Tab] = field(default_factory=list)
    events: int = 0

    async def listen(self, *, elsewhere: bool = False) -> Tab:
        tab = await self.open(elsewhere=elsewhere)
        await tab.call(LISTEN, f"{self.site.origin}/events")
        await tab.until("received.includes('bridge.ready')")
        return tab

    async def open(self, *, elsewhere: bool) -> Tab:
        """A page in the only tab, so that no other one asks for the stream."""
        while self.tabs:
            await self.tabs.pop().close()
        self.tabs.append(await self.engine.open_tab((self.elsewhere if elsewhere else self.site).origin))
        return self.tabs[0]

    async def publish(self) -> str:
        self.events += 1
        await self.vhost.publish("user.42.job.completed", cloudevent(f"e{self.events}"))
        return f"e{self.events}"

    async def outcome(self, tab: Tab, before: int) -> str:
        """The outcome for a stream after the fault is over. There were `before` requests for it before."""
        event = await self.publish()
        await tab.until(f"source.readyState === 2 || seen.includes('{event}')")
        if await tab.get("source.readyState") == 2:
            return GIVES_UP
        assert "bridge.gap" not in await tab.get("received")
        return COMES_BACK if len(self.site.streams) > before else STAYS_OPEN


Row = Callable[[Setup], Awaitable[str]]


async def bye(setup: Setup) -> str:
    before = len(setup.site.streams) + 1
    usual, setup.site.bridge = setup.site.bridge, setup.services[1].public
    tab = await setup.listen()
    setup.site.bridge = usual
    await tab.until("received.includes('bridge.bye')")
    return await setup.outcome(tab, before)


async def reset(setup: Setup) -> str:
    tab = await setup.listen()
    last, before = await tab.get("last"), len(setup.site.streams)
    setup.site.cut()
    found = await setup.outcome(tab, before)
    assert setup.site.streams[before].cursor == last, "it must resume with its cursor"
    return found


def refused(*, elsewhere: bool, first: bool = False) -> Row:
    async def row(setup: Setup) -> str:
        if not first:
            tab = await setup.listen(elsewhere=elsewhere)
            setup.site.refuse()
            setup.site.cut()
        else:
            # The page is there before the connection is refused.
            tab = await setup.open(elsewhere=elsewhere)
            setup.site.refuse()
            await tab.call(LISTEN, f"{setup.site.origin}/events")
        before = len(setup.site.streams)
        # One "connecting" is for the end of the stream, each further one for a refused try.
        tries = "received.filter((word) => word === 'connecting').length"
        await tab.until(f"received.includes('closed') || {tries} >= 3")
        await setup.site.open()
        if first:
            # It must get the events after its first `bridge.ready`, so none is published before.
            await tab.until("received.includes('closed') || received.includes('bridge.ready')")
        return await setup.outcome(tab, before)

    return row


def answered(*answers: Answer, elsewhere: bool = False) -> Row:
    """The first reconnect gets each of these answers in turn; all must have the same outcome."""

    async def row(setup: Setup) -> str:
        found = set()
        for answer in answers:
            tab = await setup.listen(elsewhere=elsewhere)
            last, before = await tab.get("last"), len(setup.site.streams)
            setup.site.answer = answer
            setup.site.cut()
            # The fault ends after the tab has got this answer: it has given up, or tries again.
            await setup.site.wait_for_request(before + 1)
            await tab.until(
                "received.includes('closed') || received.filter((word) => word === 'connecting').length >= 2"
            )
            setup.site.answer = None
            found.add(await setup.outcome(tab, before + 1))
            assert {request.cursor for request in setup.site.streams[before:]} == {last}, (
                "it must resume with its cursor"
            )
        (outcome,) = found
        return outcome

    return row


async def left_and_back(setup: Setup) -> str:
    tab = await setup.listen()
    before = len(setup.site.streams)
    await tab.goto(f"{setup.site.origin}/elsewhere")
    await tab.back()
    await tab.until("location.pathname === '/'")
    if not await tab.get("'source' in window"):
        return LOADS_AGAIN
    await tab.until("received.includes('kept')")
    return await setup.outcome(tab, before)


def frozen(*, cut: bool) -> Row:
    async def row(setup: Setup) -> str:
        tab = await setup.listen()
        before = len(setup.site.streams)
        await tab.freeze()
        if cut:
            setup.site.cut()
        event = await setup.publish()
        await tab.thaw()
        found = await setup.outcome(tab, before)
        if found != GIVES_UP:
            assert event in await tab.get("seen")
        return found

    return row


ROWS: dict[str, Row] = {
    "`bridge.bye`, then the end": bye,
    "connection reset": reset,
    "reset, reconnects refused": refused(elsewhere=False),
    "reset, reconnects refused, page of another origin": refused(elsewhere=True),
    "first connection refused": refused(elsewhere=False, first=True),
    "first connection refused, page of another origin": refused(elsewhere=True, first=True),
    "200 with `retry:` alone": answered(PAUSE),
    "200 with `retry:` alone, without CORS headers, page of another origin": answered(PAUSE, elsewhere=True),
    "204": answered(Answer(204)),
    "401, 403, 404, 429, 500, 502, 503, 504": answered(
        *[Answer(status, "no") for status in (401, 403, 404, 429, 500, 502, 503, 504)]
    ),
    "200 with another content type": answered(Answer(200, "<p>Log in"), Answer(200, "{}", "application/json")),
    "302 to a page": answered(Answer(302, headers={"Location": "/login"})),
    "tab frozen, events come": frozen(cut=False),
    "tab frozen, connection reset": frozen(cut=True),
    "page left, and back by the Back button": left_and_back,
}

PAGE = Path(__file__).parents[2] / "docs" / "resume.md"


def read_table() -> dict[str, list[str]]:
    """The rows of the table in the docs, with a cell for each engine."""
    (table,) = re.findall(r"^\| what happens \|.*\n\| --- .*\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return {name: cells for name, *cells in rows}


@pytest.fixture
async def setup(engine: Engine, start: StartService, vhost: Vhost) -> AsyncIterator[Setup]:
    async with Site("") as elsewhere, Site("") as site:
        settings: dict[str, Any] = {"RETRY_SECONDS": "0.2", "ALLOWED_ORIGINS": f"{elsewhere.origin},{site.origin}"}
        services = [await start(**settings), await start(**settings, MAX_AGE_SECONDS="1")]
        site.bridge = services[0].public
        await engine.set_cookie(site.origin, "bridge_token", mint("42"))
        yield Setup(engine, site, elsewhere, vhost, services)


async def test_the_table_in_the_docs_is_what_each_engine_does(setup: Setup) -> None:
    found = {name: await row(setup) for name, row in ROWS.items()}
    column = NAMES.index(setup.engine.name)
    assert found == {name: cells[column] for name, cells in read_table().items()}


def test_the_table_has_a_row_for_each_case() -> None:
    assert list(read_table()) == list(ROWS)
