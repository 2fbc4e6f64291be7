"""The client in a real Chromium: tabs that share, leaders that end, tokens that expire, and pages that return."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from deploy.local.node import free_ports
from tests.browser.conftest import OpenTab, Tab, ids, publish
from tests.conftest import StartService
from tests.proxy import Proxy
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq


@pytest.mark.contract("2.72")
async def test_one_function_or_one_for_each_type(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await (await tab(bridge)).subscribe(
        """{ onEvent: { "job.completed": (event) => seen.push(event.data.job_id),
                       "notification": () => { throw Error("x") } } }""",
        share=False,
    )
    assert await one.get("window.subscription.ready") == {"user": "42"}
    await vhost.publish("all.notification", cloudevent("n1", "notification", title="x"))
    await publish(vhost, 0, 1)
    assert await one.seen(1) == ["r-7"]
    assert await one.get("errors") == ["Error: x"], "an error in a handler is reported, and ends no stream"
    await one.get("subscription.close()")
    assert await one.get("subscription.state.status") == "closed"


async def test_only_the_types_that_were_asked_for(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await (await (await tab(bridge)).subscribe(types=["notification"])).live()
    await publish(vhost, 0, 1)
    await vhost.publish("all.notification", cloudevent("n1", "notification", title="x"))
    assert await one.seen(1) == ["n1"]


@pytest.mark.contract("1.10")
async def test_two_sources_may_use_the_same_ids(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await (await tab(bridge)).subscribe("{ onEvent: (event) => seen.push(event.source) }")
    await one.live()
    both = ["/workers/a", "/workers/b"]
    for source in [*both, *both, "/end"]:
        await vhost.publish("user.42.job.completed", {**cloudevent("1"), "source": source})
    assert await one.seen(3) == [*both, "/end"]


@pytest.mark.contract("7.12", "7.13")
async def test_seven_tabs_share_one_connection_and_continue_without_their_leader(
    bridge: Service, vhost: Vhost, tab: OpenTab
) -> None:
    tabs = [await (await (await tab(bridge)).subscribe()).live() for _ in range(7)]
    assert await bridge.metric("bridge_connections") == 1
    assert [await each.leads() for each in tabs] == [True] + [False] * 6
    await publish(vhost, 0, 5)
    for each in tabs:
        assert await each.seen(5) == ids(0, 5)
    for leader in range(3):
        await tabs[leader].page.close()
        await publish(vhost, 5 * leader + 5, 5 * leader + 10)
        for each in tabs[leader + 1 :]:
            assert await each.seen(5 * leader + 10) == ids(0, 5 * leader + 10)
            assert await each.get("gaps") == []
    assert sum([await each.leads() for each in tabs[3:]]) == 1


@pytest.mark.contract("7.15")
async def test_a_silent_leader_is_replaced(start: StartService, vhost: Vhost, tab: OpenTab, origin: str) -> None:
    bridge = await start(ALLOWED_ORIGINS=origin, HEARTBEAT_SECONDS="1")
    first = await (await (await tab(bridge)).subscribe()).live()
    second = await (await (await tab(bridge)).subscribe()).live()
    # As if it were frozen: tabs of one origin share a process here, so one alone cannot be frozen.
    await first.get(
        """() => {
             const post = BroadcastChannel.prototype.postMessage;
             BroadcastChannel.prototype.postMessage = function (message) {
               if (message.kind === "hello") post.call(this, message);
             };
           }"""
    )
    await second.page.bring_to_front()
    await second.page.wait_for_function("window.subscription.state.leads")
    await second.live()
    await publish(vhost, 0, 3)
    assert await second.seen(3) == ids(0, 3)
    assert await first.seen(3) == ids(0, 3)
    await first.page.wait_for_function("!window.subscription.state.leads")
    assert await first.get("gaps") == await second.get("gaps") == []


async def test_without_a_channel_every_tab_has_its_own_connection(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    tabs = [await tab(bridge) for _ in range(2)]
    for each in tabs:
        await each.get("delete window.BroadcastChannel")
        await (await each.subscribe()).live()
    assert await bridge.metric("bridge_connections") == 2
    await publish(vhost, 0, 1)
    for each in tabs:
        assert await each.seen(1) == ["e0"]


async def test_a_drained_replica_a_killed_one_and_a_restarted_broker(
    start: StartService, vhost: Vhost, tab: OpenTab, origin: str
) -> None:
    port = str(free_ports(1)[0])
    settings: dict[str, Any] = {
        "ALLOWED_ORIGINS": origin,
        "BIND": f"127.0.0.1:{port}",
        "DRAIN_SECONDS": "0.5",
        "RETRY_SECONDS": "1",
    }
    service = await start(**settings)
    one = await (await (await tab(service)).subscribe()).live()
    count = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        await publish(vhost, count, count + 5)
        service.signal(number)
        await service.ended()
        await publish(vhost, count + 5, count + 10)
        await service.start()
        count += 10
        assert await one.seen(count) == ids(0, count)
    vhost.node.flush()
    await asyncio.to_thread(vhost.node.kill)
    await asyncio.to_thread(vhost.node.start)
    await service.logged("broker connected", count=2)
    await publish(vhost, count, count + 5)
    assert await one.seen(count + 5) == ids(0, count + 5)
    assert await one.get("gaps") == []


async def test_the_network_fails_and_returns(start: StartService, vhost: Vhost, tab: OpenTab, origin: str) -> None:
    service = await start(ALLOWED_ORIGINS=origin, HEARTBEAT_SECONDS="1")
    async with Proxy(int(service.public.rpartition(":")[2])) as proxy:
        one = await tab(service)
        one = Tab(one.page, f"http://localhost:{proxy.port}")
        await (await one.subscribe()).live()
        await publish(vhost, 0, 2)
        await one.seen(2)
        proxy.stall()  # No connection is cut, and no byte arrives: the client can notice it only by missing heartbeats.
        await publish(vhost, 2, 4)
        await one.page.wait_for_function("window.subscription.state.status !== 'live'")
        proxy.cut()
        proxy.flow()
        await one.live()
        assert await one.seen(4) == ids(0, 4)
        assert await one.get("gaps") == []


async def test_a_token_that_expires_is_renewed_without_a_gap(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await tab(bridge, None)
    asked: list[Any] = []

    async def token(why: Any) -> str:
        asked.append(why)
        return mint("42", ttl=5 if len(asked) == 1 else 600)

    await one.page.expose_function("mintToken", token)
    await (await one.subscribe("{ token: (why) => mintToken(why) }")).live()
    await publish(vhost, 0, 2)
    await one.page.wait_for_function("window.subscription.state.status !== 'live'")
    await publish(vhost, 2, 4)
    await one.live()
    assert await one.seen(4) == ids(0, 4)
    assert asked == [{"reason": None}, {"reason": "expired"}]
    assert await one.get("gaps") == []


async def test_after_a_refused_token_the_client_asks_for_another(bridge: Service, tab: OpenTab) -> None:
    one = await tab(bridge, None)
    await one.page.evaluate(f"window.given = ['nonsense', {mint('42')!r}]; window.asked = []; 0")
    await one.subscribe("{ token: ({ reason }) => { asked.push(reason); return given.shift() } }")
    await one.live()
    assert await one.get("asked") == [None, "invalid-token"]


@pytest.mark.contract("7.27")
async def test_a_refused_page_gets_the_reason_and_may_try_again(bridge: Service, tab: OpenTab, origin: str) -> None:
    one = await (await tab(bridge, None)).subscribe()
    two = await (await tab(bridge, None)).subscribe()
    for each in (one, two):
        await each.status("refused")
        assert (await each.get("window.subscription.state.problem"))["code"] == "missing-token"
        assert await each.get("subscription.ready.catch((error) => error.status)") == 401
    await one.page.context.add_cookies([{"name": "bridge_token", "value": mint("42"), "url": origin}])
    await two.get("subscription.reconnect()")
    await two.live()
    await one.live()


@pytest.mark.contract("7.21", "7.22")
async def test_a_page_is_loaded_once_live_and_again_after_a_gap(
    start: StartService, vhost: Vhost, tab: OpenTab, origin: str
) -> None:
    service = await start(ALLOWED_ORIGINS=origin, LOG="", RETRY_SECONDS="0.2", HEARTBEAT_SECONDS="1")
    async with Proxy(int(service.public.rpartition(":")[2])) as proxy:
        one = Tab((await tab(service)).page, f"http://localhost:{proxy.port}")
        await one.subscribe(
            """{ load: ({ reason }) => { loads.push(reason); seen.push("load");
                 return new Promise((resolve, reject) => { window.loaded = resolve; window.failed = reject }) } }"""
        )
        await one.seen(1)
        await publish(vhost, 0, 2)
        await asyncio.sleep(0.5)  # Without the buffer they would come in this time.
        assert await one.get("seen") == ["load"], "events must wait while the state is fetched"
        await one.get("loaded()")
        assert await one.seen(3) == ["load", "e0", "e1"]
        proxy.cut()
        assert await one.seen(4) == ["load", "e0", "e1", "load"]
        assert await one.get("loads") == [None, "no-log"]
        assert await one.get("gaps") == ["no-log"]
        await publish(vhost, 2, 3)
        await one.get("failed(Error('offline'))")
        assert await one.seen(5) == ["load", "e0", "e1", "load", "load"], "a failed load must be tried again"
        await one.get("loaded()")
        assert (await one.seen(6))[5] == "e2"


@pytest.mark.contract("7.24")
async def test_a_reload_resumes_if_asked(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await (await (await tab(bridge)).subscribe(keep=True)).live()
    await publish(vhost, 0, 2)
    await one.seen(2)
    await one.page.goto("about:blank")
    await publish(vhost, 2, 4)
    await one.page.goto(tab.origin)
    await one.subscribe(keep=True)
    assert await one.seen(2) == ids(2, 4)
    assert await one.get("gaps") == []


@pytest.mark.contract("7.17")
async def test_a_follower_that_returns_gets_what_it_missed(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    leader = await (await (await tab(bridge)).subscribe()).live()
    follower = await (await (await tab(bridge)).subscribe(keep=True)).live()
    await publish(vhost, 0, 2)
    await follower.seen(2)
    await follower.page.goto("about:blank")
    await publish(vhost, 2, 4)
    await leader.seen(4)
    await follower.page.goto(tab.origin)
    await follower.subscribe(keep=True)
    assert await follower.seen(2) == ids(2, 4)
    assert not await follower.leads()
    assert await follower.get("gaps") == []


async def test_back_and_forward_through_the_cache(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await (await (await tab(bridge)).subscribe()).live()
    await publish(vhost, 0, 2)
    await one.seen(2)
    await one.page.goto(tab.origin + "/elsewhere")
    await publish(vhost, 2, 4)
    await one.page.go_back(wait_until="commit")
    assert await one.get("'subscription' in window"), "the page did not come from the cache"
    assert await one.seen(4) == ids(0, 4)
    assert await one.get("gaps") == []


async def test_a_hidden_page_pauses_and_resumes(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await (await (await tab(bridge)).subscribe(pauseAfterHiddenSeconds=0.2)).live()
    await one.get(
        "Object.defineProperty(document, 'visibilityState', { get: () => window.look, configurable: true }); 0"
    )
    await one.get("window.look = 'hidden'; document.dispatchEvent(new Event('visibilitychange'))")
    await one.status("paused")
    await publish(vhost, 0, 2)
    await one.get("window.look = 'visible'; document.dispatchEvent(new Event('visibilitychange'))")
    assert await one.seen(2) == ids(0, 2)
    assert await one.get("gaps") == []


@pytest.mark.contract("7.5")
async def test_another_user_on_the_same_page_is_a_gap(start: StartService, tab: OpenTab, origin: str) -> None:
    service = await start(ALLOWED_ORIGINS=origin, MAX_AGE_SECONDS="2", RETRY_SECONDS="0.2")
    one = await (await (await tab(service)).subscribe(keep=True)).live()
    await one.page.context.add_cookies([{"name": "bridge_token", "value": mint("43"), "url": origin}])
    await one.page.wait_for_function("window.subscription.state.user === '43'")
    await one.page.wait_for_function("gaps.length === 1")
    assert await one.get("gaps") == ["other-user"]
    await one.page.context.add_cookies([{"name": "bridge_token", "value": mint("44"), "url": origin}])
    await one.page.reload()
    await (await one.subscribe(keep=True)).live()
    await one.page.wait_for_function("gaps.length === 1")
    assert await one.get("gaps") == ["other-user"], "also if the page was left in between"


@pytest.mark.contract("7.24")
async def test_a_reload_before_the_state_is_there_fetches_it_again(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    load = "{ load: ({ reason }) => { loads.push(reason); return new Promise(() => {}) } }"
    one = await (await (await tab(bridge)).subscribe(load, keep=True)).live()
    await publish(vhost, 0, 1)
    await asyncio.sleep(0.3)  # The event comes, most often; the page must be right either way.
    await one.page.reload()
    await (await one.subscribe(load, keep=True)).live()
    await one.page.wait_for_function("loads.length === 1")


@pytest.mark.contract("7.21")
async def test_a_gap_while_the_state_is_fetched(start: StartService, vhost: Vhost, tab: OpenTab, origin: str) -> None:
    service = await start(ALLOWED_ORIGINS=origin, LOG="", RETRY_SECONDS="0.2", HEARTBEAT_SECONDS="1")
    async with Proxy(int(service.public.rpartition(":")[2])) as proxy:
        one = Tab((await tab(service)).page, f"http://localhost:{proxy.port}")
        await one.subscribe(
            """{ load: () => { const number = loads.push(0);
                 return new Promise((resolve) => {
                   window[`loaded${number}`] = () => { seen.push(`load ${number}`); resolve() };
                 }) } }"""
        )
        await one.live()
        await publish(vhost, 0, 1)
        await asyncio.sleep(0.3)  # The event comes, most often; the page must be right either way.
        proxy.cut()
        await one.page.wait_for_function(
            """() => {
                 const cut = states.findLastIndex(({ status }) => status === "waiting");
                 return cut >= 0 && states.slice(cut).some(({ status }) => status === "live");
               }"""
        )
        await publish(vhost, 1, 2)
        await one.get("loaded1()")
        await one.page.wait_for_function("loads.length === 2")
        assert await one.get("gaps") == ["no-log"]
        await one.get("loaded2()")
        # Events from before the gap are given to the page before the state is fetched again, and never after it.
        await one.page.wait_for_function("seen.includes('e1')")
        assert [each for each in await one.get("seen") if each != "e0"] == ["load 1", "load 2", "e1"]
        assert (await one.get("seen")).index("load 2") > 1 or "e0" not in await one.get("seen")


@pytest.mark.contract("7.8")
async def test_closing_in_a_handler_ends_everything(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await tab(bridge)
    await one.subscribe("{ onEvent: (event) => { seen.push(event.id); subscription.close() } }")
    await one.live()
    await publish(vhost, 0, 5)
    await one.status("closed")
    await asyncio.sleep(0.5)  # Further events would come in this time.
    assert await one.get("seen") == ["e0"]
    two = await tab(bridge)
    await two.subscribe("{ onState: (state) => { states.push(state.status); window.subscription?.close() } }")
    await two.status("closed")
    await asyncio.sleep(0.5)  # It would connect in this time.
    assert await two.get("states.at(-1)") == "closed"
    assert await bridge.metric("bridge_connections") == 0


async def test_if_locks_are_forbidden_a_tab_has_its_own_connection(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await tab(bridge)
    await one.get(
        "() => { LockManager.prototype.request = () => Promise.reject(new DOMException('no', 'SecurityError')) }"
    )
    await (await one.subscribe()).live()
    await publish(vhost, 0, 1)
    assert await one.seen(1) == ["e0"]
