"""The look-ups of the development console: the event log and the quarantine, on a real broker."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.conftest import Eventually, OpenStream, StartService
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint


@pytest.fixture
async def development(start: StartService) -> Service:
    return await start(CONSOLE="development")


async def ask(
    service: Service,
    path: str,
    query: dict[str, str] | None = None,
    *,
    headers: dict[str, str] | None = None,
    token: str | None = None,
) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        authorization = {"Authorization": f"Bearer {mint('42') if token is None else token}"}
        return await client.get(
            f"{service.public}/console/{path}", params=query, headers={**authorization, **(headers or {})}
        )


async def ask_log(service: Service, **query: str) -> dict[str, Any]:
    answer = await ask(service, "log", query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    found: dict[str, Any] = answer.json()
    return found


def ids(answer: dict[str, Any]) -> list[str]:
    return [entry["body"].partition('"id": "')[2].partition('"')[0] for entry in answer["entries"]]


@pytest.mark.contract("5.23", "5.66", "5.67")
async def test_entries_of_the_log_are_found_newest_first(development: Service, vhost: Vhost) -> None:
    assert await ask_log(development) == {"entries": [], "further": None}
    await vhost.publish_all(
        [
            ("user.42.job.completed", cloudevent("e1", job_id="Straße")),
            ("user.a%2Eb.job.completed", cloudevent("e2")),
            ("group.ops.job.completed", cloudevent("e3")),
            ("all.notification", cloudevent("e4", "notification", title="Hello")),
            ("no.such.key", cloudevent("e5")),
            ("user.42.no.type", cloudevent("e6", "no.type")),
        ]
    )
    found = await ask_log(development)
    assert ids(found) == ["e6", "e5", "e4", "e3", "e2", "e1"]
    assert found["further"] is None
    assert [entry["audience"] for entry in found["entries"]] == [
        "user:42", None, "all", "group:ops", "user:a.b", "user:42"
    ]  # fmt: skip
    assert [(entry["refused"] or {}).get("reason") for entry in found["entries"]] == [
        "unknown-type", "type-mismatch", None, None, None, None
    ]  # fmt: skip
    offsets = [entry["offset"] for entry in found["entries"]]
    assert offsets == sorted(offsets, reverse=True)
    cases: list[tuple[dict[str, str], list[str]]] = [
        ({"search": "STRASSE"}, ["e1"]),
        ({"search": "a%2eb"}, ["e2"]),
        ({"types": "notification,no.*"}, ["e6", "e4"]),
        ({"audience": "user:a.b"}, ["e2"]),
        ({"audience": "all"}, ["e4"]),
        ({"audience": "user:42", "types": "job.#"}, ["e1"]),
        ({"before": str(offsets[3])}, ["e2", "e1"]),
        ({"search": "nothing has this"}, []),
    ]
    for query, expected in cases:
        assert ids(await ask_log(development, **query)) == expected, query
    page = await ask_log(development, limit="4")
    assert ids(page) == ["e6", "e5", "e4", "e3"]
    assert ids(await ask_log(development, before=str(page["further"]))) == ["e2", "e1"]


@pytest.mark.contract("5.68")
async def test_refused_messages_are_shown_and_stay(development: Service, vhost: Vhost, connect: OpenStream) -> None:
    await connect(development, "42")
    await vhost.publish("user.42.job.completed", b"\xff{")
    await development.logged("message refused")
    async with asyncio.timeout(PATIENCE):
        # The bridge logs it first and then quarantines it.
        while not (messages := (await ask(development, "quarantine")).json()["messages"]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # Between two polls.
    again = (await ask(development, "quarantine", {"limit": "1"})).json()["messages"]
    assert again == messages
    (message,) = messages
    assert message["refused"]["reason"] == "malformed"
    assert (message["body"], message["audience"]) == ("\\xff{", "user:42")


@pytest.mark.contract("5.64", "5.66")
@pytest.mark.any_rabbitmq
@pytest.mark.parametrize("path", ["log", "quarantine"])
async def test_which_requests_may_look_up(development: Service, start: StartService, path: str) -> None:
    own = development.public
    cases: list[tuple[int, dict[str, Any]]] = [
        (200, {}),
        (200, {"headers": {"Origin": own}}),
        (200, {"headers": {"Sec-Fetch-Site": "same-origin"}}),
        (403, {"headers": {"Origin": "https://evil.example"}}),
        (403, {"headers": {"Origin": "null"}}),
        (403, {"headers": {"Sec-Fetch-Site": "same-site"}}),
        (403, {"headers": {"Sec-Fetch-Site": "cross-site"}}),
        (401, {"token": "x"}),
        (400, {"query": {"limit": "0"}}),
        (400, {"query": {"limit": "201"}}),
        (400, {"query": {"limit": "-1"}}),
    ]
    for status, options in cases:
        answer = await ask(development, path, **options)
        assert answer.status_code == status, (options, answer.text)
        assert status == 200 or answer.headers["Content-Type"] == "application/problem+json"
    shown = await start(CONSOLE="true")
    assert (await ask(shown, path)).status_code == 404


@pytest.mark.contract("5.64")
@pytest.mark.any_rabbitmq
async def test_an_origin_that_may_open_streams_may_not_look_up(start: StartService) -> None:
    service = await start(CONSOLE="development", ALLOWED_ORIGINS="https://app.example.com")
    answer = await ask(service, "log", headers={"Origin": "https://app.example.com"})
    assert answer.status_code == 403


@pytest.mark.any_rabbitmq
@pytest.mark.parametrize(
    "query",
    [{"types": "A"}, {"audience": "x:1"}, {"audience": "user:"}, {"before": "x"}, {"types": ""}, {"audience": ""}],
)
async def test_a_look_up_that_cannot_be_parsed(development: Service, query: dict[str, str]) -> None:
    answer = await ask(development, "log", query)
    assert (answer.status_code, answer.json()["type"]) == (400, "urn:bridge:problem:bad-look-up")


@pytest.mark.any_rabbitmq
async def test_without_a_log_it_says_so(start: StartService) -> None:
    service = await start(CONSOLE="development", LOG="")
    answer = await ask(service, "log")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:bridge:problem:no-log")


@pytest.mark.contract("5.68")
async def test_without_the_right_the_answer_names_it(
    start: StartService, vhost: Vhost, connect: OpenStream, eventually: Eventually
) -> None:
    await start()  # Makes exchange, log and quarantine.
    vhost.add_user("lookup-test")
    try:
        # The rights of docs/rabbitmq.md.
        vhost.grant(
            "lookup-test",
            configure=r"^bridge\.",
            write=r"^(bridge\.|amq\.default$)",
            read=r"^(bridge\.|events(\.log)?$)",
        )
        url = vhost.url_at(vhost.node.port, user="lookup-test", password="secret-lookup-test")
        service = await start(amqp_url=url, CONSOLE="development")
        await connect(service, "42")
        await vhost.publish("user.42.job.completed", b"{half")
        await eventually(lambda: vhost.count("events.invalid") > 0)
        answer = await ask(service, "quarantine")
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:bridge:problem:not-permitted"
        assert "`read` on 'events.invalid'" in answer.json()["detail"]
        assert (await ask(service, "log")).status_code == 200
    finally:
        vhost.delete_user("lookup-test")
