"""Tabs that share one stream: its user, the leading tab, and that a new leader loses and repeats no event."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bridge.routing import TypeFilter
from tests.browser.conftest import Freezer, OpenTab, Tab, ids, publish
from tests.conftest import StartService
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq


async def log_in(tab: Tab, origin: str, user: str, *groups: str) -> None:
    cookie = {"name": "bridge_token", "value": mint(user, *groups), "url": origin, "httpOnly": True}
    await tab.page.context.add_cookies([cookie])  # type: ignore[list-item]


async def is_user(tab: Tab, user: str) -> None:
    await tab.page.wait_for_function(
        "(user) => subscription.state.user === user && subscription.state.status === 'live'", arg=user
    )


def token(user: str, *groups: str) -> str:
    """Options of a page that always gives this token, and records each request for it."""
    return f"{{ token: ({{ reason }}) => {{ tokens.push(reason); return {mint(user, *groups)!r} }} }}"


# The user of the stream.


@pytest.mark.contract("7.2", "7.4", "7.5")
async def test_a_user_who_logs_in_after_another_gets_their_own_events(
    bridge: Service, vhost: Vhost, tab: OpenTab, origin: str
) -> None:
    """The second user logs in in a new tab. The tabs of the first user stay open and switch, too: a browser has one
    login."""
    old = [await (await (await tab(bridge, "42")).subscribe()).live() for _ in range(3)]
    await publish(vhost, 0, 3)
    for each in old:
        await each.seen(3)
    new = await tab(bridge, "43")
    await new.subscribe()
    for each in [new, *old]:
        await is_user(each, "43")
    await publish(vhost, 3, 6)
    await publish(vhost, 0, 3, user="43", prefix="b")
    assert await new.seen(3) == ids(0, 3, prefix="b")
    assert await new.get("gaps") == []
    for each in old:
        assert await each.seen(6) == [*ids(0, 3), *ids(0, 3, prefix="b")]
        assert await each.get("gaps") == ["other-user"]
    assert await bridge.metric("bridge_connections") == 1


@pytest.mark.contract("7.2")
async def test_a_tab_that_becomes_visible_asks_for_its_identity(
    bridge: Service, vhost: Vhost, tab: OpenTab, origin: str
) -> None:
    one = await (await (await tab(bridge, "42")).subscribe()).live()
    two = await (await (await tab(bridge, "42")).subscribe()).live()
    await log_in(one, origin, "43")  # By a form of the application, without a notice to the client.
    await two.get("document.dispatchEvent(new Event('visibilitychange'))")
    for each in (one, two):
        await is_user(each, "43")
        await each.page.wait_for_function("gaps.length === 1")
        assert await each.get("gaps") == ["other-user"]


@pytest.mark.contract("7.3", "7.4", "7.5")
async def test_another_set_of_groups_is_another_stream(
    bridge: Service, vhost: Vhost, tab: OpenTab, origin: str
) -> None:
    one = await tab(bridge, "42")
    await log_in(one, origin, "42", "ops")
    await (await one.subscribe()).live()
    await log_in(one, origin, "42", "dev")
    two = await tab(bridge, None)
    await (await two.subscribe()).live()
    await one.page.wait_for_function("gaps.length === 1")
    await vhost.publish("group.ops.job.completed", cloudevent("ops"))
    await vhost.publish("group.dev.job.completed", cloudevent("dev"))
    for each in (one, two):
        assert await each.seen(1) == ["dev"]
    assert await one.get("gaps") == ["other-groups"]


@pytest.mark.contract("7.1", "7.3")
async def test_tabs_with_tokens_of_two_users_share_nothing(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await (await (await tab(bridge, None)).subscribe(token("42"))).live()
    two = await (await (await tab(bridge, None)).subscribe(token("43"))).live()
    again = await (await (await tab(bridge, None)).subscribe(token("43"))).live()
    assert await bridge.metric("bridge_connections") == 2
    assert await two.get("tokens.length") > 0, "a tab must use its own token, not that of the earlier tab"
    await publish(vhost, 0, 2)
    await publish(vhost, 0, 2, user="43", prefix="b")
    assert await one.seen(2) == ids(0, 2)
    assert await two.seen(2) == await again.seen(2) == ids(0, 2, prefix="b")


@pytest.mark.contract("7.9")
async def test_two_subscriptions_of_one_page_can_be_two_users(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await (await (await tab(bridge, None)).subscribe(token("42"))).live()
    await one.get(
        f"""async () => {{
             const {{ subscribe }} = await import({bridge.public.replace("127.0.0.1", "localhost")!r} + "/client.js");
             window.other = []; window.second = subscribe({{
               url: subscription.options.url, token: () => {mint("43")!r}, onEvent: (event) => other.push(event.id),
             }});
             await second.ready;
           }}"""
    )
    await publish(vhost, 0, 2)
    await publish(vhost, 0, 2, user="43", prefix="b")
    assert await one.seen(2) == ids(0, 2)
    await one.page.wait_for_function("other.length === 2")
    assert await one.get("other") == ids(0, 2, prefix="b")
    assert await one.get("[subscription.state.user, second.state.user]") == ["42", "43"]


@pytest.mark.contract("7.7")
async def test_a_log_out_in_one_tab_applies_to_all(bridge: Service, vhost: Vhost, tab: OpenTab, origin: str) -> None:
    tabs = [await (await (await tab(bridge, "42")).subscribe()).live() for _ in range(3)]
    await tabs[2].page.context.clear_cookies()
    await tabs[2].page.reload()
    await tabs[2].subscribe()
    for each in tabs:
        await each.status("refused")
    await publish(vhost, 0, 1)
    await log_in(tabs[0], origin, "42")
    await tabs[2].page.reload()
    await tabs[2].subscribe()
    for each in tabs:
        await is_user(each, "42")
    assert await tabs[0].seen(1) == ["e0"], "the same user must resume"
    assert await tabs[0].get("gaps") == []


# The leading tab.


@pytest.mark.contract("7.14")
@pytest.mark.parametrize(
    "later",
    ["null", "(() => { throw new Error('offline') })()", "new Promise(() => {})"],
    ids=["none", "fails", "hangs"],
)
async def test_a_leader_without_a_token_gives_up_the_lead(
    start: StartService, vhost: Vhost, tab: OpenTab, origin: str, later: str
) -> None:
    bridge = await start(ALLOWED_ORIGINS=origin, RETRY_SECONDS="0.2", MAX_AGE_SECONDS="2")
    expiring = f"{{ token: () => window.spent ? {later} : {mint('42')!r} }}"
    one = await (await (await tab(bridge, None)).subscribe(expiring)).live()
    two = await (await (await tab(bridge, None)).subscribe(token("42"))).live()
    assert await one.leads()
    await publish(vhost, 0, 2)
    await one.get("window.spent = true; 0")
    # The stream ends after two seconds at the most; the next needs a token.
    await two.page.wait_for_function("subscription.state.leads && subscription.state.status === 'live'")
    await publish(vhost, 2, 4)
    assert await two.seen(4) == ids(0, 4)
    if later != "null":
        assert await one.seen(4) == ids(0, 4), "it has the same user, and must follow"
    three = await (await (await tab(bridge, None)).subscribe(token("42"))).live()
    assert await two.get("gaps") == await three.get("gaps") == []


@pytest.mark.contract("7.6")
async def test_a_refused_leader_does_not_affect_a_new_tab(
    bridge: Service, vhost: Vhost, tab: OpenTab, origin: str
) -> None:
    one = await (await tab(bridge, None)).subscribe()
    await one.status("refused")
    two = await (await (await tab(bridge, "42")).subscribe()).live()
    await one.live()  # One browser has one login.
    await publish(vhost, 0, 1)
    assert await one.seen(1) == await two.seen(1) == ["e0"]


@pytest.mark.contract("7.15")
async def test_a_frozen_leader_is_replaced_and_follows_when_it_thaws(
    bridge: Service, vhost: Vhost, tab: OpenTab, freezer: Freezer
) -> None:
    one = await (await (await tab(bridge)).subscribe()).live()
    two = await (await (await tab(bridge)).subscribe()).live()
    await publish(vhost, 0, 2)
    for each in (one, two):
        await each.seen(2)
    await freezer.freeze(one.page)
    await publish(vhost, 2, 4)
    await two.page.wait_for_function("subscription.state.leads && subscription.state.status === 'live'")
    await publish(vhost, 4, 6)
    assert await two.seen(6) == ids(0, 6)
    freezer.thaw()
    assert await one.seen(6) == ids(0, 6)
    await one.page.wait_for_function("!subscription.state.leads && subscription.state.status === 'live'")
    assert await one.get("gaps") == await two.get("gaps") == []


@pytest.mark.contract("7.13")
async def test_after_a_leader_crashes_another_tab_leads(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    one = await (await (await tab(bridge)).subscribe()).live()
    two = await (await (await tab(bridge)).subscribe()).live()
    await publish(vhost, 0, 2)
    await two.seen(2)
    devtools = await one.page.context.new_cdp_session(one.page)
    crash = asyncio.create_task(devtools.send("Page.crash"))  # It gets no answer.
    await two.page.wait_for_function("subscription.state.leads && subscription.state.status === 'live'")
    await publish(vhost, 2, 4)
    assert await two.seen(4) == ids(0, 4)
    assert await two.get("gaps") == []
    crash.cancel()


# The position from which a new leader continues.

LAGGING = """
() => {
  // This page gets messages of other tabs late, but in order.
  const { set } = Object.getOwnPropertyDescriptor(BroadcastChannel.prototype, "onmessage");
  Object.defineProperty(BroadcastChannel.prototype, "onmessage", {
    set(handler) {
      let last = Promise.resolve();
      const wait = () => new Promise((resolve) => setTimeout(resolve, window.lag ?? 0));
      set.call(this, (event) => { last = last.then(wait).then(() => handler(event)); });
    },
  });
}
"""


@pytest.mark.contract("7.16", "7.17")
@pytest.mark.parametrize("lag", [2, 20])
async def test_a_leader_that_closes_in_a_burst_causes_no_gap(
    bridge: Service, vhost: Vhost, tab: OpenTab, lag: int
) -> None:
    tabs = []
    for _ in range(5):
        each = await tab(bridge)
        await each.get(LAGGING)
        tabs.append(await (await each.subscribe()).live())
    # The next leader gets messages late: by less than it waits for the others, and by more.
    await tabs[1].get(f"window.lag = {lag}; 0")
    total = 0
    for leader in range(2):
        burst = asyncio.create_task(publish(vhost, total, total + 300))
        total += 300
        await tabs[4].seen(total - 200)
        await tabs[leader].page.close()
        await burst
        for each in tabs[leader + 1 :]:
            assert await each.seen(total) == ids(0, total)
    for each in tabs[2:]:
        assert await each.get("gaps") == []
    assert await tabs[4].seen(total) == ids(0, total)


@pytest.mark.contract("7.18")
async def test_a_tab_that_was_away_for_long_catches_up_from_the_log(
    bridge: Service, vhost: Vhost, tab: OpenTab
) -> None:
    leader = await (await (await tab(bridge)).subscribe()).live()
    follower = await (await (await tab(bridge)).subscribe(keep=True)).live()
    await publish(vhost, 0, 2)
    await follower.seen(2)
    await follower.page.goto("about:blank")
    # More events than a leading tab keeps for others.
    await vhost.publish_all(
        [("user.42.job.completed", cloudevent(f"e{n}", result_url="x" * 2000)) for n in range(2, 400)]
    )
    await leader.seen(400)
    await follower.page.goto(tab.origin)
    await follower.subscribe(keep=True)
    assert await follower.seen(398) == ids(2, 400)
    # Once both have the same event, one connection is enough again.
    await publish(vhost, 400, 401)
    assert (await follower.seen(399))[-1] == "e400"
    while await bridge.metric("bridge_connections") != 1:  # noqa: ASYNC110 - A number gives no signal.
        await asyncio.sleep(0.05)  # Between two polls.
    await publish(vhost, 401, 403)
    assert await follower.seen(401) == ids(2, 403)
    assert await follower.get("gaps") == []


# One connection for all filters.


@pytest.mark.contract("7.30")
async def test_eight_widgets_have_one_connection(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    kinds = ["job.completed", "job.failed", "job.started", "job.progress", "notification", "report.ready", "job.*", "#"]
    one = await (await (await tab(bridge)).subscribe(types=["job.completed"])).live()
    await one.get(
        """async ([client, kinds]) => {
             const { subscribe } = await import(client);
             window.widgets = kinds.map(() => []);
             await Promise.all(kinds.map((kind, number) => subscribe({
               url: subscription.options.url, types: [kind], onEvent: (event) => widgets[number].push(event.id),
             }).ready));
           }""",
        [bridge.public.replace("127.0.0.1", "localhost") + "/client.js", kinds],
    )
    assert await bridge.metric("bridge_connections") == 1
    await vhost.publish("user.42.job.completed", cloudevent("c1"))
    await vhost.publish("all.notification", cloudevent("n1", "notification", title="x"))
    await vhost.publish("user.42.job.completed", cloudevent("c2"))
    await one.page.wait_for_function("widgets[7].length === 3")
    assert await one.get("widgets") == [["c1", "c2"], [], [], [], ["n1"], [], ["c1", "c2"], ["c1", "n1", "c2"]]
    assert await one.seen(2) == ["c1", "c2"]


@pytest.mark.contract("7.31")
async def test_a_filter_that_is_added_in_a_burst_loses_and_repeats_no_event(
    bridge: Service, vhost: Vhost, tab: OpenTab
) -> None:
    one = await (await (await tab(bridge)).subscribe(types=["job.completed"])).live()
    burst = asyncio.create_task(publish(vhost, 0, 600))
    await one.seen(50)
    two = await (await (await tab(bridge)).subscribe(types=["notification"])).live()
    three = await (await (await tab(bridge)).subscribe()).live()
    await burst
    assert await one.seen(600) == ids(0, 600)
    await vhost.publish("all.notification", cloudevent("n1", "notification", title="x"))
    assert (await two.seen(1)) == ["n1"]
    await three.page.wait_for_function("seen.at(-1) === 'n1'")
    assert await bridge.metric("bridge_connections") == 1
    for each in (one, two, three):
        assert await each.get("gaps") == []
        seen = await each.get("seen")
        assert len(set(seen)) == len(seen)


@pytest.mark.contract("7.10")
async def test_a_tab_gets_no_event_from_before_it_joined(bridge: Service, vhost: Vhost, tab: OpenTab) -> None:
    """A stream that reconnects with another filter gets some events again, because the bridge cannot know that it has
    sent them. Earlier tabs recognize them by their ids; later tabs get these ids when they join."""
    one = await (await (await tab(bridge)).subscribe(types=["job.completed"])).live()
    pairs: list[tuple[str, bytes | dict[str, Any]]] = []
    for number in range(40):
        event = cloudevent(f"job.progress-{number}", "job.progress", job_id="r-7", percent=1)
        pairs.append(("user.42.job.progress", event))
        pairs.append(("user.42.job.completed", cloudevent(f"job.completed-{number}")))
    await vhost.publish_all(pairs)
    await one.seen(40)
    two = await (await (await tab(bridge)).subscribe(types=["job.completed"])).live()
    three = await (await (await tab(bridge)).subscribe(types=["job.*"])).live()
    await publish(vhost, 0, 1)
    assert await two.seen(1) == ["e0"]
    await three.page.wait_for_function("seen.includes('e0')")
    assert [each for each in await three.seen(1) if not each.startswith("job.progress")] == ["e0"]
    assert await bridge.metric("bridge_connections") == 1


@pytest.mark.contract("7.30")
async def test_the_client_filters_as_the_bridge_does(bridge: Service, tab: OpenTab) -> None:
    patterns = [
        "a",
        "a.b",
        "*",
        "*.b",
        "a.*",
        "#",
        "a.#",
        "#.b",
        "a.#.b",
        "#.a.#",
        "*.#",
        "#.*",
        "a-b_c.#",
        "#.#",
        "*.*",
    ]
    types = ["a", "b", "ab", "a.b", "a.c", "b.b", "a.b.b", "a.c.b", "c.a.b", "a-b_c", "a-b_c.d", "b.c.d.e"]
    one = await tab(bridge)
    found: Any = await one.page.evaluate(
        """async ([client, patterns, types]) => {
             const { matcher } = await import(client);
             return patterns.map((pattern) => types.filter(matcher([pattern, "x"])));
           }""",
        [bridge.public.replace("127.0.0.1", "localhost") + "/client.js", patterns, types],
    )
    for pattern, matched in zip(patterns, found, strict=True):
        bridges = TypeFilter.parse(f"{pattern},x")
        assert matched == [each for each in types if bridges.matches(each)], pattern
