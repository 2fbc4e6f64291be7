"""The SDK with a real broker: events are confirmed, refused or forbidden, and the broker is away or blocked."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import aio_pika
import pytest

from bridge import (
    Audience,
    EventData,
    EventRefused,
    ExchangeMissing,
    Publisher,
    PublishForbidden,
    PublishTimeout,
    new_id,
)
from bridge.samples.jobs import JobCompleted, JobProgress
from deploy.local.node import Node
from tests.conftest import OpenStream
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost
from tests.service import ROOT, Service, bare_environment

DONE = JobCompleted(job_id="r-7", duration_seconds=3.2)


async def publish_until(publisher: Publisher, event_id: str) -> str:
    """Publishes until it is confirmed: one second may be too short on a slow machine."""
    while True:
        try:
            return await publisher.to_user("42", DONE, id=event_id)
        except PublishTimeout:
            pass


async def take_all(queue: aio_pika.abc.AbstractQueue) -> list[aio_pika.abc.AbstractIncomingMessage]:
    found = []
    while (message := await queue.get(fail=False)) is not None:
        await message.ack()
        found.append(message)
    return found


@pytest.mark.contract("4.1")
async def test_three_lines_reach_a_browser(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42", "ops")
    async with Publisher(vhost.url, source="/workers/reports") as publisher:
        one = await publisher.to_user("42", DONE)
        two = await publisher.to_group("ops", DONE)
        three = await publisher.to_all(DONE)
    assert set(await stream.ids(3)) == {one, two, three}


@pytest.mark.contract("1.14")
async def test_a_message_is_a_cloudevent_with_its_properties(vhost: Vhost, queue: aio_pika.abc.AbstractQueue) -> None:
    async with Publisher(vhost.url, source="/workers/reports") as publisher:
        event_id = await publisher.to_user(
            "a.b", DONE, subject="s", traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        )
    (message,) = await take_all(queue)
    assert message.routing_key == "user.a%2Eb.job.completed"
    assert message.content_type == "application/cloudevents+json"
    assert message.message_id == event_id
    assert message.type == "job.completed"
    assert message.app_id == "/workers/reports"
    assert message.delivery_mode == 2
    assert message.timestamp is not None
    assert abs((datetime.now(UTC) - message.timestamp).total_seconds()) < 10
    body = json.loads(message.body)
    assert datetime.fromisoformat(body.pop("time")) <= datetime.now(UTC)
    assert body == {
        "specversion": "1.0",
        "id": event_id,
        "source": "/workers/reports",
        "type": "job.completed",
        "subject": "s",
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "data": {"job_id": "r-7", "duration_seconds": 3.2, "result_url": None},
    }


@pytest.mark.contract("1.11")
def test_ids_are_uuid_7_and_sort_by_time() -> None:
    ids = []
    for _ in range(3):
        ids += [new_id() for _ in range(100)]
        time.sleep(0.002)  # The clock has to move on for the next hundred.
    assert len(set(ids)) == 300
    assert {identity[14] for identity in ids} == {"7"}
    assert {identity[19] for identity in ids} <= set("89ab")
    assert ids[0] < ids[100] < ids[200]


class Undeclared(EventData):
    job_id: str


@pytest.mark.contract("4.4")
async def test_what_the_bridge_would_refuse_is_refused_before_it_is_sent(
    vhost: Vhost, queue: aio_pika.abc.AbstractQueue
) -> None:
    async with Publisher(vhost.url, source="/t") as publisher:
        infinite = JobCompleted(job_id="r", duration_seconds=1)
        infinite.duration_seconds = float("inf")
        wrong = JobCompleted.model_construct(job_id=7, duration_seconds=1.0)  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match="serialized"), pytest.raises(EventRefused, match=r"data\.job_id"):
            await publisher.to_user("42", wrong)
        for user, data, attributes, words in [
            ("42", infinite, {}, "infinite"),
            ("", DONE, {}, "empty"),
            ("x" * 300, DONE, {}, "255"),
            ("42", DONE, {"id": "a b"}, "id must be"),
            ("42", DONE, {"time": "now"}, "RFC 3339"),
            ("42", DONE, {"UPPER": "x"}, "not an attribute"),
            ("42", DONE, {"subject": "\ud800"}, "surrogate"),
            ("42", Undeclared(job_id="r"), {}, "not an event"),
            ("42", JobProgress(job_id="r", percent=1, message="x" * 500), {"subject": "x" * 66_000}, "too-large"),
        ]:
            with pytest.raises(EventRefused, match=words):
                await publisher.to_user(user, data, **attributes)
    assert await take_all(queue) == []


def test_a_bad_address_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="not an AMQP address"):
        Publisher("localhost:5672", source="/t")
    with pytest.raises(ValueError, match="source must be a str that is not empty"):
        Publisher("amqp://localhost", source="")


@pytest.mark.contract("4.16")
async def test_the_exchange_is_missing(vhost: Vhost) -> None:
    async with Publisher(vhost.url, source="/t") as publisher:
        with pytest.raises(ExchangeMissing, match="NOT_FOUND - no exchange 'events'"):
            await publisher.to_user("42", DONE)


@pytest.mark.contract("4.16")
async def test_credentials_are_refused(vhost: Vhost, node: Node) -> None:
    with pytest.raises(PublishForbidden, match="ACCESS_REFUSED") as caught:
        async with Publisher(vhost.url_at(node.port, password="s3cret"), source="/t"):
            pass
    assert "s3cret" not in str(caught.value)


async def test_one_forbidden_event_does_not_affect_the_others(
    vhost: Vhost, node: Node, queue: aio_pika.abc.AbstractQueue
) -> None:
    vhost.add_user("publisher-test")
    try:
        vhost.grant("publisher-test", configure="", write="events", read="")
        node.ctl(
            "set_topic_permissions", "-p", vhost.name, "publisher-test", "events", r"^user\..*\.job\.completed$", ""
        )
        url = vhost.url_at(node.port, user="publisher-test", password="secret-publisher-test")
        async with Publisher(url, source="/t") as publisher:
            results = await asyncio.gather(
                *(publisher.to_user("42", JobProgress(job_id="r", percent=1) if n == 10 else DONE) for n in range(20)),
                return_exceptions=True,
            )
        assert [n for n, result in enumerate(results) if isinstance(result, PublishForbidden)] == [10]
        assert [n for n, result in enumerate(results) if not isinstance(result, str)] == [10]
        ids = {message.message_id for message in await take_all(queue)}
        assert ids == {result for result in results if isinstance(result, str)}
    finally:
        vhost.delete_user("publisher-test")


@pytest.mark.contract("4.8", "4.9")
async def test_a_broker_away_past_the_deadline(vhost: Vhost, proxy: Proxy, queue: aio_pika.abc.AbstractQueue) -> None:
    async with Publisher(vhost.url_at(proxy.port), source="/t", timeout=1) as publisher:
        await publisher.to_user("42", DONE)
        await proxy.refuse()
        proxy.cut()
        began = time.monotonic()
        with pytest.raises(
            PublishTimeout, match=r"not confirmed within 1 s; last error: .*publishing|connecting"
        ) as caught:
            await publisher.to_user("42", DONE)
        assert time.monotonic() - began > 0.9
        # And it reconnects by itself.
        await proxy.open()
        assert await publish_until(publisher, caught.value.id) == caught.value.id
    assert len({message.message_id for message in await take_all(queue)}) == 2


async def test_a_connection_cut_in_the_middle_loses_nothing(
    vhost: Vhost, proxy: Proxy, queue: aio_pika.abc.AbstractQueue
) -> None:
    async with Publisher(vhost.url_at(proxy.port), source="/t") as publisher:
        tasks = []
        for number in range(300):
            tasks.append(asyncio.create_task(publisher.to_user("42", JobProgress(job_id=str(number), percent=1))))
            if number % 60 == 59:
                await asyncio.sleep(0)
                proxy.cut()
                await tasks[-1]
        confirmed = await asyncio.gather(*tasks)
    messages = await take_all(queue)
    assert {message.message_id for message in messages} == set(confirmed)
    assert len(confirmed) == 300
    assert proxy.accepted >= 5


async def test_a_blocked_connection_ends_at_the_deadline_and_flows_again(
    vhost: Vhost, node: Node, queue: aio_pika.abc.AbstractQueue
) -> None:
    async with Publisher(vhost.url, source="/t", timeout=2) as publisher:
        await publisher.to_user("42", DONE)
        node.ctl("set_vm_memory_high_watermark", "0.00000001")
        try:
            with pytest.raises(PublishTimeout, match="alarm") as caught:
                await publisher.to_user("42", DONE)
        finally:
            node.ctl("set_vm_memory_high_watermark", "absolute", "2GB")
        await publish_until(publisher, caught.value.id)
    ids = [message.message_id for message in await take_all(queue)]
    assert set(ids[1:]) == {caught.value.id}


async def test_closing_while_blocked_does_not_hang(vhost: Vhost, node: Node, queue: object) -> None:
    publisher = Publisher(vhost.url, source="/t", timeout=1)
    async with publisher:
        await publisher.to_user("42", DONE)
        node.ctl("set_vm_memory_high_watermark", "0.00000001")
        try:
            with pytest.raises(PublishTimeout):
                await publisher.to_user("42", DONE)
            async with asyncio.timeout(PATIENCE):  # RabbitMQ would not answer for as long as the alarm lasts.
                await publisher.close()
        finally:
            node.ctl("set_vm_memory_high_watermark", "absolute", "2GB")


@pytest.mark.contract("4.12")
async def test_many_events_in_order(vhost: Vhost, queue: aio_pika.abc.AbstractQueue) -> None:
    events = [(Audience.user("42"), JobProgress(job_id=str(n), percent=1)) for n in range(2000)]
    async with Publisher(vhost.url, source="/t") as publisher:
        assert await publisher.publish_many(events) == 2000
    jobs = [json.loads(message.body)["data"]["job_id"] for message in await take_all(queue)]
    assert jobs == [str(n) for n in range(2000)]


async def test_many_events_arrive_though_the_connection_is_cut(
    vhost: Vhost, proxy: Proxy, queue: aio_pika.abc.AbstractQueue
) -> None:
    async def events() -> AsyncIterator[tuple[Audience, EventData]]:
        for number in range(1000):
            if number in (400, 700):
                proxy.cut()
            yield Audience.user("42"), JobProgress(job_id=str(number), percent=1)

    async with Publisher(vhost.url_at(proxy.port), source="/t") as publisher:
        assert await publisher.publish_many(events()) == 1000
    jobs = {json.loads(message.body)["data"]["job_id"] for message in await take_all(queue)}
    assert jobs == {str(n) for n in range(1000)}


async def test_a_bad_event_among_many_stops_there(vhost: Vhost, queue: aio_pika.abc.AbstractQueue) -> None:
    events: list[tuple[Audience, EventData]] = [(Audience.user("42"), DONE)] * 10
    events[5] = (Audience.user(""), DONE)
    async with Publisher(vhost.url, source="/t") as publisher:
        with pytest.raises(EventRefused, match="empty"):
            await publisher.publish_many(events)


async def test_cancelling_a_publish_leaves_the_others_alone(vhost: Vhost, queue: aio_pika.abc.AbstractQueue) -> None:
    async with Publisher(vhost.url, source="/t") as publisher:
        for steps in range(12):
            task = asyncio.create_task(publisher.to_user("42", DONE))
            other = asyncio.create_task(publisher.to_user("43", DONE))
            for _ in range(steps):
                await asyncio.sleep(0)  # One step of the loop: a cancel at each await in turn.
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await other


@pytest.mark.contract("4.1", "4.10")
def test_the_blocking_form_in_plain_scripts_and_threads(vhost: Vhost) -> None:
    vhost.add_exchange("events")
    with Publisher.blocking(vhost.url, source="/cron/backup") as publisher:
        ids = [publisher.to_user("42", DONE), publisher.to_group("ops", DONE), publisher.to_all(DONE)]
        assert publisher.publish_many((Audience.user("42"), DONE) for _ in range(300)) == 300
        threads = [threading.Thread(target=lambda: ids.append(publisher.to_user("42", DONE))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(EventRefused):
            publisher.to_user("", DONE)
    assert len(set(ids)) == 11
    with pytest.raises(RuntimeError, match="closed: call open"):
        publisher.to_user("42", DONE)


def test_the_blocking_form_raises_what_is_wrong(vhost: Vhost) -> None:
    unreachable = Publisher.blocking("amqp://127.0.0.1:1/", source="/t", timeout=1)
    with pytest.raises(PublishTimeout, match="no connection within 1 s"), unreachable:
        pass
    with Publisher.blocking(vhost.url, source="/t") as publisher, pytest.raises(ExchangeMissing):
        publisher.to_user("42", DONE)
    assert [thread.name for thread in threading.enumerate() if thread.name == "bridge-publisher"] == []


def test_the_sdk_imports_no_library_of_the_server() -> None:
    script = (
        "import sys, bridge, bridge.cli, bridge.samples.jobs\n"
        "found = {'quart', 'hypercorn', 'httpx', 'jwt', 'structlog', 'prometheus_client', 'uvloop', 'werkzeug'}\n"
        "print(sorted(found & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=bare_environment(), check=True
    )
    assert done.stdout.strip() == "[]"
