"""Each form of a message reaches the page as the same structured CloudEvent, live and from the log."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import aio_pika
import pytest

from tests.client import Stream
from tests.conftest import Eventually, OpenStream, StartService
from tests.integration.test_cli import run
from tests.rabbit import Vhost, cloudevent
from tests.raw_amqp import publish_raw, short_string, table

KEY = "user.42.job.completed"
DATA = {"job_id": "r-7", "duration_seconds": 0.5}
SHOWN = {**DATA, "result_url": None}
BODY = json.dumps(DATA).encode()
TIME = datetime(2026, 1, 31, 12, tzinfo=UTC)
PARENT = f"00-{'1' * 32}-{'2' * 16}-01"


def attributes(prefix: str, identity: str) -> dict[str, Any]:
    found = {"specversion": "1.0", "id": identity, "source": "/worker", "type": "job.completed", "subject": "é"}
    return {prefix + name: value for name, value in found.items()} | {prefix + "time": TIME, prefix + "count": 2**40}


def event(identity: str, source: str = "/worker", **more: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": identity, "source": source, "type": "job.completed", "data": SHOWN, **more}


BINARY = {"time": "2026-01-31T12:00:00Z", "subject": "é", "datacontenttype": "application/json"}

MESSAGES: list[tuple[aio_pika.Message, dict[str, Any]]] = [
    (
        aio_pika.Message(
            json.dumps(cloudevent("structured", job_id="r-7", duration_seconds=0.5)).encode(),
            content_type="application/cloudevents+json; charset=utf-8",
        ),
        event("structured", cloudevent("")["source"]),
    ),
    *(
        (
            aio_pika.Message(
                BODY, content_type="application/json; charset=utf-8", headers=attributes(prefix, f"b{number}")
            ),
            event(f"b{number}", **BINARY),
        )
        for number, prefix in enumerate(["ce-", "cloudEvents_", "cloudEvents:"])
    ),
    (
        aio_pika.Message(
            BODY,
            content_type="application/json",
            message_id="plain",
            app_id="/billing",
            timestamp=TIME,
            headers={"traceparent": PARENT, "__TypeId__": "com.acme.Done", "n": [1, {"a": 1.5}], "x-own": 1},
        ),
        event("plain", "/billing", time="2026-01-31T12:00:00Z", traceparent=PARENT),
    ),
    (aio_pika.Message(BODY, message_id="bare"), event("bare", "events")),
]


async def publish(vhost: Vhost, *messages: aio_pika.Message, key: str = KEY) -> None:
    connection = await aio_pika.connect(vhost.url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange("events", ensure=False)
        for message in messages:
            await exchange.publish(message, key)


async def publish_without_id(vhost: Vhost, *, app_id: bytes = b"") -> None:
    """aio-pika gives each message an id."""
    flags, properties = (1 << 3, short_string(app_id)) if app_id else (0, b"")
    await publish_raw(vhost.node.port, vhost.name, key=KEY.encode(), body=BODY, flags=flags, properties=properties)


async def next_events(stream: Stream, count: int) -> list[dict[str, Any]]:
    return [await stream.next_event() for _ in range(count)]


@pytest.mark.contract("1.25", "1.26", "1.27", "1.28", "1.29")
@pytest.mark.parametrize("feed", ["queues", "log"])
async def test_every_form_is_the_same_event_live_and_replayed(
    start: StartService, vhost: Vhost, connect: OpenStream, feed: str
) -> None:
    service = await start(FEED=feed)
    stream = await connect(service)
    cursor = stream.frames[0].id
    messages, expected = zip(*MESSAGES, strict=True)
    await publish(vhost, *messages)
    assert await next_events(stream, len(expected)) == list(expected)
    again = await connect(service, headers={"Last-Event-ID": cursor})
    assert await next_events(again, len(expected)) == list(expected)
    assert not vhost.count("events.invalid")


@pytest.mark.contract("1.30")
@pytest.mark.queues
async def test_plain_json_without_an_id_is_refused_with_queues(
    start: StartService, vhost: Vhost, connect: OpenStream, eventually: Eventually
) -> None:
    service = await start(FEED="queues")
    stream = await connect(service)
    await publish_without_id(vhost, app_id=b"/billing")
    assert (await stream.until("bridge.gap")).json == {"reason": "not-readable"}
    await eventually(lambda: vhost.count("events.invalid") == 1)
    (refused,) = await vhost.take("events.invalid")
    assert refused.headers["x-reason"] == "no-id"
    assert "message_id" in str(refused.headers["x-detail"])
    assert refused.app_id == "/billing"


@pytest.mark.contract("1.30")
async def test_plain_json_without_an_id_is_named_by_its_entry_with_the_log(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start(FEED="log")
    stream, other = await connect(service), await connect(service)
    cursor = stream.frames[0].id
    # The same message twice is two entries, and two events.
    for _ in range(2):
        await publish_without_id(vhost)
    live = await next_events(stream, 2)
    assert [found["source"] for found in live] == ["events", "events"]
    first, second = (int(found["id"].removeprefix("offset:")) for found in live)
    assert second == first + 1
    assert await next_events(other, 2) == live
    again = await connect(service, headers={"Last-Event-ID": cursor})
    assert await next_events(again, 2) == live


@pytest.mark.contract("1.32")
async def test_a_refused_message_keeps_its_properties_and_is_replayed_with_them(
    start: StartService, vhost: Vhost, connect: OpenStream, eventually: Eventually
) -> None:
    service = await start(MAX_EVENT_BYTES="1024")
    stream = await connect(service)
    pad = b" " * 1024
    await publish(
        vhost,
        aio_pika.Message(BODY + pad, content_type="application/json", headers=attributes("ce-", "binary")),
        aio_pika.Message(BODY + pad, message_id="plain", app_id="/billing", timestamp=TIME),
    )
    await eventually(lambda: vhost.count("events.invalid") == 2)
    await stream.close()
    larger = await start(MAX_EVENT_BYTES="65536")
    stream = await connect(larger)
    done = await run("quarantine", "replay", amqp_url=vhost.url)
    assert (done.code, done.err) == (0, "2 published again, 0 still refused\n"), done.out
    assert await next_events(stream, 2) == [
        event("binary", **BINARY),
        event("plain", "/billing", time="2026-01-31T12:00:00Z"),
    ]


@pytest.mark.contract("1.15")
async def test_hostile_properties_end_no_stream(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start()
    stream = await connect(service)
    cursor = stream.frames[0].id
    port, name = vhost.node.port, vhost.name
    for flags, properties in [
        (1 << 13, table(short_string(b"ce-id") + b"S\0\0\0\x02\xff\xfe", short_string(b"ce-\xff") + b"t\x01")),
        (1 << 7, short_string(b"\xff\xfe")),
        (1 << 6 | 1 << 3, b"\xff" * 8 + short_string(b"\xc3(")),
        (1 << 15, short_string(b"application/json;=\xff")),
    ]:
        await publish_raw(port, name, key=KEY.encode(), body=BODY, flags=flags, properties=properties)
    await publish(vhost, aio_pika.Message(BODY, message_id="after"))
    for found in (stream, await connect(service, headers={"Last-Event-ID": cursor})):
        while await found.ids(1) != ["after"]:
            pass  # With the feed `log` a message needs no id.
    assert await service.metric("bridge_broker_connects") == 1
