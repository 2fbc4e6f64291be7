"""The bridge notices messages that a policy or an expiration drops from its queues, and reads them from the log."""

from __future__ import annotations

import json
import signal
from typing import Any

import aio_pika
import pytest

from tests.conftest import OpenStream, StartService
from tests.rabbit import Vhost, cloudevent

COUNT = 3_000


async def publish_burst(vhost: Vhost, **properties: Any) -> None:
    connection = await aio_pika.connect(vhost.url_at(vhost.node.port))
    # Closing the connection drops what is not yet written; so close the channel first, which waits for it.
    async with connection, connection.channel(publisher_confirms=False) as channel:
        target = await channel.get_exchange("events", ensure=False)
        for number in range(COUNT):
            key = ("user.42", "all", "group.ops")[number % 3]
            message = aio_pika.Message(json.dumps(cloudevent(f"e{number}")).encode(), **properties)
            await target.publish(message, f"{key}.job.completed", mandatory=False)


@pytest.mark.queues
@pytest.mark.contract("1.18", "5.29")
@pytest.mark.parametrize("cause", ["max-length", "max-length-bytes", "message-ttl", "expiration"])
async def test_what_is_dropped_while_the_bridge_is_slow_comes_from_the_log(
    start: StartService, vhost: Vhost, connect: OpenStream, cause: str
) -> None:
    service = await start(BACKLOG_EVENTS="10000", BACKLOG_BYTES="10000000")
    streams = [await connect(service, "42", "ops"), await connect(service, "43", "ops")]
    limits: dict[str, int] = {"max-length": 100, "max-length-bytes": 10_000, "message-ttl": 1}
    # The policy is added while the queues exist, as policies are. It does not apply to the log, which is a stream.
    if cause in limits:
        vhost.set_policy("all-queues", **{cause: limits[cause]})
    service.signal(signal.SIGSTOP)  # A pause, as by throttling of its processor.
    try:
        await publish_burst(vhost, **({"expiration": 0.001} if cause == "expiration" else {}))
    finally:
        service.signal(signal.SIGCONT)
    for stream, expected in zip(streams, [range(COUNT), [n for n in range(COUNT) if n % 3]], strict=True):
        missing = {f"e{number}" for number in expected}
        while missing:
            frame = await stream.next()
            assert frame.event != "bridge.gap", frame
            if not frame.event.startswith("bridge."):
                missing.discard(frame.json["id"])
    line = await service.logged("messages dropped by the broker")
    assert line["count"] > 0
    assert "Exempt queues named bridge.*" in line["detail"]
    assert await service.metric("bridge_broker_dropped") > 0


@pytest.mark.contract("5.29")
async def test_without_a_log_it_is_a_gap(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start(LOG="", BACKLOG_EVENTS="10000", BACKLOG_BYTES="10000000")
    stream = await connect(service, "42", "ops")
    vhost.set_policy("all-queues", **{"max-length": 100})
    service.signal(signal.SIGSTOP)
    try:
        await publish_burst(vhost)
    finally:
        service.signal(signal.SIGCONT)
    gap = await stream.until("bridge.gap")
    assert gap.json == {"reason": "no-log"}
