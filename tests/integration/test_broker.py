"""The broker stops, restarts, deletes queues or refuses. Streams stay open, and events flow again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from bridge.service.broker.feed import Deletion
from bridge.service.settings import Settings
from deploy.local.node import Installation, Node
from tests import certificate
from tests.client import Stream
from tests.conftest import Eventually, OpenStream, StartService
from tests.patience import PATIENCE
from tests.proxy import TURNS, Proxy
from tests.rabbit import Vhost, cloudevent
from tests.raw_amqp import publish_raw, short_string, table
from tests.service import SECRET, Service


@pytest.fixture
def own_vhost(tmp_path_factory: pytest.TempPathFactory, rabbitmq: Installation) -> Iterator[Vhost]:
    """A virtual host on a node that only this test uses, and may kill."""
    node = Node(tmp_path_factory.mktemp("own-node"), management=True, rabbitmq=rabbitmq)
    try:
        node.start()
        vhost = Vhost(node)
        vhost.create()
        yield vhost
        vhost.close()
    finally:
        node.remove()


async def assert_flows_again(stream: Stream, vhost: Vhost, event_id: str, *, gaps: int = 0) -> None:
    """Asserts that the stream is live again, with so many gaps since its start."""
    await vhost.publish("user.42.job.completed", cloudevent(event_id))
    await vhost.publish("group.ops.job.completed", cloudevent(event_id + "-group"))
    await vhost.publish("all.job.completed", cloudevent(event_id + "-all"))
    assert set(await stream.ids(3)) == {event_id, event_id + "-group", event_id + "-all"}
    assert [frame.event for frame in stream.frames].count("bridge.gap") == gaps


@pytest.mark.contract("2.12", "2.30", "2.52", "2.74")
async def test_a_broker_killed_and_started_again_is_invisible(
    own_vhost: Vhost, start: StartService, connect: OpenStream
) -> None:
    vhost = own_vhost
    service = await start(amqp_url=vhost.url, BROKER_GRACE_SECONDS="1")
    streams = [await connect(service, "42", "ops") for _ in range(20)]
    await vhost.publish("user.42.job.completed", cloudevent("before"))
    for stream in streams:
        assert await stream.ids(1) == ["before"]
    vhost.node.flush()
    vhost.node.kill()
    await service.logged("broker unavailable")
    async with asyncio.timeout(PATIENCE):
        while (await service.get("/readyz", internal=True)).status_code != 503:  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # Between two polls.
    assert (await service.get("/livez", internal=True)).status_code == 200
    assert (await service.get("/readyz?exclude=broker", internal=True)).status_code == 200
    assert await service.metric("bridge_broker_connected") == 0
    # A client that arrives now waits for a moment and then gets `busy`.
    late = await connect(service, "43", ready=False)
    assert [frame.json for frame in await late.rest()] == [{"reason": "busy"}]

    vhost.node.start()
    await service.logged("broker connected", count=2)
    await vhost.publish("user.42.job.completed", cloudevent("after"))
    await vhost.publish("group.ops.job.completed", cloudevent("after-group"))
    for stream in streams:
        assert set(await stream.ids(2)) == {"after", "after-group"}
        assert "bridge.gap" not in [frame.event for frame in stream.frames]
    assert (await service.get("/readyz", internal=True)).status_code == 200
    assert await service.metric("bridge_connections") == 20


@pytest.mark.contract("2.31")
async def test_a_connection_cut_by_the_network(
    vhost: Vhost, proxy: Proxy, start: StartService, connect: OpenStream
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port))
    stream = await connect(service, "42", "ops")
    for number in range(3):
        proxy.cut()
        await assert_flows_again(stream, vhost, f"e{number}")


async def test_a_connection_closed_by_an_operator(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42", "ops")
    async with asyncio.timeout(PATIENCE):
        while not vhost.close_connections():  # noqa: ASYNC110 - the API shows connections some seconds late.
            await asyncio.sleep(0.2)  # Between two polls.
    await assert_flows_again(stream, vhost, "e1")


@pytest.mark.contract("2.31")
async def test_heartbeats_detect_a_network_that_drops_everything(
    vhost: Vhost, proxy: Proxy, start: StartService, connect: OpenStream
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port) + "?heartbeat=2")
    stream = await connect(service, "42", "ops")
    proxy.stall()
    await service.logged("broker unavailable")
    proxy.cut()
    proxy.flow()
    await assert_flows_again(stream, vhost, "e1")


@pytest.mark.queues
async def test_a_live_queue_deleted_by_an_operator(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42", "ops")
    other = await connect(service, "43")
    vhost.delete_bound_queue("user.42.#")
    await assert_flows_again(stream, vhost, "e1")
    await vhost.publish("user.43.job.completed", cloudevent("unharmed"))
    assert "bridge.gap" not in [frame.event for frame in other.frames]


@pytest.mark.queues
async def test_the_shared_queue_deleted_by_an_operator(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42", "ops")
    vhost.delete_bound_queue("all.#")
    await assert_flows_again(stream, vhost, "e1")


@pytest.mark.parametrize("noticed_by", ["new stream", "check"])
async def test_the_exchange_deleted_by_an_operator_is_made_again_with_all_bindings(
    service: Service, vhost: Vhost, connect: OpenStream, noticed_by: str
) -> None:
    old = await connect(service, "42", "ops")
    vhost.delete_exchange("events")
    if noticed_by == "new stream":
        new = await connect(service, "43", ready=False)
        assert (await new.next()).event == "bridge.ready"
    await service.logged("broker connected", count=2)
    # The bridge cannot prove that nothing was published before the queues were bound again.
    assert (await old.until("bridge.gap")).json == {"reason": "no-log"}
    await assert_flows_again(old, vhost, "e1", gaps=1)


@pytest.mark.contract("5.76", "5.77")
async def test_each_replica_is_notified_of_a_deleted_exchange(
    vhost: Vhost, start: StartService, connect: OpenStream
) -> None:
    """One replica notices that it is gone and makes it again. The other finds it there, without its own bindings."""
    never = {"service.broker.live.EXCHANGE_CHECK_SECONDS": 1000 * PATIENCE}
    services = [await start(), await start(deadlines=never)]
    streams = [await connect(service, "42", "ops") for service in services]
    cursor = streams[0].frames[0].id
    vhost.delete_exchange("events")
    for service, stream in zip(services, streams, strict=True):
        await service.logged("broker connected", count=2)
        # It cannot prove that nothing was published before its queues were bound again.
        assert (await stream.until("bridge.gap")).json == {"reason": "no-log"}
    for number, stream in enumerate(streams):
        # The other stream may be bound a moment later: each gets an event of its own.
        await vhost.publish("user.42.job.completed", cloudevent(f"e{number}"))
        assert f"e{number}" in await stream.ids(1 + number)
    # A notice about another bridge's exchange on this virtual host changes nothing, and an old notice neither.
    key = Settings(jwt_secret=SecretStr(SECRET)).identity_key
    for news in (Deletion("parcels", "other", 0.1), Deletion("events", "other", 1e9)):
        await vhost.publish("bridge.exchange-gone", news.write(key), exchange="bridge.replicas")
    back = await connect(services[1], "42", "ops", headers={"Last-Event-ID": cursor}, ready=False)
    assert [(await back.next()).event for _ in range(2)] == ["bridge.ready", "bridge.gap"]
    assert [await service.metric("bridge_broker_connects") for service in services] == [2, 2]


ODD = {
    "timestamp in nanoseconds": (1 << 6, struct.pack(">Q", time.time_ns())),
    "timestamp of all ones": (1 << 6, b"\xff" * 8),
    "header with a time in nanoseconds": (
        1 << 13,
        table(short_string(b"at") + b"T" + struct.pack(">Q", time.time_ns())),
    ),
    "header name that is no text": (1 << 13, table(short_string(b"\xff") + b"I" + struct.pack(">i", 1))),
    "content type that is no text": (1 << 15, short_string(b"\xff\xfe")),
}


@pytest.mark.contract("1.15")
async def test_no_property_of_a_message_breaks_the_connection_or_the_log(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    stream = await connect(service, "42")
    cursor = stream.frames[0].id
    for number, (flags, properties) in enumerate(ODD.values()):
        body = json.dumps(cloudevent(f"odd{number}")).encode()
        await publish_raw(
            vhost.node.port, vhost.name, key=b"user.42.job.completed", body=body, flags=flags, properties=properties
        )
    assert await stream.ids(len(ODD)) == [f"odd{number}" for number in range(len(ODD))]
    await publish_raw(vhost.node.port, vhost.name, key=b"all.\xff", body=b"{}")
    await service.logged("message refused", routing_key="all.?")
    assert await service.metric("bridge_broker_connects") == 1
    again = await connect(service, "42", headers={"Last-Event-ID": cursor})
    assert await again.ids(len(ODD)) == [f"odd{number}" for number in range(len(ODD))]


async def test_a_group_that_ends_and_starts_at_the_same_moment_is_bound(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    for attempt in range(10):
        leaving = await connect(service, "a", *(f"g{n:02}" for n in range(8)), "zz")
        leaving.abort()
        await service.logged("stream ended", count=attempt * 2 + 1)
        stream = await connect(service, "b", "zz")
        await vhost.publish("group.zz.job.completed", cloudevent(f"e{attempt}"))
        assert await stream.ids(1) == [f"e{attempt}"]
        await stream.close()
        await service.logged("stream ended", count=attempt * 2 + 2)


async def test_after_a_reconnect_each_stream_has_all_its_groups(
    vhost: Vhost, proxy: Proxy, start: StartService, connect: OpenStream
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port))
    # The shared queue's groups are bound one after another, and each stream waits for the last of its own.
    groups = [[f"g{number}" for number in range(first, first + first % 4)] for first in range(12)]
    streams = [await connect(service, f"u{first}", *groups[first]) for first in range(12)]
    proxy.cut()
    await service.logged("broker connected", count=2)
    # Twice, because the first events may come from the log: they may be published before the groups are bound.
    for turn in "once", "again":
        await vhost.publish_all(
            [(f"group.g{number}.job.completed", cloudevent(f"g{number}-{turn}")) for number in range(15)]
        )
        await vhost.publish("all.job.completed", cloudevent(f"all-{turn}"))
        for stream, mine in zip(streams, groups, strict=True):
            expected = {f"{group}-{turn}" for group in [*mine, "all"]}
            assert set(await stream.ids(len(expected))) == expected


@pytest.mark.parametrize("feed", ["queues", "log"])
async def test_connections_cut_again_while_they_reconnect(
    vhost: Vhost, proxy: Proxy, start: StartService, connect: OpenStream, feed: str
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port), FEED=feed)
    stream = await connect(service, "42", "ops")
    for milliseconds in range(0, 40, 2):
        accepted = proxy.accepted
        proxy.cut()
        async with asyncio.timeout(PATIENCE):
            while proxy.accepted == accepted:  # noqa: ASYNC110
                await asyncio.sleep(0.001)  # Between two polls.
        await asyncio.sleep(milliseconds / 1000)  # The fault: a cut at another point each time.
    proxy.cut()
    await assert_flows_again(stream, vhost, "e1")


async def test_the_bridge_waits_for_a_broker_that_is_not_there_yet(
    vhost: Vhost, proxy: Proxy, start: StartService, connect: OpenStream
) -> None:
    await proxy.refuse()
    service = await start(amqp_url=vhost.url_at(proxy.port), ready=False)
    await service.logged("broker unavailable", count=3)
    ready = await service.get("/readyz", internal=True)
    assert ready.status_code == 503
    assert "starting" in ready.json()["reason"]
    await proxy.open()
    await service.logged("broker connected")
    await connect(service)
    assert "guest:guest" not in service.text


@pytest.mark.queues
@pytest.mark.contract("1.16")
async def test_queues_end_with_their_streams(
    service: Service, vhost: Vhost, connect: OpenStream, eventually: Eventually
) -> None:
    streams = [await connect(service, str(n)) for n in range(10)]
    assert len(vhost.live_queues()) == 10
    for stream in streams[:5]:
        stream.abort()
    for stream in streams[5:]:
        await stream.close()
    await eventually(lambda: vhost.live_queues() == [])
    assert await service.metric("bridge_connections") == 0


@pytest.mark.queues
async def test_streams_that_end_while_they_are_opened_leave_no_queue(
    service: Service, vhost: Vhost, connect: OpenStream, eventually: Eventually
) -> None:
    async def come_and_go(number: int) -> None:
        stream = await connect(service, str(number), "ops", ready=False)
        await asyncio.sleep(number % 10 / 1000)  # At ten different points of the opening.
        stream.abort()

    await asyncio.gather(*(come_and_go(number) for number in range(100)))
    await service.logged("stream ended", count=100)
    await eventually(lambda: vhost.live_queues() == [])
    await eventually(lambda: [key for _, key in vhost.bindings()] == ["all.#", "#"])
    stream = await connect(service, "after")
    await vhost.publish("user.after.job.completed", cloudevent("e1"))
    assert await stream.ids(1) == ["e1"]


@pytest.mark.parametrize("queue", ["events.invalid", pytest.param("events.log", marks=pytest.mark.queues)])
async def test_streams_do_not_wait_for_a_queue_that_does_not_answer(
    vhost: Vhost, node: Node, start: StartService, connect: OpenStream, eventually: Eventually, queue: str
) -> None:
    """RabbitMQ 4.3 answers only after more than a minute that the node of a queue is down."""

    async def signal_process(action: str) -> None:
        found = f'{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost.name}">>, queue, <<"{queue}">>))'
        await asyncio.to_thread(node.ctl, "eval", f"{found}, sys:{action}(amqqueue:get_pid(Queue)).")

    service = await start(deadlines={"service.broker.feed.QUARANTINE_SECONDS": 2.0})
    stream = await connect(service)
    await signal_process("suspend")
    try:
        await eventually(lambda: vhost.close_connections(named="consumer") > 0)
        await service.logged("broker connected", count=2)
        if queue == "events.invalid":
            await vhost.publish("user.42.job.completed", cloudevent("e1"))
            assert await stream.ids(1) == ["e1"]
            assert [line["event"] for line in service.lines].count("no quarantine") == 1
            service.signal(signal.SIGTERM)
            assert await service.ended() == 0, "it can be ended before there is an answer"
    finally:
        await signal_process("resume")


@pytest.mark.contract("5.14")
@pytest.mark.parametrize("what", ["exchange", "quarantine", "log"])
async def test_topology_that_differs_stops_the_start_with_advice(vhost: Vhost, start: StartService, what: str) -> None:
    import aio_pika

    connection = await aio_pika.connect(vhost.url)
    async with connection:
        channel = await connection.channel()
        if what == "exchange":
            await channel.declare_exchange("events", "direct", durable=True)
        elif what == "quarantine":
            await channel.declare_queue("events.invalid", durable=True, arguments={"x-queue-type": "stream"})
        else:
            await channel.declare_queue("events.log", durable=True)
    service = await start(ready=False)
    assert await service.ended() == 1
    error = (await service.logged("cannot start"))["error"]
    assert {"exchange": "BRIDGE_EXCHANGE", "quarantine": "BRIDGE_QUARANTINE", "log": "BRIDGE_LOG"}[what] in error
    assert "inequivalent arg" in error


async def test_refused_credentials_stop_the_start(vhost: Vhost, node: Node, start: StartService) -> None:
    url = vhost.url_at(node.port, password="s3cret-and-wrong")
    service = await start(amqp_url=url, ready=False)
    assert await service.ended() == 1
    assert "ACCESS_REFUSED" in (await service.logged("cannot start"))["error"]
    assert "s3cret" not in service.text


@pytest.mark.queues
async def test_a_right_that_every_stream_needs_stops_the_start(vhost: Vhost, node: Node, start: StartService) -> None:
    maker = await start()
    await maker.stop()
    vhost.add_user("bridge-test")
    try:
        vhost.grant("bridge-test", configure=r"^$")
        service = await start(
            amqp_url=vhost.url_at(node.port, user="bridge-test", password="secret-bridge-test"), ready=False
        )
        assert await service.ended() == 1
        assert "access to queue 'bridge." in (await service.logged("cannot start"))["error"]
    finally:
        vhost.delete_user("bridge-test")


@pytest.mark.queues
async def test_few_rights_are_enough_and_a_missing_one_is_named(
    vhost: Vhost, node: Node, start: StartService, connect: OpenStream
) -> None:
    vhost.add_user("bridge-test")
    url = vhost.url_at(node.port, user="bridge-test", password="secret-bridge-test")
    try:
        vhost.grant(
            "bridge-test", configure=r"^bridge\.", write=r"^(bridge\.|amq\.default)", read=r"^(bridge\.|events$)"
        )
        service = await start(amqp_url=url, ready=False)
        assert await service.ended() == 1
        error = (await service.logged("cannot start"))["error"]
        assert "exchange 'events' does not exist" in error
        # Once a user with the right has made both, these rights are enough.
        maker = await start()
        await maker.stop()
        service = await start(amqp_url=url)
        stream = await connect(service, "42", "ops")
        await vhost.publish("group.ops.job.completed", cloudevent("e1"))
        assert await stream.ids(1) == ["e1"]
        # It may not read the log, and must not try it again and again.
        await asyncio.sleep(3)  # A wrong retry would happen every half second.
        assert [line["event"] for line in service.lines].count("watermark not written") == 1
    finally:
        vhost.delete_user("bridge-test")


@pytest.mark.parametrize("answer", [b"", b"AMQP\x00\x00\x08\x00", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x01\x00\x00"])
async def test_an_address_where_something_else_listens_is_tried_again(
    vhost: Vhost, start: StartService, connect: OpenStream, answer: bytes
) -> None:
    async def answer_and_close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):  # The bridge may have closed it already.
            writer.write(answer)
            await writer.drain()
        writer.close()

    other = await asyncio.start_server(answer_and_close, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    # Like two nodes of a cluster, of which one is something else.
    service = await start(amqp_url=f"{vhost.url_at(port)},{vhost.url_at(port)}", ready=False)
    await service.logged("broker unavailable", count=4)
    assert service.is_running
    await service.stop()  # First: asyncio leaves a connection open that it accepts while the server is closed.
    for _ in range(TURNS):
        await asyncio.sleep(0)
    other.close()
    await other.wait_closed()
    both = await start(amqp_url=f"{vhost.url_at(port)},{vhost.url}")
    await connect(both)


async def test_over_tls_events_of_all_sizes_arrive(
    vhost: Vhost, start: StartService, connect: OpenStream, tmp_path: Path
) -> None:
    """TLS records and AMQP frames do not end at the same bytes."""
    pem = tmp_path / "broker.pem"
    pem.write_bytes(b"".join(certificate.make()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    async with Proxy(vhost.node.port, tls=context) as proxy:
        url = vhost.url_at(proxy.port).replace("amqp://", "amqps://") + f"?cafile={pem}"
        service = await start(amqp_url=url)
        stream = await connect(service)
        sizes = [0, 1, 4_000, 16_384, 60_000, 3, 30_000] * 5
        await vhost.publish_all(
            [
                ("user.42.job.completed", cloudevent(f"e{n}", result_url="x" * min(size, 2_000), padding="x" * size))
                for n, size in enumerate(sizes)
            ]
        )
        assert await stream.ids(len(sizes)) == [f"e{n}" for n in range(len(sizes))]
        assert await service.metric("bridge_events_received_total") == len(sizes)


async def test_a_connection_that_delivers_only_events_is_not_treated_as_dead(
    vhost: Vhost, start: StartService, connect: OpenStream
) -> None:
    """The broker sends no heartbeat while it sends anything else, and the library sees none of the events."""
    service = await start(amqp_url=vhost.url + "?heartbeat=1")
    stream = await connect(service)
    # aiormq gives a connection up after (heartbeat + 1) * 3 seconds without a frame.
    began, sent = time.monotonic(), 0
    async with stream.read_on():
        while time.monotonic() - began < 8:
            await vhost.publish("user.42.job.completed", cloudevent(f"e{sent}"))
            sent += 1
    assert await stream.ids(sent) == [f"e{n}" for n in range(sent)]
    assert await service.metric("bridge_broker_connects") == 1


async def test_a_handshake_in_two_pieces_is_one_handshake(vhost: Vhost, start: StartService) -> None:
    """The bridge must send nothing of its own during a slow handshake."""
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", vhost.node.port)

        async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while chunk := await source.read(65_536):
                target.write(chunk)
            target.close()

        tasks.add(asyncio.create_task(forward(reader, broker_writer)))
        for size in (3, 100):
            writer.write(await broker_reader.readexactly(size))
            await asyncio.sleep(1.2)  # The fault: a slow handshake.
        tasks.add(asyncio.create_task(forward(broker_reader, writer)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    # Without control, the feed's connection is the only one, and none is in its handshake at the end.
    service = await start(amqp_url=vhost.url_at(server.sockets[0].getsockname()[1]), CONTROL="")
    assert await service.metric("bridge_broker_connects") == 1
    assert "broker unavailable" not in service.text
    await service.stop()
    server.close()
    await asyncio.gather(*tasks, return_exceptions=True)
