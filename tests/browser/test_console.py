"""The console as its user sees it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from playwright.async_api import Page, expect

from tests.conftest import StartService
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq

USER = "user.42.job.completed"


@pytest.fixture
async def console(start: StartService) -> Service:
    return await start(CONSOLE="development", HEARTBEAT_SECONDS="1")


async def visit(page: Page, service: Service, user: str | None = "42") -> None:
    url = service.public.replace("127.0.0.1", "localhost")
    if user is not None:
        await page.context.add_cookies([{"name": "bridge_token", "value": mint(user), "url": url, "httpOnly": True}])
    await page.goto(url)


async def test_events_come_are_found_and_are_shown_with_their_schema(
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
    await expect(detail).to_contain_text("The job is done, and well.")
    await expect(detail).to_contain_text("Seconds since the job started")
    await expect(detail).to_contain_text("<img src=x onerror=alert(1)>")
    await page.keyboard.press("Escape")
    await expect(detail).to_be_hidden()


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


async def test_who_has_no_token_pastes_one(console: Service, page: Page) -> None:
    await visit(page, console, None)
    await expect(page.locator("#problem")).to_contain_text("missing-token")
    await page.locator("#token").fill(mint("7"))
    await page.get_by_role("button", name="Connect").click()
    await expect(page.locator("#state")).to_have_text("live for user “7”")


async def test_a_gap_and_a_cut_are_shown(start: StartService, page: Page, vhost: Vhost) -> None:
    service = await start(CONSOLE="true", LOG="", RETRY_SECONDS="0.2", MAX_AGE_SECONDS="1")
    await visit(page, service)
    await expect(page.locator("li.gap").first).to_contain_text("gap (no-log)")
    await expect(page.locator("#publish")).to_be_hidden()
    assert (await service.get("/console/publish")).status_code == 404


async def test_it_is_not_there_unless_asked_for(service: Service) -> None:
    for path in ("/", "/console/app.js", "/console/publish"):
        assert (await service.get(path)).status_code == 404


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
async def test_who_may_publish(console: Service, status: int, changes: dict[str, Any]) -> None:
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
