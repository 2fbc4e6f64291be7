"""The feed `log`: one reader of the event log for all streams of a process. Also both feeds in one installation."""

from __future__ import annotations

import pytest

from tests.client import Stream
from tests.conftest import Eventually, OpenStream, StartService
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost, cloudevent
from tests.service import Service

USER = "user.42.job.completed"
OTHER = "user.43.job.completed"
GROUP = "group.ops.job.completed"
ALL = "all.job.completed"

SHORT_CHECKS = {"service.broker.tail.EXCHANGE_CHECK_SECONDS": 0.2}


async def come_back(service: Service, connect: OpenStream, cursor: str) -> Stream:
    return await connect(service, "42", "ops", headers={"Last-Event-ID": cursor}, ready=False)


def gaps(stream: Stream) -> list[str]:
    return [frame.json["reason"] for frame in stream.frames if frame.event == "bridge.gap"]


@pytest.mark.contract("8.1", "8.2")
async def test_each_stream_gets_its_events_and_no_queue(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start(FEED="log")
    stream = await connect(service, "42", "ops")
    filtered = await connect(service, "42", query="types=billing.%23")
    other = await connect(service, "44")
    assert sorted(vhost.queues()) == ["events.invalid", "events.log"]
    await vhost.publish_all(
        [
            (USER, cloudevent("own")),
            (OTHER, cloudevent("other")),
            (GROUP, cloudevent("group")),
            (ALL, cloudevent("all")),
            ("user.42.billing.notice", cloudevent("bill", "billing.notice", kind="invoice_issued")),
        ]
    )
    assert await stream.ids(4) == ["own", "group", "all", "bill"]
    assert await other.ids(1) == ["all"]
    assert await filtered.ids(1) == ["bill"]


@pytest.mark.contract("8.2")
async def test_missed_events_come_in_order_and_then_live_ones(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start(FEED="log")
    stream = await connect(service, "42", "ops")
    await vhost.publish(USER, cloudevent("e0"))
    assert await stream.ids(1) == ["e0"]
    await stream.close()
    await vhost.publish_all([(GROUP, cloudevent(f"e{n}")) for n in range(1, 40)])
    again = await come_back(service, connect, stream.frames[-1].id)
    assert await again.ids(39) == [f"e{n}" for n in range(1, 40)]
    await vhost.publish(ALL, cloudevent("live"))
    assert await again.ids(1) == ["live"]
    assert gaps(again) == []


@pytest.mark.contract("8.3")
async def test_each_feed_reads_the_cursors_of_the_other(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    services = [await start(FEED="queues"), await start(FEED="log")]
    cursor = (await connect(services[0], "42", "ops")).frames[0].id
    published = seen = 0
    for turn in range(8):
        stream = await come_back(services[turn % 2], connect, cursor)
        await stream.ready()
        for _ in range(3):
            await vhost.publish(USER, cloudevent(f"e{published}"))
            published += 1
        # The last event may be missed, and then comes by the next process.
        await stream.ids(published - 1 - seen)
        await stream.close()
        events = [frame.json["id"] for frame in stream.frames if not frame.event.startswith("bridge.")]
        assert events == [f"e{n}" for n in range(seen, seen + len(events))], "each once, in order"
        assert gaps(stream) == []
        cursor, seen = stream.frames[-1].id, seen + len(events)


@pytest.mark.contract("8.4")
async def test_a_lost_connection_is_no_gap(
    start: StartService, vhost: Vhost, proxy: Proxy, connect: OpenStream
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port), FEED="log", HEARTBEAT_SECONDS="0.2")
    stream = await connect(service, "42", "ops")
    # The last entry is not for the stream, which has everything up to it all the same.
    await vhost.publish_all([(USER, cloudevent("before")), (OTHER, cloudevent("others-1"))])
    other = await connect(service, "43")
    await vhost.publish(OTHER, cloudevent("others-2"))
    assert (await stream.ids(1), await other.ids(1)) == (["before"], ["others-2"])
    await proxy.refuse()
    proxy.cut()
    assert (await stream.until("bridge.status")).json == {"receiving": False}
    await vhost.publish(USER, cloudevent("meanwhile"))
    await proxy.open()
    assert (await stream.until("bridge.status")).json == {"receiving": True}
    await vhost.publish(GROUP, cloudevent("after"))
    assert await stream.ids(2) == ["meanwhile", "after"]
    assert gaps(stream) == []
    assert await service.metric("bridge_log_passes") == 0, "the reader goes on, and no stream needs a read of its own"


@pytest.mark.contract("8.5")
@pytest.mark.parametrize("what", ["log", "exchange"])
async def test_events_that_the_log_has_lost_are_a_gap(
    start: StartService, vhost: Vhost, connect: OpenStream, what: str
) -> None:
    service = await start(FEED="log", deadlines=SHORT_CHECKS)
    stream = await connect(service, "42", "ops")
    await vhost.publish(USER, cloudevent("before"))
    assert await stream.ids(1) == ["before"]
    if what == "log":
        vhost.delete_queue("events.log")
    else:
        vhost.delete_exchange("events")
    await stream.until("bridge.gap")
    await vhost.publish(USER, cloudevent("after"))
    assert await stream.ids(1) == ["after"]


@pytest.mark.contract("8.6")
async def test_a_refused_message_is_quarantined_once(
    start: StartService, vhost: Vhost, connect: OpenStream, eventually: Eventually
) -> None:
    service = await start(FEED="log")
    streams = [await connect(service, "42"), await connect(service, "43")]
    refused = [b'{"number": 1}', b'{"number": 2}']
    await vhost.publish_all([(ALL, refused[0]), (ALL, cloudevent("good")), (ALL, refused[1])])
    for stream in streams:
        assert await stream.ids(1) == ["good"]
    await eventually(lambda: vhost.count("events.invalid") >= len(refused))
    assert [message.body for message in await vhost.take("events.invalid")] == refused


@pytest.mark.contract("8.7")
async def test_the_right_to_read_the_log_is_enough(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    await (await start()).stop()  # It declares exchange, quarantine and log.
    user = f"reader-{vhost.name}"
    vhost.add_user(user)
    try:
        vhost.grant(user, configure="^$", write=r"^amq\.default$", read=r"^events\.log$")
        address = vhost.url_at(vhost.node.port, user=user, password="secret-" + user)
        service = await start(amqp_url=address, FEED="log", deadlines=SHORT_CHECKS)
        stream = await connect(service, "42", "ops")
        await vhost.publish(GROUP, cloudevent("e0"))
        await vhost.publish(USER, b"{")
        assert await stream.ids(1) == ["e0"]
        again = await come_back(service, connect, stream.frames[0].id)
        assert await again.ids(1) == ["e0"]
        await vhost.publish(USER, cloudevent("e1"))
        assert await again.ids(1) == ["e1"]
        assert await service.metric("bridge_broker_connects") == 1
        assert gaps(stream) == []
    finally:
        vhost.delete_user(user)


@pytest.mark.contract("8.9")
@pytest.mark.parametrize("notices", ["queues", "log"])
async def test_a_process_of_the_other_feed_hears_of_a_deleted_exchange(
    start: StartService, vhost: Vhost, connect: OpenStream, notices: str
) -> None:
    other = "log" if notices == "queues" else "queues"
    never = {f"service.broker.{name}.EXCHANGE_CHECK_SECONDS": 1000 * PATIENCE for name in ("tail", "live")}
    soon = {f"service.broker.{name}.EXCHANGE_CHECK_SECONDS": 0.2 for name in ("tail", "live")}
    services = [await start(FEED=notices, deadlines=soon), await start(FEED=other, deadlines=never)]
    streams = [await connect(service, "42", "ops") for service in services]
    vhost.delete_exchange("events")
    for stream in streams:
        assert (await stream.until("bridge.gap")).json == {"reason": "no-log"}
    for number, stream in enumerate(streams):
        await vhost.publish(USER, cloudevent(f"e{number}"))
        assert f"e{number}" in await stream.ids(1 + number)


async def test_a_publisher_cannot_report_a_deletion(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    """Every publisher can put a message with any routing key into the log."""
    service = await start(FEED="log")
    stream = await connect(service, "42")
    await vhost.publish_all([("events.log", b'["events", "other", 0.1, "proof"]'), (USER, cloudevent("e0"))])
    assert await stream.ids(1) == ["e0"]
    assert gaps(stream) == []
    assert await service.metric("bridge_broker_connects") == 1
