"""The broker goes away, comes back, takes queues away, refuses: streams stay open and events flow again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from deploy.local.node import Node
from tests.client import Stream
from tests.conftest import Eventually, OpenStream, StartService
from tests.proxy import Proxy
from tests.rabbit import Vhost, cloudevent
from tests.service import Service


@pytest.fixture
def own_vhost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vhost]:
    """A virtual host on a node of the test's own, to kill."""
    node = Node(tmp_path_factory.mktemp("own-node"), management=True)
    try:
        node.start()
        vhost = Vhost(node)
        vhost.create()
        yield vhost
        vhost.close()
    finally:
        node.remove()


async def gap_then(stream: Stream, vhost: Vhost, event_id: str) -> None:
    """The stream was told of the hole and is live again."""
    gap = await stream.next(seconds=60)
    assert (gap.event, gap.json) == ("bridge.gap", {"reason": "no-log"})
    await vhost.publish("user.42.job.completed", cloudevent(event_id))
    await vhost.publish("group.ops.job.completed", cloudevent(event_id + "-group"))
    await vhost.publish("all.job.completed", cloudevent(event_id + "-all"))
    assert set(await stream.ids(3)) == {event_id, event_id + "-group", event_id + "-all"}


async def test_a_broker_killed_and_started_again_is_invisible_but_for_the_gap(
    own_vhost: Vhost, start: StartService, connect: OpenStream
) -> None:
    vhost = own_vhost
    service = await start(amqp_url=vhost.url, BROKER_GRACE_SECONDS="1")
    streams = [await connect(service, "42", "ops") for _ in range(20)]
    vhost.node.kill()
    await service.logged("broker unavailable")
    async with asyncio.timeout(20):
        while (await service.get("/readyz", internal=True)).status_code != 503:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert (await service.get("/livez", internal=True)).status_code == 200
    assert await service.metric("bridge_broker_connected") == 0
    # Who comes now waits for a moment and is then told to come back.
    late = await connect(service, "43", ready=False)
    assert [frame.json for frame in await late.rest()] == [{"reason": "busy"}]

    vhost.node.start()
    await service.logged("broker connected", count=2, seconds=60)
    for number, stream in enumerate(streams):
        gap = await stream.next(seconds=60)
        assert gap.event == "bridge.gap", number
    await vhost.publish("user.42.job.completed", cloudevent("after"))
    await vhost.publish("group.ops.job.completed", cloudevent("after-group"))
    for stream in streams:
        assert set(await stream.ids(2)) == {"after", "after-group"}
    assert (await service.get("/readyz", internal=True)).status_code == 200
    assert await service.metric("bridge_connections") == 20


async def test_a_connection_cut_by_the_network(
    vhost: Vhost, proxy: Proxy, start: StartService, connect: OpenStream
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port))
    stream = await connect(service, "42", "ops")
    for number in range(3):
        proxy.cut()
        await gap_then(stream, vhost, f"e{number}")


async def test_a_connection_closed_by_an_operator(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42", "ops")
    async with asyncio.timeout(20):
        while not vhost.close_connections():  # noqa: ASYNC110 - the API shows connections some seconds late.
            await asyncio.sleep(0.2)
    await gap_then(stream, vhost, "e1")


async def test_a_network_that_swallows_everything_is_noticed_by_heartbeats(
    vhost: Vhost, proxy: Proxy, start: StartService, connect: OpenStream
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port) + "?heartbeat=2")
    stream = await connect(service, "42", "ops")
    proxy.stall()
    await service.logged("broker unavailable", seconds=30)
    proxy.cut()
    proxy.flow()
    await gap_then(stream, vhost, "e1")


async def test_a_live_queue_deleted_by_an_operator(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42", "ops")
    other = await connect(service, "43")
    (queue,) = [name for name, key in vhost.bindings() if key == "user.42.#"]
    vhost.delete_queue(queue)
    await gap_then(stream, vhost, "e1")
    await vhost.publish("user.43.job.completed", cloudevent("unharmed"))
    assert "bridge.gap" not in [frame.event for frame in other.frames]


async def test_the_shared_queue_deleted_by_an_operator(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42", "ops")
    (queue,) = {name for name, key in vhost.bindings() if key == "all.#"}
    vhost.delete_queue(queue)
    await gap_then(stream, vhost, "e1")


async def test_the_exchange_deleted_by_an_operator_is_made_again(
    service: Service, vhost: Vhost, connect: OpenStream
) -> None:
    await connect(service, "42")
    vhost.delete_exchange("events")
    # The next stream's binding is the first to find out.
    stream = await connect(service, "43", ready=False)
    assert (await stream.next()).event == "bridge.ready"
    await vhost.publish("user.43.job.completed", cloudevent("e1"))
    assert await stream.ids(1) == ["e1"]


async def test_a_broker_that_is_not_there_yet_is_waited_for(
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


async def test_queues_go_with_their_streams(
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


async def test_streams_that_leave_while_they_are_being_opened_leave_nothing(
    service: Service, vhost: Vhost, connect: OpenStream, eventually: Eventually
) -> None:
    async def come_and_go(number: int) -> None:
        stream = await connect(service, str(number), "ops", ready=False)
        await asyncio.sleep(number % 10 / 1000)  # At ten different points of the opening.
        stream.abort()

    await asyncio.gather(*(come_and_go(number) for number in range(100)))
    await service.logged("stream ended", count=100)
    await eventually(lambda: vhost.live_queues() == [])
    await eventually(lambda: [key for _, key in vhost.bindings()] == ["all.#"])
    stream = await connect(service, "after")
    await vhost.publish("user.after.job.completed", cloudevent("e1"))
    assert await stream.ids(1) == ["e1"]


@pytest.mark.parametrize("what", ["exchange", "quarantine"])
async def test_topology_that_differs_stops_the_start_with_what_to_do(
    vhost: Vhost, start: StartService, what: str
) -> None:
    import aio_pika

    connection = await aio_pika.connect(vhost.url)
    async with connection:
        channel = await connection.channel()
        if what == "exchange":
            await channel.declare_exchange("events", "direct", durable=True)
        else:
            await channel.declare_queue("events.invalid", durable=True)
    service = await start(ready=False)
    assert await service.ended() == 1
    error = (await service.logged("cannot start"))["error"]
    assert {"exchange": "BRIDGE_EXCHANGE", "quarantine": "BRIDGE_QUARANTINE"}[what] in error
    assert "inequivalent arg" in error


async def test_refused_credentials_stop_the_start(vhost: Vhost, node: Node, start: StartService) -> None:
    url = vhost.url_at(node.port, password="s3cret-and-wrong")
    service = await start(amqp_url=url, ready=False)
    assert await service.ended() == 1
    assert "ACCESS_REFUSED" in (await service.logged("cannot start"))["error"]
    assert "s3cret" not in service.text


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
        # Once somebody with the right has made both, those rights are enough.
        maker = await start()
        await maker.stop()
        service = await start(amqp_url=url)
        stream = await connect(service, "42", "ops")
        await vhost.publish("group.ops.job.completed", cloudevent("e1"))
        assert await stream.ids(1) == ["e1"]
    finally:
        vhost.delete_user("bridge-test")
