"""Expensive input is limited, and an innocent stream still gets all its events.

`make attacks` measures how late these events are; the tests here do not.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import struct
from collections import Counter
from pathlib import Path

import aio_pika
import pytest

from bridge.routing import MAX_PATTERNS
from deploy.local.node import Node
from tests.conftest import OpenStream, StartService
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost, cloudevent
from tests.service import BRIDGE, Service, mint

LARGE_BYTES = 10_000_000

STREAMS = 20
"""The most streams that one user may have open."""


def peak_bytes(service: Service) -> int:
    """The peak of the process's resident memory since its start."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{service.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def assert_not_held_in_memory(service: Service, before: int) -> None:
    """Memory never grew by the size of one body. In `make test-slow` the library collects whole bodies."""
    if BRIDGE != "tests.slow":
        assert peak_bytes(service) - before < LARGE_BYTES


async def quarantined(vhost: Vhost, count: int) -> list[aio_pika.abc.AbstractIncomingMessage]:
    """Waits for so many messages in the quarantine, and takes them out."""
    found: list[aio_pika.abc.AbstractIncomingMessage] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < count:
            found += await vhost.take("events.invalid")
    return found


def hostile(number: int) -> str:
    """Sixteen patterns of 120 characters: the worst case for a matcher that backtracks."""
    words = "*.a." * 27
    return ",".join(f"#.p{number}x{index}.{words}%23".replace("#", "%23") for index in range(MAX_PATTERNS))


async def test_hostile_patterns_are_accepted_and_filter_correctly(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    innocent = await connect(service, "innocent")
    authorization = {"Authorization": f"Bearer {mint('attacker')}"}
    # Each set is new, so that none comes from a cache.
    answers = [
        await service.get(f"/events?types={hostile(number)}", method="HEAD", headers=authorization)
        for number in range(200)
    ]
    assert {answer.status_code for answer in answers} == {200}
    many = ",".join(["%23.job.*.%23", *(f"%23.x{index}.*.*.%23" for index in range(MAX_PATTERNS - 1))])
    attacker = await connect(service, "attacker", query=f"types={many}")
    report = {"report_id": "r", "title": "t", "url": "https://example.com/r", "format": "pdf"}
    await vhost.publish("all.job.completed", cloudevent("e1"))
    await vhost.publish("all.report.ready", cloudevent("e2", "report.ready", **report))
    await vhost.publish("all.job.completed", cloudevent("e3"))
    assert await attacker.ids(2) == ["e1", "e3"]
    assert await innocent.ids(3) == ["e1", "e2", "e3"]
    commas = await service.get("/events?types=" + "," * 10_000, headers=authorization)
    assert commas.status_code == 400
    assert "at most 16 patterns in `types`, these are 10001" in commas.json()["detail"]


@pytest.mark.contract("1.23", "5.26")
async def test_large_bodies_to_many_streams_are_not_held_in_memory(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start()
    attacked = [await connect(service, "attacker") for _ in range(STREAMS)]
    innocent = await connect(service, "innocent")
    # A first event, so that memory for things that are done once is already allocated.
    await vhost.publish("user.innocent.job.completed", cloudevent("first"))
    assert await innocent.ids(1) == ["first"]
    before = peak_bytes(service)
    for number in range(3):
        await vhost.publish("user.attacker.job.completed", b"%d" % number + b"x" * LARGE_BYTES)
        await vhost.publish("user.innocent.job.completed", cloudevent(f"e{number}"))
    assert await innocent.ids(3) == ["e0", "e1", "e2"]
    # After the bodies, the attacked streams get their next event, and a gap for what could not be read.
    await vhost.publish("user.attacker.job.completed", cloudevent("last"))
    for stream in attacked:
        assert await stream.ids(1) == ["last"]
        # At most one gap in five seconds: on a slow machine there may be several.
        assert {frame.data for frame in stream.frames if frame.event == "bridge.gap"} == {'{"reason":"not-readable"}'}
    messages = await quarantined(vhost, 3)
    for number, message in enumerate(messages):
        assert message.body == (b"%d" % number + b"x" * LARGE_BYTES)[:4096]
        assert message.headers["x-size"] == LARGE_BYTES + 1
        assert message.headers["x-reason"] == "too-large"
        assert f"{LARGE_BYTES + 1} bytes" in str(message.headers["x-detail"])
    assert await service.metric('bridge_events_invalid_total{reason="too-large"}') == 3
    # Sixty bodies arrived. None of them was ever in memory as a whole.
    assert_not_held_in_memory(service, before)


@pytest.mark.contract("1.23", "5.26")
async def test_a_large_body_in_the_log_is_not_held_in_memory(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start()
    stream = await connect(service, "42")
    await vhost.publish("user.42.job.completed", cloudevent("first"))
    assert await stream.ids(1) == ["first"]
    cursor = stream.decoder.last_event_id
    await stream.close()
    before = peak_bytes(service)
    await vhost.publish("user.42.job.completed", b"x" * LARGE_BYTES)
    await vhost.publish("user.42.job.completed", cloudevent("second"))
    back = await connect(service, "42", headers={"Last-Event-ID": cursor})
    assert await back.ids(1) == ["second"]
    (message,) = await quarantined(vhost, 1)
    assert (len(message.body), message.headers["x-size"]) == (4096, LARGE_BYTES)
    assert_not_held_in_memory(service, before)


@pytest.mark.contract("5.28")
async def test_a_frame_larger_than_agreed_ends_the_connection_and_nothing_is_lost(
    start: StartService, vhost: Vhost, connect: OpenStream, proxy: Proxy
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port))
    stream = await connect(service, "42")
    await vhost.publish("user.42.job.completed", cloudevent("first"))
    assert await stream.ids(1) == ["first"]
    before = peak_bytes(service)
    # The first connection is the one that consumes. RabbitMQ is quiet, so this comes between two of its frames.
    proxy.inject(struct.pack(">BHI", 3, 1, 1 << 28) + b"x" * 100_000, 0)
    line = await service.logged("a delivery was not taken")
    assert "a frame of 268435456 bytes, where the limit is 131072" in line["exception"]
    await service.logged("broker connected", count=2)
    await vhost.publish("user.42.job.completed", cloudevent("second"))
    assert await stream.ids(1) == ["second"]
    assert peak_bytes(service) - before < 1 << 25


FLOOD = 5_000
"""Less than the capacity of the quarantine, so that it drops none by itself, even on a slow machine."""


@pytest.mark.contract("5.22")
async def test_of_a_flood_of_refused_messages_a_part_is_kept_and_the_rest_is_counted_and_logged(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start()
    innocent = await connect(service, "innocent")
    async with innocent.read_on():
        # The channel is closed before the connection, which would drop what its client has not yet written.
        async with (
            await aio_pika.connect(vhost.url) as connection,
            connection.channel(publisher_confirms=False) as channel,
        ):
            events = await channel.get_exchange("events", ensure=False)
            for number in range(FLOOD):
                await events.publish(aio_pika.Message(b"{no JSON %d" % number), "all.job.completed", mandatory=False)
                if number % 100 == 0:
                    event = json.dumps(cloudevent(f"e{number}")).encode()
                    await events.publish(aio_pika.Message(event), "user.innocent.job.completed", mandatory=False)
        # Then a message that is refused for another reason: a person will look for this one.
        await vhost.publish("all.job.completed", b'["hello"]')
        async with asyncio.timeout(PATIENCE):
            while await service.metric('bridge_events_invalid_total{reason="not-a-cloudevent"}') < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # A metric can only be polled.
    assert await innocent.ids(FLOOD // 100) == [f"e{number}" for number in range(0, FLOOD, 100)]
    refused = await service.metric('bridge_events_invalid_total{reason="malformed"}')
    assert refused == FLOOD
    dropped = await service.metric("bridge_quarantine_dropped_total")
    kept = await quarantined(vhost, FLOOD + 1 - int(dropped))
    reasons = Counter(str(message.headers["x-reason"]) for message in kept)
    assert reasons == {"malformed": FLOOD - dropped, "not-a-cloudevent": 1}
    # All of them are in the log output: as a line of their own, or counted in another line.
    service.signal(signal.SIGTERM)
    assert await service.ended() == 0
    for name, expected in (("message refused", FLOOD + 1), ("message not quarantined", dropped)):
        lines = [line for line in service.lines if line["event"] == name]
        # A line that only counts others has no routing key.
        assert sum(line["left_out"] + ("routing_key" in line) for line in lines) == expected
        assert len(lines) < FLOOD / 10


async def test_rabbitmq_itself_refuses_large_bodies_with_our_configuration(node: Node, tmp_path: Path) -> None:
    limited = Node(tmp_path / "limited", rabbitmq=node.rabbitmq)
    configuration = tmp_path / "limited" / "rabbitmq.conf"
    ours = Path(__file__).parents[2] / "deploy" / "rabbitmq" / "rabbitmq.conf"
    configuration.write_text(configuration.read_text() + ours.read_text())
    try:
        limited.start()
        async with await aio_pika.connect(limited.url) as connection:
            channel = await connection.channel()
            await channel.default_exchange.publish(aio_pika.Message(b"x" * 131_072), "nobody", mandatory=False)
            with pytest.raises(aio_pika.exceptions.ChannelPreconditionFailed, match="131072"):
                await channel.default_exchange.publish(aio_pika.Message(b"x" * 131_073), "nobody", mandatory=False)
    finally:
        limited.remove()
