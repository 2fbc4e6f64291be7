"""Resuming from the log: in order and everything once, or a gap."""

from __future__ import annotations

import asyncio
import signal

import pytest

from bridge import Publisher
from bridge.samples.jobs import JobProgress
from deploy.local.node import Node
from tests.bench.publish import close as close_publisher
from tests.bench.publish import connect as raw_publisher
from tests.bench.publish import message
from tests.client import Stream
from tests.conftest import Eventually, OpenStream, StartService
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost, cloudevent
from tests.service import Service

USER = "user.42.job.completed"
GROUP = "group.ops.job.completed"
ALL = "all.job.completed"


def numbered(key: str, first: int, last: int, prefix: str = "e") -> list[tuple[str, bytes | dict[str, object]]]:
    return [(key, cloudevent(f"{prefix}{n}")) for n in range(first, last)]


async def come_back(service: Service, connect: OpenStream, cursor: str, *, query: str = "") -> Stream:
    return await connect(service, "42", "ops", query=query, headers={"Last-Event-ID": cursor}, ready=False)


@pytest.mark.contract("2.33")
async def test_missed_events_come_in_order_and_then_live_ones(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    stream = await connect(service, "42", "ops")
    await vhost.publish_all(numbered(USER, 0, 5))
    assert await stream.ids(5) == [f"e{n}" for n in range(5)]
    cursor = stream.frames[-1].id
    await stream.close()
    await vhost.publish_all(
        [*numbered(USER, 5, 10), ("user.43.job.completed", cloudevent("not-mine")), *numbered(GROUP, 10, 12)]
    )
    again = await come_back(service, connect, cursor)
    ready = await again.next()
    assert (ready.event, ready.json["resumed"], ready.id) == ("bridge.ready", True, cursor)
    assert await again.ids(7) == [f"e{n}" for n in range(5, 12)]
    await vhost.publish_all(numbered(USER, 12, 14))
    assert await again.ids(2) == ["e12", "e13"]
    assert [frame.event for frame in again.frames].count("bridge.gap") == 0
    assert await service.metric('bridge_replays_total{outcome="complete"}') == 1


@pytest.mark.contract("2.39")
async def test_a_client_can_be_cut_after_every_single_event(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    stream = await connect(service, "42", "ops")
    cursor = stream.frames[0].id
    await stream.close()
    await vhost.publish_all(numbered(USER, 0, 30))
    for number in range(30):
        stream = await come_back(service, connect, cursor)
        assert (await stream.next()).json["resumed"] is True
        assert await stream.ids(1) == [f"e{number}"]
        cursor = stream.frames[1].id
        await stream.close()


@pytest.mark.contract("2.39")
async def test_a_client_resumes_at_any_replica(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    one, two = await start(), await start()
    stream = await connect(one, "42", "ops")
    await vhost.publish_all(numbered(USER, 0, 40))
    await stream.ids(40)
    cursor = stream.frames[25].id  # As if the rest had been lost in the network.
    await vhost.publish_all(numbered(ALL, 40, 45))
    one.signal(signal.SIGKILL)
    again = await come_back(two, connect, cursor)
    assert (await again.ready()).json["resumed"] is True
    assert await again.ids(20) == [f"e{n}" for n in range(25, 45)]


async def test_types_are_filtered_in_the_log_as_they_are_live(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    stream = await connect(service, "42", query="types=notification")
    cursor = stream.frames[0].id
    await stream.close()
    await vhost.publish_all([(USER, cloudevent("j")), ("all.notification", cloudevent("n", "notification", title="x"))])
    again = await come_back(service, connect, cursor, query="types=notification")
    await again.ready()
    assert await again.ids(1) == ["n"]


@pytest.mark.contract("2.37")
@pytest.mark.parametrize(
    ("cursor", "reason"),
    [
        ("garbage", "unknown"),
        ("0.19b5f0c2a10", "unknown"),
        ("2.0.AAAAAA.", "unknown"),
        ("2.fffffffffffffff.AAAAAA.", "unknown"),
        ("2.1.AAAAAA.~BBBBBB", "unknown"),
    ],
)
async def test_hostile_cursors_get_a_gap_and_then_live_events(
    service: Service, vhost: Vhost, connect: OpenStream, cursor: str, reason: str
) -> None:
    await vhost.publish_all(numbered("user.43.job.completed", 0, 10))
    stream = await come_back(service, connect, cursor)
    assert (await stream.next()).json["resumed"] is False
    gap = await stream.next()
    assert (gap.event, gap.json) == ("bridge.gap", {"reason": reason})
    await vhost.publish(USER, cloudevent("e1"))
    assert await stream.ids(1) == ["e1"]


@pytest.mark.contract("2.37")
async def test_a_cursor_of_another_user_discloses_nothing(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    victim = await connect(service, "43", "dev")
    cursor = victim.frames[0].id
    await vhost.publish_all([*numbered("user.43.job.completed", 0, 5), *numbered("group.dev.job.completed", 5, 9)])
    await victim.ids(9)
    await vhost.publish(USER, cloudevent("mine"))
    attacker = await come_back(service, connect, cursor)
    await attacker.ready()
    assert await attacker.ids(1) == ["mine"]
    assert b"e0" not in attacker.raw.replace(cursor.encode(), b"")


async def test_a_log_that_no_longer_has_the_position_is_a_gap(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start(LOG_MAX_BYTES="1000000")
    stream = await connect(service, "42", "ops")
    cursor = stream.frames[0].id
    await stream.close()
    # RabbitMQ shortens a stream by whole segments, and no setting of the bridge makes them small. So delete the log.
    vhost.delete_queue("events.log")
    again = await come_back(service, connect, cursor)
    frames = [await again.next() for _ in range(2)]
    assert [frame.event for frame in frames] == ["bridge.ready", "bridge.gap"]
    # The bridge makes a new log, and later clients resume from it.
    async with asyncio.timeout(PATIENCE):
        while (cursor := (await connect(service)).frames[0].id).startswith("0."):
            pass
    await vhost.publish(USER, cloudevent("e1"))
    last = await come_back(service, connect, cursor)
    assert (await last.ready()).json["resumed"] is True
    assert await last.ids(1) == ["e1"]


@pytest.mark.contract("1.19")
async def test_without_a_log_every_return_is_a_gap(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start(LOG="")
    assert "events.log" not in vhost.queues()
    stream = await connect(service, "42")
    cursor = stream.frames[0].id
    again = await come_back(service, connect, cursor)
    assert (await again.next()).json["resumed"] is False
    assert (await again.next()).json == {"reason": "no-log"}


async def test_a_client_far_behind_gets_events_in_parts_and_stays_connected(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start(BACKLOG_EVENTS="20")
    stream = await connect(service, "42", "ops")
    cursor = stream.frames[0].id
    await stream.close()
    await vhost.publish_all(numbered(USER, 0, 500))
    again = await connect(service, "42", "ops", headers={"Last-Event-ID": cursor}, receive_buffer=4096, ready=False)
    assert (await again.ready()).json["resumed"] is True
    assert await again.ids(250) == [f"e{n}" for n in range(250)]
    # More live events arrive meanwhile than may be buffered: they come from the log as well.
    await vhost.publish_all(numbered(USER, 500, 600))
    assert await again.ids(350) == [f"e{n}" for n in range(250, 600)]
    await vhost.publish_all(numbered(USER, 600, 605))
    assert await again.ids(5) == [f"e{n}" for n in range(600, 605)]


async def test_ten_clients_at_once_share_a_scan(
    start: StartService, vhost: Vhost, proxy: Proxy, connect: OpenStream
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port))
    stream = await connect(service, "42", "ops")
    cursor = stream.frames[0].id
    await vhost.publish_all(numbered(USER, 0, 200))
    assert await stream.ids(200) == [f"e{n}" for n in range(200)]
    # RabbitMQ answers none of them until all are there. So they arrive at once, even on a slow machine.
    proxy.stall()
    opening = [asyncio.create_task(come_back(service, connect, cursor)) for _ in range(10)]
    async with asyncio.timeout(PATIENCE):
        while await service.metric("bridge_connections") < 11:
            pass
    proxy.flow()
    for again in await asyncio.gather(*opening):
        await again.ready()
        assert await again.ids(200) == [f"e{n}" for n in range(200)]
    assert await service.metric("bridge_log_passes") <= 6


@pytest.mark.contract("5.46")
@pytest.mark.parametrize("fault", ["cut", "operator", pytest.param("queue", marks=pytest.mark.queues)])
async def test_a_lost_queue_is_invisible(
    vhost: Vhost, proxy: Proxy, start: StartService, connect: OpenStream, eventually: Eventually, fault: str
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port))
    stream = await connect(service, "42", "ops")
    await vhost.publish_all(numbered(USER, 0, 10))
    await stream.ids(10)
    if fault == "cut":
        await proxy.refuse()
        proxy.cut()
        await service.logged("broker unavailable")
        await vhost.publish_all([*numbered(USER, 10, 20), *numbered(GROUP, 20, 25)])
        await proxy.open()
    elif fault == "operator":
        await eventually(lambda: vhost.close_connections() > 0)
        await vhost.publish_all([*numbered(USER, 10, 20), *numbered(GROUP, 20, 25)])
    else:
        vhost.delete_bound_queue("user.42.#")
        await vhost.publish_all([*numbered(USER, 10, 20), *numbered(GROUP, 20, 25)])
    assert sorted(await stream.ids(15), key=lambda name: int(name[1:])) == [f"e{n}" for n in range(10, 25)]
    await vhost.publish_all(numbered(ALL, 25, 27))
    assert await stream.ids(2) == ["e25", "e26"]
    assert [frame.event for frame in stream.frames].count("bridge.gap") == 0


async def test_a_memory_alarm_stops_publishers_but_no_stream(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    stream = await connect(service, "42", "ops")
    await vhost.publish_all(numbered(USER, 0, 5))
    cursor = stream.frames[0].id
    vhost.node.ctl("set_vm_memory_high_watermark", "0.00000001")
    try:
        again = await come_back(service, connect, cursor)
        assert (await again.ready()).json["resumed"] is True
        assert await again.ids(5) == [f"e{n}" for n in range(5)]
        fresh = await connect(service, "42", "ops")
    finally:
        vhost.node.ctl("set_vm_memory_high_watermark", "absolute", "2GB")
    await vhost.publish_all(numbered(USER, 5, 7))
    assert await again.ids(2) == ["e5", "e6"]
    assert await fresh.ids(2) == ["e5", "e6"]


@pytest.mark.contract("5.30")
async def test_what_is_confirmed_while_a_broker_starts_is_in_the_log(
    service: Service, vhost: Vhost, node: Node, connect: OpenStream, eventually: Eventually
) -> None:
    """RabbitMQ 3.10 accepts connections, and confirms, before it has recovered its streams."""
    stream = await connect(service, "42")
    cursor = stream.frames[0].id
    await stream.close()
    node.flush()
    confirmed: list[str] = []

    async def publish(number: int) -> None:
        publisher = Publisher(vhost.url, source=f"/test/{number}", timeout=PATIENCE)
        try:
            while True:
                confirmed.append(await publisher.to_all(JobProgress(job_id="r-7", percent=1)))
        finally:
            await publisher.close()

    publishing = [asyncio.create_task(publish(number)) for number in range(4)]
    await eventually(lambda: len(confirmed) >= 100)
    await asyncio.to_thread(node.kill)
    before = len(confirmed)
    await asyncio.to_thread(node.start)
    await eventually(lambda: len(confirmed) >= before + 100)
    for task in publishing:
        task.cancel()
    await asyncio.gather(*publishing, return_exceptions=True)
    await service.logged("broker connected", count=2)
    again = await come_back(service, connect, cursor)
    await again.ready()
    missing = set(confirmed)
    while missing:
        missing.discard((await again.next_event())["id"])
    assert [frame.event for frame in again.frames].count("bridge.gap") == 0


@pytest.mark.contract("5.32")
async def test_a_page_that_closes_loses_no_publisher_an_event(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    """If a queue is deleted, RabbitMQ nacks messages on their way to it, or (4.3) closes the publisher's connection."""
    service = await start(MAX_CONNECTIONS_PER_USER="100")
    first = await connect(service, "42")
    cursor = first.frames[0].id
    await first.close()
    confirmed: list[str] = []

    async def publish(number: int) -> None:
        async with Publisher(vhost.url, source=f"/test/{number}", timeout=PATIENCE) as publisher:
            while True:
                confirmed.append(await publisher.to_user("42", JobProgress(job_id="r-7", percent=1)))

    publishing = [asyncio.create_task(publish(number)) for number in range(4)]
    for _ in range(60):
        (await connect(service, "42")).abort()
    for task in publishing:
        task.cancel()
    results = await asyncio.gather(*publishing, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 4
    again = await connect(service, "42", headers={"Last-Event-ID": cursor}, ready=False)
    await again.ready()
    missing = set(confirmed)
    while missing:
        missing.discard((await again.next_event())["id"])
    assert [frame.event for frame in again.frames].count("bridge.gap") == 0


@pytest.mark.parametrize("gives_up", [False, True], ids=["arrives", "gives up"])
async def test_a_scan_from_far_behind_waits_for_expected_clients(
    start: StartService, vhost: Vhost, connect: OpenStream, eventually: Eventually, *, gives_up: bool
) -> None:
    # The batch window must not end by time during the test.
    endless = 10 * PATIENCE
    window = {"service.broker.scans.WINDOW_SECONDS": endless, "service.broker.scans.WINDOW_SECONDS_PER_USER": endless}
    service = await start(deadlines=window)
    cursors = {}
    for user in ("42", "43"):
        stream = await connect(service, user)
        cursors[user] = stream.frames[0].id
        await stream.close()

    def fill() -> None:
        broker = raw_publisher(vhost.port, vhost.name)
        for at in range(0, 25_000, 1_000):
            broker.sendall(b"".join(message("user.other.job.progress", n) for n in range(at, at + 1_000)))
        close_publisher(broker)

    await asyncio.to_thread(fill)
    for user in cursors:
        await vhost.publish(f"user.{user}.job.completed", cloudevent(f"for-{user}"))
    # Each group is one more request to the broker. So the other client is bound first.
    groups = [f"g{number}" for number in range(400)]
    late = await connect(service, "43", *groups, headers={"Last-Event-ID": cursors["43"]}, ready=False)
    early = await connect(service, "42", headers={"Last-Event-ID": cursors["42"]}, ready=False)
    if gives_up:
        await late.close()
    assert await early.ids(1) == ["for-42"]
    if not gives_up:
        assert await late.ids(1) == ["for-43"]

    def far_scans() -> list[int]:
        return [line["readers"] for line in service.lines if line["event"] == "log read" and line["entries"] > 20_000]

    await eventually(lambda: len(far_scans()) > 0)
    assert far_scans() == [1 if gives_up else 2]
