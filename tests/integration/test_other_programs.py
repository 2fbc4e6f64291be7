"""Messages of programs that know nothing of the bridge: docs/messages.md says what becomes of each."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Eventually, OpenStream
from tests.node import copy_script, find_node
from tests.patience import PATIENCE
from tests.rabbit import Vhost
from tests.service import Service

KEY = "user.42.job.completed"
DATA = {"job_id": "r-7", "duration_seconds": 0.5}
SHOWN = {**DATA, "result_url": None}
TIME = "2026-01-31T12:00:00Z"


def send_with_pika(url: str, body: str, **properties: Any) -> None:
    pika: Any = importlib.import_module("pika")
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_publish("events", KEY, body.encode(), pika.BasicProperties(**properties))
    connection.close()


def send_pika(url: str) -> None:
    send_with_pika(url, json.dumps(DATA), message_id="pika-1", app_id="/pika", timestamp=1_769_860_800)


def send_spring(url: str) -> None:
    """The properties that Spring AMQP's Jackson2JsonMessageConverter sets, with `createMessageIds`."""
    headers = {"__TypeId__": "com.acme.JobCompleted"}
    properties = {"content_type": "application/json", "content_encoding": "UTF-8", "priority": 0, "delivery_mode": 2}
    send_with_pika(url, json.dumps(DATA), headers=headers, message_id="spring-1", **properties)


def send_dapr(url: str) -> None:
    """The envelope of Dapr's pub/sub for RabbitMQ."""
    envelope = {
        "data": DATA,
        "datacontenttype": "application/json; charset=utf-8",
        "id": "dapr-1",
        "pubsubname": "rabbitmq",
        "source": "reports",
        "specversion": "1.0",
        "time": TIME,
        "topic": "events",
        "traceid": f"00-{'1' * 32}-{'2' * 16}-01",
        "traceparent": f"00-{'1' * 32}-{'2' * 16}-01",
        "tracestate": "",
        "type": "job.completed",
    }
    send_with_pika(url, json.dumps(envelope), content_type="application/json", delivery_mode=2)


def send_kombu(url: str) -> None:
    kombu: Any = importlib.import_module("kombu")
    with kombu.Connection(url) as connection:
        exchange = kombu.Exchange("events", "topic", no_declare=True)
        connection.Producer().publish(
            DATA, exchange=exchange, routing_key=KEY, serializer="json", message_id="kombu-1", app_id="/kombu"
        )


def send_celery(url: str) -> None:
    celery: Any = importlib.import_module("celery")
    kombu: Any = importlib.import_module("kombu")
    app = celery.Celery(broker=url)
    app.send_task("reports.run", args=[7], exchange=kombu.Exchange("events", "topic", no_declare=True), routing_key=KEY)
    app.close()


def send_masstransit(url: str) -> None:
    """The envelope that MassTransit's documentation describes."""
    envelope = {
        "messageId": "0192f3a4-5b6c-7d8e-9f00-112233445566",
        "messageType": ["urn:message:Acme:JobCompleted"],
        "message": DATA,
    }
    send_with_pika(url, json.dumps(envelope), content_type="application/vnd.masstransit+json")


def send_symfony(url: str) -> None:
    """The headers that Symfony Messenger's serializer sets."""
    headers = {"type": "App\\Message\\JobCompleted", "X-Message-Stamp-Symfony\\Component\\Messenger": "[[]]"}
    send_with_pika(url, json.dumps({"jobId": 7}), headers=headers, content_type="application/json")


PYTHON = {
    "pika": send_pika,
    "spring": send_spring,
    "dapr": send_dapr,
    "kombu": send_kombu,
    "celery": send_celery,
    "masstransit": send_masstransit,
    "symfony": send_symfony,
}


async def send(program: str, url: str, folder: Path) -> None:
    if program in PYTHON:
        await asyncio.to_thread(PYTHON[program], url)
        return
    script = copy_script("publishers.mjs", folder)
    environment = {**os.environ, "AMQP_URL": url}
    process = await asyncio.create_subprocess_exec(
        find_node(), str(script), *program.split(), cwd=folder, env=environment
    )
    assert await asyncio.wait_for(process.wait(), PATIENCE) == 0


@pytest.mark.parametrize(
    ("program", "identity", "source", "more"),
    [
        ("pika", "pika-1", "/pika", {"time": TIME}),
        ("spring", "spring-1", "events", {}),
        ("dapr", "dapr-1", "reports", {"time": TIME, "datacontenttype": "application/json"}),
        ("kombu", "kombu-1", "/kombu", {}),
        ("amqplib", "amqplib-1", "/amqplib", {"time": TIME}),
        ("nest-plain", "nest-1", "/nest", {}),
        ("cloudevents binary", "sdk-binary", "/cloudevents", {"datacontenttype": "application/json"}),
        ("cloudevents structured", "sdk-structured", "/cloudevents", {}),
    ],
)
async def test_messages_that_need_no_change(
    service: Service,
    vhost: Vhost,
    connect: OpenStream,
    tmp_path: Path,
    program: str,
    identity: str,
    source: str,
    more: dict[str, Any],
) -> None:
    stream = await connect(service)
    await send(program, vhost.url, tmp_path)
    event = await stream.next_event()
    assert (event["id"], event["source"], event["type"], event["data"]) == (identity, source, "job.completed", SHOWN)
    assert event | more == event
    # The Dapr envelope's own members are no attributes of pages.
    assert not event.keys() - {"specversion", "id", "source", "type", "data", "time", "datacontenttype", "traceparent"}


@pytest.mark.contract("1.33")
@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("celery", "a Celery task"),
        ("nest", "a NestJS pattern"),
        ("masstransit", "a MassTransit envelope"),
        ("symfony", "a Symfony Messenger message"),
    ],
)
async def test_messages_that_are_refused_by_their_name(
    service: Service,
    vhost: Vhost,
    connect: OpenStream,
    eventually: Eventually,
    tmp_path: Path,
    program: str,
    name: str,
) -> None:
    await connect(service)
    await send(program, vhost.url, tmp_path)
    await eventually(lambda: vhost.count("events.invalid") == 1)
    (refused,) = await vhost.take("events.invalid")
    assert str(refused.headers["x-detail"]).startswith(f"this looks like {name}; see docs/messages.md. ")
    await service.logged("message refused", routing_key=KEY)
