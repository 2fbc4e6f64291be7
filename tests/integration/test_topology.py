"""Exchanges and queues that an operator made: the bridge uses those that fit, and shows RabbitMQ's error for others."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import aio_pika.abc
import pytest
from pamqp.common import FieldTable

from bridge import amqp
from bridge.amqp import TopologyMismatch
from bridge.service.broker import topology
from bridge.service.settings import LogSettings
from tests.conftest import OpenStream, StartService
from tests.integration.test_cli import run
from tests.rabbit import Vhost, cloudevent
from tests.service import SECRET

LOG = LogSettings("events.log", "1h", 1_000_000_000)


@pytest.fixture
async def operator(vhost: Vhost) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    """A channel on which an operator declares, with aio-pika alone."""
    async with await aio_pika.connect(vhost.url) as connection:
        yield await connection.channel()


@pytest.fixture
async def connection(vhost: Vhost) -> AsyncIterator[aio_pika.abc.AbstractConnection]:
    made = await amqp.connect([vhost.url], name="test")
    yield made
    await amqp.close(made)


@pytest.mark.contract("5.15")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, []),
        ({"arguments": {"alternate-exchange": "unrouted"}}, ["alternate-exchange is unrouted"]),
        ({"arguments": {"x-team": "orders"}}, []),
        ({"internal": True}, ["internal is true"]),
        ({"internal": True, "arguments": {"alternate-exchange": "unrouted"}}, ["internal is true"]),
    ],
)
async def test_an_exchange_that_fits(
    operator: aio_pika.abc.AbstractChannel,
    connection: aio_pika.abc.AbstractConnection,
    options: dict[str, Any],
    named: list[str],
) -> None:
    await operator.declare_exchange("events", "topic", durable=True, **options)
    declared = await topology.declare_exchange(connection, "events")
    assert [str(each).partition(",")[0] for each in declared.differences] == named


@pytest.mark.contract("1.1", "5.15")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "direct", "durable": True}, "inequivalent arg 'type' .* current is 'direct'"),
        ({"type": "topic", "durable": False}, "inequivalent arg 'durable' .* current is 'false'"),
        ({"type": "topic", "durable": True, "auto_delete": True}, "inequivalent arg 'auto_delete'"),
        ({"type": "fanout", "durable": False, "internal": True}, "inequivalent arg 'type'"),
    ],
)
async def test_an_exchange_that_does_not_fit(
    operator: aio_pika.abc.AbstractChannel,
    connection: aio_pika.abc.AbstractConnection,
    options: dict[str, Any],
    words: str,
) -> None:
    await operator.declare_exchange("events", **options)
    with pytest.raises(TopologyMismatch, match=words) as caught:
        await topology.declare_exchange(connection, "events")
    assert_advice(caught.value, "BRIDGE_EXCHANGE")


def assert_advice(error: TopologyMismatch, setting: str) -> None:
    assert setting in str(error)
    assert "delete it" not in str(error).lower()
    assert "comparing queue" not in str(error)


@pytest.mark.contract("1.20", "5.16")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"x-max-length": 10_000, "x-message-ttl": 604_800_000}, {}),  # As earlier bridges made it.
        ({**topology.QUARANTINE}, {}),
        ({}, {"x-max-length": None, "x-message-ttl": None}),
        ({"x-max-length": 5, "x-message-ttl": 604_800_000}, {"x-max-length": "5"}),
        (
            {"x-queue-type": "quorum", "x-dead-letter-exchange": "old", "x-overflow": "reject-publish"},
            {
                "x-queue-type": "quorum",
                "x-dead-letter-exchange": "old",
                "x-overflow": "reject-publish",
                "x-max-length": None,
                "x-message-ttl": None,
            },
        ),
        (
            {"x-max-priority": 5, "x-single-active-consumer": True},
            {"x-max-priority": "5", "x-single-active-consumer": "true", "x-max-length": None, "x-message-ttl": None},
        ),
    ],
)
async def test_a_quarantine_that_fits(
    operator: aio_pika.abc.AbstractChannel,
    connection: aio_pika.abc.AbstractConnection,
    vhost: Vhost,
    arguments: FieldTable,
    named: dict[str, str | None],
) -> None:
    await operator.declare_queue("events.invalid", durable=True, arguments=arguments)
    declared = await topology.declare_quarantine(connection, "events.invalid")
    assert {each.name: each.current for each in declared.differences} == named
    assert vhost.queues() == ["events.invalid"]


@pytest.mark.contract("5.16")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"durable": True, "auto_delete": True}, "inequivalent arg 'auto_delete'"),
        ({"durable": True, "arguments": {"x-queue-type": "stream"}}, "inequivalent arg 'x-queue-type' .*stream"),
        ({"durable": True, "arguments": {"x-expires": 60_000}}, "inequivalent arg 'x-expires'"),
        ({"durable": True, "arguments": {"x-max-length": 0}}, "inequivalent arg 'x-max-length'"),
        ({"durable": True, "exclusive": True}, "RESOURCE_LOCKED"),
    ],
)
async def test_a_quarantine_that_does_not_fit(
    operator: aio_pika.abc.AbstractChannel,
    connection: aio_pika.abc.AbstractConnection,
    options: dict[str, Any],
    words: str,
) -> None:
    await operator.declare_queue("events.invalid", **options)
    with pytest.raises(TopologyMismatch, match=words) as caught:
        await topology.declare_quarantine(connection, "events.invalid")
    assert_advice(caught.value, "BRIDGE_QUARANTINE")


@pytest.mark.contract("1.19", "5.17")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"x-max-age": "1h", "x-max-length-bytes": 1_000_000_000}, []),
        ({"x-max-age": "2h", "x-max-length-bytes": 1_000_000_000}, ["x-max-age"]),
        ({"x-max-length-bytes": 5_000_000_000, "x-max-age": "7D"}, ["x-max-age", "x-max-length-bytes"]),
        ({}, ["x-max-age", "x-max-length-bytes"]),
        (
            {"x-max-age": "90m", "x-stream-max-segment-size-bytes": 50_000_000},
            ["x-max-age", "x-max-length-bytes", "x-stream-max-segment-size-bytes"],
        ),
    ],
)
async def test_a_log_that_fits_is_bound(
    operator: aio_pika.abc.AbstractChannel,
    connection: aio_pika.abc.AbstractConnection,
    vhost: Vhost,
    arguments: FieldTable,
    named: list[str],
) -> None:
    await operator.declare_exchange("events", "topic", durable=True)
    await operator.declare_queue("events.log", durable=True, arguments={"x-queue-type": "stream", **arguments})
    declared = await topology.declare_log(connection, LOG, "events")
    assert sorted(each.name for each in declared.differences) == named
    assert vhost.bindings() == [("events.log", "#")]


@pytest.mark.contract("5.17")
@pytest.mark.parametrize("arguments", [{}, {"x-queue-type": "quorum"}, {"x-max-length-bytes": 1_000_000_000}])
async def test_a_log_that_is_not_a_stream(
    operator: aio_pika.abc.AbstractChannel,
    connection: aio_pika.abc.AbstractConnection,
    vhost: Vhost,
    arguments: FieldTable,
) -> None:
    await operator.declare_exchange("events", "topic", durable=True)
    await operator.declare_queue("events.log", durable=True, arguments=arguments)
    with pytest.raises(TopologyMismatch, match="inequivalent arg 'x-queue-type'") as caught:
        await topology.declare_log(connection, LOG, "events")
    assert_advice(caught.value, "BRIDGE_LOG")
    assert vhost.bindings() == []


async def test_comparing_a_queue_that_is_gone_makes_none(
    connection: aio_pika.abc.AbstractConnection, vhost: Vhost
) -> None:
    # The queue was deleted after its declaration was refused.
    kinds: list[FieldTable] = [topology.QUARANTINE, {"x-queue-type": "stream"}, {"x-queue-type": "quorum"}, {}]
    for wanted in kinds:
        name = f"gone-{secrets.token_hex(4)}"
        assert await topology._find_differences(connection, name, wanted) == [None]
    assert vhost.queues() == []


@pytest.mark.contract("5.14", "5.18")
async def test_check_and_the_bridge_report_what_differs_and_work(
    operator: aio_pika.abc.AbstractChannel, vhost: Vhost, start: StartService, connect: OpenStream
) -> None:
    await operator.declare_exchange("events", "topic", durable=True, arguments={"alternate-exchange": "unrouted"})
    await operator.declare_queue("events.invalid", durable=True, arguments={"x-queue-type": "quorum"})
    await operator.declare_queue("events.log", durable=True, arguments={"x-queue-type": "stream", "x-max-age": "2h"})
    done = await run("check", amqp_url=vhost.url, JWT_SECRET=SECRET)
    assert done.code == 0, done.out
    assert "It fits, and differs: alternate-exchange is unrouted, the bridge would set none" in done.out
    assert "x-queue-type is quorum, the bridge would set classic" in done.out
    assert "x-max-age is 2h" in done.out or "x-max-age is 7200s" in done.out
    service = await start()
    for what in ("exchange", "quarantine", "log"):
        await service.logged(f"the {what} differs, and fits")
    stream = await connect(service)
    await vhost.publish("user.42.job.completed", cloudevent("good"))
    await vhost.publish("user.42.job.completed", b"bad")
    assert await stream.ids(1) == ["good"]
    while not (refused := await vhost.take("events.invalid")):
        pass
    assert refused[0].body == b"bad"


@pytest.mark.contract("5.19")
@pytest.mark.parametrize("kind", ["quorum", "stream"])
async def test_a_virtual_host_with_another_default_queue_type(
    vhost: Vhost, start: StartService, connect: OpenStream, kind: str
) -> None:
    # The quarantine is older than the operator's change of the default. RabbitMQ 3.10 ignores this setting.
    first = await start()
    await first.stop()
    vhost._call("PUT", f"vhosts/{vhost.name}", default_queue_type=kind)
    for before in (True, False):
        if not before:
            vhost.delete_queue("events.invalid")
        service = await start()
        stream = await connect(service)
        await vhost.publish("user.42.job.completed", cloudevent("good"))
        await vhost.publish("user.42.job.completed", b"bad")
        assert await stream.ids(1) == ["good"]
        while not await vhost.take("events.invalid"):
            pass
        await service.stop()
