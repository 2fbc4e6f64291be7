"""A browser's own EventSource with the bridge: cookie, CORS, typed events, and reconnects."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from playwright.async_api import Page

from deploy.local.node import free_ports
from tests.conftest import StartService
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq

LISTEN = """
(url) => {
  window.seen = [];
  window.source = new EventSource(url, { withCredentials: true });
  const record = (message) => seen.push([message.type, JSON.parse(message.data), message.lastEventId]);
  source.onmessage = record;
  for (const name of ["bridge.ready", "bridge.gap", "bridge.bye", "job.completed", "notification"])
    source.addEventListener(name, record);
}
"""


def events_url(service: Service, query: str = "") -> str:
    # The same host as the page: a cookie is for a host, with any port.
    return service.public.replace("127.0.0.1", "localhost") + "/events" + query


async def log_in(page: Page, origin: str, user: str = "42") -> None:
    await page.context.add_cookies([{"name": "bridge_token", "value": mint(user), "url": origin, "httpOnly": True}])
    await page.goto(origin)


async def seen(page: Page, count: int) -> list[list[object]]:
    await page.wait_for_function("(count) => window.seen.length >= count", arg=count)
    found: list[list[object]] = await page.evaluate("window.seen")
    return found


def ready_data(ready: list[object]) -> dict[str, object]:
    """The data of a `bridge.ready`, without the identity."""
    assert isinstance(ready[1], dict)
    return {name: value for name, value in ready[1].items() if name != "identity"}


@pytest.mark.contract("2.15")
async def test_typed_events_across_origins_with_the_cookie(
    start: StartService, vhost: Vhost, page: Page, origin: str
) -> None:
    service = await start(ALLOWED_ORIGINS=origin, HEARTBEAT_SECONDS="0.2")
    await log_in(page, origin)
    await page.evaluate(LISTEN, events_url(service))
    await seen(page, 1)
    await vhost.publish("user.42.job.completed", cloudevent("e1", job_id="\r\n\n<b>\u2028😀"))
    await vhost.publish("all.notification", cloudevent("e2", "notification", title="x"))
    (ready, first, second) = await seen(page, 3)
    assert (ready[0], ready_data(ready)) == ("bridge.ready", {"user": "42", "resumed": False, "heartbeat_seconds": 0.2})
    assert first[0] == "job.completed"
    assert isinstance(first[1], dict)
    assert first[1]["data"]["job_id"] == "\r\n\n<b>\u2028😀"
    assert second[0] == "notification"
    assert len({ready[2], first[2], second[2]}) == 3
    await page.wait_for_timeout(500)  # Some heartbeats, which must not cause an event.
    assert len(await seen(page, 3)) == 3


@pytest.mark.contract("2.15")
async def test_an_origin_that_is_not_allowed_reads_nothing(
    service: Service, page: Page, origin: str, vhost: Vhost
) -> None:
    await log_in(page, origin)
    await page.evaluate(LISTEN, events_url(service))
    await page.wait_for_function("source.readyState === EventSource.CLOSED")
    assert await page.evaluate("seen") == []


async def test_a_page_reconnects_with_its_cursor_after_a_drain(
    start: StartService, vhost: Vhost, page: Page, origin: str
) -> None:
    port = str(free_ports(1)[0])
    settings: dict[str, Any] = {"ALLOWED_ORIGINS": origin, "DRAIN_SECONDS": "0.5", "BIND": f"127.0.0.1:{port}"}
    service = await start(**settings)
    await log_in(page, origin)
    await page.evaluate(LISTEN, events_url(service, "?named=false"))
    await seen(page, 1)
    await vhost.publish("user.42.job.completed", cloudevent("before"))
    await seen(page, 2)
    service.signal(signal.SIGTERM)
    assert await service.ended() == 0
    assert (await seen(page, 3))[2][:2] == ["bridge.bye", {"reason": "drain"}]

    await vhost.publish("user.42.job.completed", cloudevent("meanwhile"))
    again = await start(**settings)
    ready = (await seen(page, 4))[3]
    assert (ready[0], ready_data(ready)) == ("bridge.ready", {"user": "42", "resumed": True, "heartbeat_seconds": 15})
    assert (await again.logged("stream opened"))["resumes"] is True
    await vhost.publish("user.42.job.completed", cloudevent("after"))
    last = (await seen(page, 6))[4:]
    assert [(kind, isinstance(event, dict) and event["id"]) for kind, event, _ in last] == [
        ("message", "meanwhile"),
        ("message", "after"),
    ]


@pytest.mark.contract("2.12")
async def test_after_busy_a_page_reconnects(start: StartService, vhost: Vhost, page: Page, origin: str) -> None:
    service = await start(ALLOWED_ORIGINS=origin, MAX_CONNECTIONS_PER_USER="1")
    await log_in(page, origin)
    await page.evaluate(LISTEN, events_url(service))
    await seen(page, 1)
    await page.evaluate("window.first = window.source")
    await page.evaluate(LISTEN, events_url(service))
    assert (await seen(page, 1))[0][:2] == ["bridge.bye", {"reason": "busy"}]
    await page.wait_for_function("source.readyState === EventSource.CONNECTING")
    await page.evaluate("window.first.close()")
    found = await seen(page, 2)
    assert found[1][0] == "bridge.ready"
