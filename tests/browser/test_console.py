"""The console in a browser."""

from __future__ import annotations

import json
import re
import signal
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from playwright.async_api import Page, expect

from tests.browser.accessibility import faults_of
from tests.conftest import Eventually, StartService
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq

USER = "user.42.job.completed"


@pytest.fixture
async def console(start: StartService) -> Service:
    return await start(CONSOLE="development", HEARTBEAT_SECONDS="1")


async def visit(page: Page, service: Service, user: str | None = "42", *groups: str) -> None:
    url = service.public.replace("127.0.0.1", "localhost")
    if user is not None:
        await page.context.add_cookies(
            [{"name": "bridge_token", "value": mint(user, *groups), "url": url, "httpOnly": True}]
        )
    await page.goto(url)


@pytest.mark.contract("5.63")
async def test_events_arrive_and_are_found_and_shown_with_their_schema(
    console: Service, vhost: Vhost, page: Page
) -> None:
    await visit(page, console)
    await expect(page.locator("#state")).to_have_text("live for user “42”")
    await vhost.publish(USER, cloudevent("e1", job_id="<img src=x onerror=alert(1)>"))
    await vhost.publish("all.notification", cloudevent("e2", "notification", title="Hello"))
    await expect(page.locator("li[role=option]")).to_have_count(2)
    await page.keyboard.press("/")
    await page.keyboard.type("hello")
    await expect(page.locator("li[role=option]")).to_have_count(1)
    await page.get_by_label("Search in events").fill("")
    await page.locator("#types").select_option("job.completed")
    await expect(page.locator("li[role=option]")).to_have_count(1)
    await page.get_by_role("listbox", name="Events, newest first").focus()
    await page.keyboard.press("ArrowDown")
    detail = page.locator("#detail")
    await expect(detail).to_contain_text("The job has completed with its result.")
    await expect(detail).to_contain_text("Seconds since the job started")
    await expect(detail).to_contain_text("<img src=x onerror=alert(1)>")
    await page.keyboard.press("Escape")
    await expect(detail).to_be_hidden()


@pytest.mark.contract("5.65")
async def test_a_sample_of_every_type_can_be_published(console: Service, vhost: Vhost, page: Page) -> None:
    await visit(page, console)
    await expect(page.locator("#sample-to")).to_have_value("user:42")
    types = await page.locator("#sample-type option").all_text_contents()
    assert "billing.notice" in types
    for number, kind in enumerate(types, 1):
        await page.locator("#sample-type").select_option(kind)
        await page.get_by_role("button", name="Publish").click()
        await expect(page.locator("#published")).to_contain_text("published")
        await expect(page.locator("#count")).to_have_text(str(number))
    await page.locator("#sample-data").fill('{"job_id": 7}')
    await page.locator("#sample-type").select_option("job.completed")
    await page.locator("#sample-data").fill('{"job_id": 7}')
    await page.get_by_role("button", name="Publish").click()
    await expect(page.locator("#published")).to_contain_text("data.job_id: Input should be a valid string")


async def test_a_user_without_a_token_can_paste_one(console: Service, page: Page) -> None:
    await visit(page, console, None)
    await expect(page.locator("#problem")).to_contain_text("missing-token")
    await page.locator("#token").fill(mint("7"))
    await page.get_by_role("button", name="Connect").click()
    await expect(page.locator("#state")).to_have_text("live for user “7”")


@pytest.mark.contract("2.73")
async def test_a_gap_and_a_cut_are_shown(start: StartService, page: Page, vhost: Vhost) -> None:
    service = await start(CONSOLE="true", LOG="", RETRY_SECONDS="0.2", MAX_AGE_SECONDS="1")
    await visit(page, service)
    await expect(page.locator("li.gap").first).to_contain_text("gap (no-log)")
    await expect(page.locator("#publish")).to_be_hidden()
    assert (await service.get("/console/publish")).status_code == 404


@pytest.mark.contract("2.73", "5.63")
async def test_the_console_is_off_by_default(service: Service) -> None:
    for path in ("/", "/console/app.js", "/console/publish"):
        assert (await service.get(path)).status_code == 404


@pytest.mark.contract("5.64", "5.65")
@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (200, {}),
        (403, {"origin": "https://evil.example"}),
        (403, {"origin": "null"}),
        (401, {"token": "x"}),
        (400, {"content": "text/plain"}),
        (400, {"body": "[]"}),
        (400, {"body": '{"type": "no.such", "to": "all", "data": {}}'}),
        (400, {"body": '{"type": "notification", "to": "nobody", "data": {"title": "x"}}'}),
    ],
)
async def test_which_requests_may_publish(console: Service, status: int, changes: dict[str, Any]) -> None:
    body = json.dumps({"type": "notification", "to": "user:42", "data": {"title": "x"}})
    headers = {
        "Content-Type": changes.get("content", "application/json"),
        "Authorization": f"Bearer {changes.get('token', mint('42'))}",
        **({"Origin": changes["origin"]} if "origin" in changes else {}),
    }
    async with httpx.AsyncClient() as client:
        answer = await client.post(
            f"{console.public}/console/publish", content=changes.get("body", body), headers=headers
        )
    assert answer.status_code == status, answer.text
    assert status == 200 or answer.headers["Content-Type"] == "application/problem+json"


OPEN: dict[str, Any] = {
    "desktop": {"width": 1440, "height": 900},
    "phone": {"width": 390, "height": 844},
    "small": {"width": 320, "height": 640},
}


async def wait_live(page: Page, user: str = "42") -> None:
    await expect(page.locator("#state")).to_have_text(f"live for user “{user}”")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_everything_can_be_read_at_any_size_in_both_colour_schemes(
    console: Service, vhost: Vhost, page: Page, scheme: Any
) -> None:
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text) if message.type == "error" else None)
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await visit(page, console)
    await wait_live(page)
    # Long texts, and words that cannot be broken.
    await vhost.publish("user.42.notification", cloudevent("e1", "notification", title="x" * 200, body="y" * 3000))
    await vhost.publish("user.42.no.such.type", cloudevent("e2", "no.such.type"))
    await expect(page.locator("#events li.event")).to_have_count(1)
    await expect(page.locator("#events li.gap")).to_have_count(1)
    assert await page.evaluate("document.getAnimations().length") == 0
    places = "header *, figure, figcaption, .scale, #beside, [role=tabpanel] *, #reference, .snippet *, #events, .bar"
    faults: dict[str, list[str]] = {}
    for size in OPEN:
        await page.set_viewport_size(OPEN[size])
        for tab in ("Publishing", "Try a stream", "Log", "Quarantine"):
            await page.get_by_role("tab", name=tab).click()
            if tab in ("Log", "Quarantine") and size == "desktop":
                await expect(page.locator(f"#{tab.lower()} li")).not_to_have_count(0)
                await page.locator(f"#{tab.lower()} summary").first.click()
            faults[f"{size}, {tab}"] = await faults_of(page, places)
        await page.locator("#events li.event").click()
        await expect(page.locator("#detail")).to_be_visible()
        if size == "desktop":
            await page.locator("#detail summary").click()
        faults[f"{size}, an event"] = await faults_of(page, places)
        await page.locator("#search").fill("nothing has this")
        await expect(page.locator("#empty")).to_be_visible()
        faults[f"{size}, an empty list"] = await faults_of(page, places)
        await page.get_by_role("button", name="Show all").click()
    assert {place: found for place, found in faults.items() if found} == {}
    assert refused == []  # Nothing was refused by the page's content security policy.


async def test_nothing_covers_the_code_and_the_columns_have_the_same_height(console: Service, page: Page) -> None:
    for size in OPEN.values():
        await page.set_viewport_size(size)
        await visit(page, console)
        await expect(page.locator(".snippet")).not_to_have_count(0)
        over = await page.evaluate(
            """() => [...document.querySelectorAll(".snippet")].filter((it) => {
                 const [one, other] = ["button", "pre"].map((tag) => it.querySelector(tag).getBoundingClientRect());
                 return one.bottom > other.top && one.top < other.bottom
                     && one.right > other.left && one.left < other.right;
               }).length"""
        )
        assert over == 0
    await page.set_viewport_size(OPEN["desktop"])
    ends = await page.evaluate(
        "['listed', 'beside'].map((id) => document.getElementById(id).getBoundingClientRect().bottom)"
    )
    assert abs(ends[0] - ends[1]) <= 1
    assert await page.evaluate("document.getElementById('empty').getBoundingClientRect().height") > 200


async def test_the_copy_button_copies(console: Service, page: Page) -> None:
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await visit(page, console)
    await page.get_by_role("button", name="Copy: curl").click()
    await expect(page.locator(".snippet button", has_text="Copied")).to_have_count(1)
    assert "curl -N" in await page.evaluate("navigator.clipboard.readText()")


async def test_an_empty_list_shows_the_reason(console: Service, vhost: Vhost, page: Page) -> None:
    await visit(page, console)
    await wait_live(page)
    await expect(page.locator("#empty")).to_contain_text("No event yet")
    await vhost.publish(USER, cloudevent("e1"))
    await expect(page.locator("#events li")).to_have_count(1)
    await expect(page.locator("#empty")).to_be_hidden()
    await page.locator("#search").fill("nothing has this")
    await expect(page.locator("#empty")).to_contain_text("None of the 1 here matches “nothing has this”")
    await page.locator("#types").select_option("notification")
    await expect(page.locator("#empty")).to_contain_text("and type notification")
    await page.get_by_role("button", name="Show all").click()
    await expect(page.locator("#events li")).to_have_count(1)
    await page.get_by_role("button", name="Clear").click()
    await expect(page.locator("#empty")).to_contain_text("Cleared")


async def test_pause_becomes_resume_and_shows_how_many_events_wait(console: Service, vhost: Vhost, page: Page) -> None:
    await visit(page, console)
    await wait_live(page)
    await vhost.publish(USER, cloudevent("e1"))
    await expect(page.locator("#events li")).to_have_count(1)
    await page.get_by_role("button", name="Pause").click()
    await vhost.publish(USER, cloudevent("e2"))
    await vhost.publish(USER, cloudevent("e3"))
    await expect(page.locator("#matches")).to_have_text("paused, 2 held back")
    await expect(page.locator("#events li")).to_have_count(1)
    await expect(page.get_by_role("button", name="Pause")).to_have_count(0)
    await page.get_by_role("button", name="Resume").click()
    await expect(page.locator("#events li")).to_have_count(3)
    await expect(page.get_by_role("button", name="Pause")).to_have_count(1)
    await expect(page.locator("#matches")).to_have_text("")


async def test_a_row_shows_its_audience_and_the_charts_show_the_last_minutes(
    console: Service, vhost: Vhost, page: Page
) -> None:
    await visit(page, console, "42", "ops")
    await wait_live(page)
    now = datetime.now(UTC).isoformat()
    for key in (USER, "group.ops.job.completed", "all.job.completed"):
        await vhost.publish(key, {**cloudevent(key), "time": now})
    for row, audience in enumerate(["all", "group:ops", "user:42"]):
        await expect(page.locator("#events li").nth(row).locator(".audience")).to_have_text(audience)
    await page.locator("#search").fill("group:ops")
    await expect(page.locator("#events li")).to_have_count(1)
    await page.locator("#events li").click()
    await expect(page.locator("#members")).to_contain_text("audience")
    await expect(page.locator("#rate-chart")).to_have_attribute("aria-label", re.compile("^3 events in the last five"))
    await expect(page.locator("#latency-chart")).to_have_attribute("aria-label", re.compile(r"median -?\d+ ms"))
    await expect(page.locator("#timeline-chart rect.live")).to_have_count(1)
    assert await page.evaluate("document.querySelectorAll('#rate-chart rect.full').length") == 60
    assert await page.evaluate(
        """async () => {
             const { Arrivals, Timeline } = await import("/console/charts.js");
             const now = 1_000_000_000_000, arrivals = new Arrivals(), timeline = new Timeline();
             for (const [ago, latency] of [[400_000, 9], [10_000, 1], [10_001, 5], [10_002, 3], [0, null]])
               arrivals.add(now - ago, latency);
             const buckets = arrivals.buckets(now).filter((it) => it.count);
             timeline.change(now - 400_000, "live", ""); timeline.change(now - 150_000, "waiting", "");
             const shown = buckets.map((it) => [it.count, it.middle, it.highest]);
             return [arrivals.rate(now), shown, timeline.liveShare(now)];
           }"""
    ) == [0.2, [[2, 5, 5], [1, 1, 1], [1, None, None]], 0.5]


async def test_gaps_and_reconnects_are_on_the_timeline_with_their_reasons(
    start: StartService, page: Page, vhost: Vhost
) -> None:
    service = await start(CONSOLE="true", RETRY_SECONDS="0.2")
    await visit(page, service)
    await wait_live(page)
    await vhost.publish("user.42.no.such.type", cloudevent("e1", "no.such.type"))
    timeline = page.get_by_role("list", name="Gaps and reconnects")
    await expect(timeline.locator(".gap")).to_contain_text("gap (not-readable)")
    await expect(page.locator("#gaps")).to_have_text("1")
    await expect(page.locator("#timeline-chart rect.gap")).to_have_count(1)
    await page.locator("#events li.gap").click()
    await expect(page.locator("#detail")).to_contain_text("a new catalogue is being rolled out")
    service.signal(signal.SIGKILL)
    await service.ended()
    await expect(timeline.locator(".cut").first).to_contain_text("cut off")
    await expect(page.locator("#state")).to_contain_text("cut off, again in")
    await expect(page.locator("#cuts")).to_have_text("1")
    service.set("BIND", service.public.removeprefix("http://"))
    await service.start()
    await expect(timeline.locator(".live").first).to_contain_text("live again after")
    await page.mouse.move(0, 0)  # A chart under the pointer stays as it is.
    await expect(page.locator("#timeline-chart")).to_have_attribute(
        "aria-label", re.compile("1 cut, [12] gap")
    )  # There may be two gaps: if the cursor was before the gap, it comes again.


async def test_a_stream_can_be_tried_from_a_cursor_and_with_types(console: Service, vhost: Vhost, page: Page) -> None:
    await visit(page, console)
    await wait_live(page)
    await vhost.publish(USER, cloudevent("e1"))
    await expect(page.locator("#events li")).to_have_count(1)
    await page.locator("#events li").click()
    await vhost.publish(USER, cloudevent("e2", job_id="the second"))
    await vhost.publish("user.42.notification", cloudevent("e3", "notification", title="the third"))
    await expect(page.locator("#events li")).to_have_count(3)
    await page.get_by_role("button", name="Resume after this event").click()
    await page.get_by_role("button", name="Open the stream").click()
    frames = page.locator("#frames > li")
    await expect(frames).to_have_count(3)
    await expect(frames.first).to_contain_text("bridge.ready")
    await expect(page.locator("#trial-result")).to_have_text("Resumed. 2 events. It is open.")
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator("#trial-result")).to_contain_text("Stopped.")
    await page.get_by_label("Types").first.fill("notification")
    await page.get_by_role("button", name="Open the stream").click()
    await expect(page.locator("#trial-result")).to_have_text("Resumed. 1 event. It is open.")
    await page.get_by_role("button", name="Stop").click()
    await page.locator("#trial-cursor").fill("invented")
    await page.get_by_role("button", name="Open the stream").click()
    await expect(page.locator("#trial-result")).to_contain_text("Gap: unknown.")
    await page.get_by_role("button", name="Stop").click()
    await page.locator("#trial-types").fill("A b")
    await page.get_by_role("button", name="Open the stream").click()
    await expect(page.locator("#trial-result")).to_contain_text("'A b' is not a type pattern")


async def test_log_and_quarantine_are_looked_up(console: Service, vhost: Vhost, page: Page) -> None:
    await visit(page, console)
    await wait_live(page)
    await vhost.publish("user.7.job.completed", cloudevent("other", job_id="<b>somebody else's</b>"))
    await vhost.publish(USER, b"{half")
    await vhost.publish("user.42.notification", cloudevent("last", "notification", title="Hello"))
    await expect(page.locator("#events li")).to_have_count(1)
    await page.get_by_role("tab", name="Log").click()
    await expect(page.locator("#log-entries li")).to_have_count(3)
    await expect(page.locator("#log-status")).to_have_text("3 found, the newest first. That is all of the log.")
    await page.locator("#log-search").fill("SOMEBODY")
    await page.get_by_role("button", name="Look up").click()
    await expect(page.locator("#log-entries li")).to_have_count(1)
    await page.locator("#log-entries summary").click()
    await expect(page.locator("#log-entries")).to_contain_text("<b>somebody else's</b>")
    await page.locator("#log-audience").fill("nobody")
    await page.get_by_role("button", name="Look up").click()
    await expect(page.locator("#log-status")).to_contain_text("is not an audience")
    await page.get_by_role("tab", name="Quarantine").click()
    await expect(page.locator("#quarantine-status")).to_contain_text("All 1")
    await expect(page.locator("#quarantine-messages")).to_contain_text("malformed")
    await page.get_by_role("button", name="Look again").click()
    await expect(page.locator("#quarantine-messages li")).to_have_count(1)


async def test_the_page_names_the_missing_right(
    start: StartService, vhost: Vhost, page: Page, eventually: Eventually
) -> None:
    await start()  # Makes exchange, log and quarantine.
    vhost.add_user("console-test")
    try:
        vhost.grant(
            "console-test",
            configure=r"^bridge\.",
            write=r"^(bridge\.|amq\.default$)",
            read=r"^(bridge\.|events(\.log)?$)",
        )
        url = vhost.url_at(vhost.node.port, user="console-test", password="secret-console-test")
        await visit(page, await start(amqp_url=url, CONSOLE="development"))
        await wait_live(page)
        await vhost.publish(USER, b"{half")
        await eventually(lambda: vhost.count("events.invalid") > 0)
        await page.get_by_role("tab", name="Quarantine").click()
        await expect(page.locator("#quarantine-status")).to_contain_text("`read` on 'events.invalid'")
    finally:
        vhost.delete_user("console-test")


async def test_the_console_can_be_used_with_the_keyboard_alone(console: Service, vhost: Vhost, page: Page) -> None:
    await visit(page, console)
    await wait_live(page)
    for number in range(1, 13):
        await vhost.publish(USER, cloudevent(f"e{number}"))
    await expect(page.locator("#events li")).to_have_count(12)
    await page.locator("#events").focus()
    shown = page.locator("#members tr", has_text="id").first
    for key, number in [
        ("ArrowDown", 12),
        ("ArrowDown", 11),
        ("End", 1),
        ("ArrowDown", 1),
        ("ArrowUp", 2),
        ("Home", 12),
    ]:
        await page.keyboard.press(key)
        await expect(shown).to_contain_text(f"e{number}")
        active = await page.locator("#events").get_attribute("aria-activedescendant")
        await expect(page.locator(f"#{active}")).to_have_attribute("aria-selected", "true")
        await expect(page.locator("#events [aria-selected=true]")).to_have_count(1)
        await expect(page.locator(f"#{active}")).to_be_in_viewport()
    await page.keyboard.press("Escape")
    await expect(page.locator("#detail")).to_be_hidden()
    tab = page.get_by_role("tab", name="Publishing")
    await tab.focus()
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_role("tab", name="Try a stream")).to_be_focused()
    await expect(page.locator("#try")).to_be_visible()
    await page.keyboard.press("Home")
    await expect(page.get_by_role("tab", name="Event", exact=True)).to_have_attribute("aria-selected", "true")
    await page.keyboard.press("p")
    await expect(page.get_by_role("button", name="Resume")).to_be_visible()


async def test_without_development_mode_it_hides_tools_that_would_fail(start: StartService, page: Page) -> None:
    await visit(page, await start(CONSOLE="true"))
    await wait_live(page)
    for name in ("Publishing", "Log", "Quarantine"):
        await expect(page.get_by_role("tab", name=name)).to_be_hidden()
    await expect(page.get_by_role("tab", name="Event", exact=True)).to_have_attribute("aria-selected", "true")
