"""What the client reports to a page: states that are true, and events in handlers that leave the page time to run."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from playwright.async_api import Route

from tests.browser.conftest import OpenTab, ids, publish
from tests.conftest import StartService
from tests.rabbit import Vhost
from tests.service import Service

pytestmark = pytest.mark.any_rabbitmq


@pytest.mark.contract("7.19")
async def test_other_tasks_of_a_page_run_between_slow_handlers(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await tab(bridge)
    # `turns` counts the page's own tasks. A handler records how many ran before it.
    await one.get(
        """() => {
             window.turns = 0; window.before = [];
             const { port1, port2 } = new MessageChannel();
             port1.onmessage = () => { turns++; port2.postMessage(0); };
             port2.postMessage(0);
           }"""
    )
    await one.subscribe(
        """{ onEvent: (event) => {
             before.push(turns); seen.push(event.id);
             const end = performance.now() + 20; while (performance.now() < end);
           } }"""
    )
    await one.live()
    await publish(vhost, 0, 60)
    assert await one.seen(60) == ids(0, 60)
    before = await one.get("before")
    assert all(earlier < later for earlier, later in itertools.pairwise(before)), before


@pytest.mark.contract("7.20")
async def test_a_page_may_get_events_in_batches(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await tab(bridge)
    await one.subscribe(
        "{ onBatch: (events) => { loads.push(events.length); seen.push(...events.map(({ id }) => id)) } }"
    )
    await one.live()
    await one.get("setTimeout(() => { const end = Date.now() + 1000; while (Date.now() < end); })")
    await publish(vhost, 0, 300)
    assert await one.seen(300) == ids(0, 300)
    assert len(await one.get("loads")) < 300


@pytest.mark.contract("7.25")
async def test_a_page_sees_that_the_broker_is_away(
    start: StartService, vhost: Vhost, tab: OpenTab, origin: str
) -> None:
    service = await start(ALLOWED_ORIGINS=origin, HEARTBEAT_SECONDS="1")
    tabs = [await (await (await tab(service)).subscribe()).live() for _ in range(2)]
    vhost.node.flush()
    await asyncio.to_thread(vhost.node.kill)
    for each in tabs:
        await each.status("interrupted")
    late = await (await tab(service)).subscribe()
    await late.status("interrupted")
    await asyncio.to_thread(vhost.node.start)
    for each in [*tabs, late]:
        await each.live()
        await publish(vhost, 0, 1)
        assert await each.seen(1) == ["e0"]
        assert await each.get("gaps") == []


@pytest.mark.contract("7.26")
async def test_the_state_has_the_reason_why_the_bridge_ended_a_stream(
    start: StartService, tab: OpenTab, origin: str
) -> None:
    service = await start(ALLOWED_ORIGINS=origin, MAX_AGE_SECONDS="1", RETRY_SECONDS="0.2")
    one = await (await (await tab(service)).subscribe()).live()
    await one.page.wait_for_function("states.some(({ status, reason }) => status === 'waiting' && reason === 'rotate')")


@pytest.mark.contract("7.28")
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({"status": 200, "content_type": "text/html", "body": "<h1>Log in</h1>"}, "not-an-event-stream"),
        ({"status": 404, "content_type": "text/html", "body": "default backend"}, "status-404"),
        ({"status": 403, "body": "firewall"}, "status-403"),
        ({"status": 502, "body": ""}, "status-502"),
    ],
    ids=["login page", "404", "403", "502"],
)
async def test_after_an_answer_of_a_proxy_the_client_tries_again(
    bridge: Service, vhost: Vhost, tab: OpenTab, origin: str, answer: dict[str, Any], code: str
) -> None:
    cors = {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true"}
    one = await tab(bridge)

    async def answer_as_a_proxy(route: Route) -> None:
        await route.fulfill(headers=cors, **answer)

    await one.page.route("**/events*", answer_as_a_proxy)
    await one.subscribe()
    await one.page.wait_for_function(
        "(code) => subscription.state.status === 'waiting' && subscription.state.problem?.code === code", arg=code
    )
    await one.page.unroute("**/events*", answer_as_a_proxy)
    await one.live()
    await publish(vhost, 0, 1)
    assert await one.seen(1) == ["e0"]


@pytest.mark.contract("7.27")
async def test_a_request_that_the_bridge_refuses_is_not_tried_again(bridge: Service, tab: OpenTab) -> None:
    one = await (await tab(bridge)).subscribe(types=["no pattern"])
    await one.status("refused")
    assert (await one.get("subscription.state.problem"))["code"] == "invalid-types"


@pytest.mark.contract("7.22")
async def test_a_load_that_never_ends_is_tried_again(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await tab(bridge)
    await one.subscribe(
        """{ load: ({ signal }) => {
               loads.push(signal); seen.push("load");
               return loads.length === 1 ? new Promise(() => {}) : undefined;
             }, loadSeconds: 0.3 }"""
    )
    await one.seen(1)
    await publish(vhost, 0, 2)
    assert await one.seen(4) == ["load", "load", "e0", "e1"]
    assert await one.get("loads.map(({ aborted }) => aborted)") == [True, False]
    assert "load" in (await one.get("errors"))[0]
    assert await one.get("subscription.state.loading") is False


@pytest.mark.contract("7.23")
async def test_the_number_of_events_that_wait_for_a_load_is_limited(
    bridge: Service, vhost: Vhost, tab: OpenTab
) -> None:
    one = await tab(bridge)
    await one.subscribe(
        """{ load: ({ reason }) => {
               seen.push(`load ${reason}`);
               return reason === null ? new Promise((resolve) => (window.loaded = resolve)) : undefined;
             }, maxWaiting: 50 }"""
    )
    await one.seen(1)
    # When another tab has seen the events, they have arrived.
    other = await (await (await tab(bridge)).subscribe()).live()
    await publish(vhost, 0, 60)
    await other.seen(60)
    await one.get("loaded()")
    await publish(vhost, 60, 61)
    await one.page.wait_for_function("seen.includes('e60')")
    seen = await one.get("seen")
    assert seen == ["load null", "load overflow", *ids(51, 61)]
    assert await one.get("gaps") == ["overflow"]


@pytest.mark.contract("7.29")
async def test_a_state_is_one_object_until_it_changes(bridge: Service, tab: OpenTab) -> None:
    one = await (await (await tab(bridge)).subscribe()).live()
    assert await one.get("subscription.state === subscription.state && Object.isFrozen(subscription.state)")
    await one.get(
        """() => {
             window.received = [[], []];
             window.stop = subscription.onState((state) => received[0].push(state));
             const { onState } = subscription; // As useSyncExternalStore calls it.
             onState((state) => received[1].push(state));
             subscription.onState(() => { throw Error("x") });
           }"""
    )
    await one.get("stop(); subscription.close()")
    assert await one.get("received[0].length") == 0
    assert await one.get("received[1].map(({ status }) => status)") == ["closed"]
    assert await one.get("received[1][0] === subscription.state && states.at(-1) === subscription.state")
    repeated = await one.get("states.some((state, at) => JSON.stringify(state) === JSON.stringify(states[at + 1]))")
    assert not repeated, "a listener must be called only if something has changed"
