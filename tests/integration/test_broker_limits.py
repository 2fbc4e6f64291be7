"""RabbitMQ's limits of queues, channels and connections: above them streams wait or are `busy`, and others stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.node import Node
from tests.client import Stream
from tests.conftest import OpenStream, StartService
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

SOON = {"service.broker.live.LIMIT_RETRY_SECONDS": 0.2, "service.broker.live.LIMIT_SECONDS": 0.1}


async def assert_busy(service: Service, user: str) -> None:
    async with Stream(service.public, mint(user)) as stream:
        (bye,) = await stream.rest()
    assert (stream.status, bye.event, bye.json) == (200, "bridge.bye", {"reason": "busy"})


async def assert_gets(vhost: Vhost, stream: Stream, user: str, event_id: str) -> None:
    await vhost.publish(f"user.{user}.job.completed", cloudevent(event_id))
    assert (await stream.next_event())["id"] == event_id


async def reason(service: Service) -> str | None:
    answer = await service.get("/readyz?exclude=connections", internal=True)
    document: dict[str, str] = answer.json()
    assert (answer.status_code == 200) is ("reason" not in document)
    return document.get("reason")


def cut(vhost: Vhost) -> None:
    vhost.node.ctl("close_all_connections", "--vhost", vhost.name, "cut by the test")


def limit(vhost: Vhost, what: str, value: int | None) -> None:
    if value is None:
        vhost.node.ctl("clear_vhost_limits", "-p", vhost.name)
    else:
        vhost.node.ctl("set_vhost_limits", "-p", vhost.name, f'{{"{what}": {value}}}')


@pytest.mark.contract("5.35")
@pytest.mark.queues
async def test_a_new_stream_beyond_the_limit_of_queues_is_busy(
    start: StartService, connect: OpenStream, vhost: Vhost
) -> None:
    service = await start(deadlines=SOON)
    first = await connect(service, "1")
    limit(vhost, "max-queues", len(vhost.all_queues()))
    for user in "2345":
        await assert_busy(service, user)
    line = await service.logged("live queues refused")
    assert "limit" in line["error"]
    await assert_gets(vhost, first, "1", "e-1")
    assert await reason(service) is None
    assert await service.metric("bridge_broker_connects") == 1
    assert await service.metric("bridge_broker_queues_refused") >= 4
    assert await service.metric("bridge_connections") == 1
    limit(vhost, "max-queues", None)
    second = await connect(service, "2")
    await assert_gets(vhost, second, "2", "e-2")
    assert "Traceback" not in service.text


@pytest.mark.contract("5.34")
async def test_at_the_start_the_bridge_waits_while_queues_are_at_their_limit(start: StartService, vhost: Vhost) -> None:
    limit(vhost, "max-queues", 0)
    service = await start(ready=False)
    await service.logged("broker unavailable")
    not_ready = await reason(service)
    assert not_ready is not None
    assert "starting" in not_ready
    assert "queue limit" in not_ready
    assert await service.metric("bridge_broker_connected") == 0
    await assert_busy(service, "1")
    limit(vhost, "max-queues", None)
    await service.logged("broker connected")
    assert await reason(service) is None


@pytest.mark.contract("5.35")
@pytest.mark.queues
async def test_an_open_stream_waits_for_its_queue(start: StartService, connect: OpenStream, vhost: Vhost) -> None:
    service = await start(deadlines=SOON)
    streams = {str(user): await connect(service, str(user)) for user in range(30)}
    # RabbitMQ 4.3 counts a moment late: some of many queues that are declared at once may pass. So none has room.
    limit(vhost, "max-queues", len(vhost.all_queues()) - len(streams))
    cut(vhost)
    await service.logged("live queues refused")
    assert await service.metric("bridge_broker_connected") == 1
    assert await service.metric("bridge_connections") == len(streams)
    for user in streams:
        await vhost.publish(f"user.{user}.job.completed", cloudevent("missed"))
    limit(vhost, "max-queues", None)
    for user, stream in streams.items():
        assert (await stream.next_event())["id"] == "missed"
        await assert_gets(vhost, stream, user, "live")


@pytest.mark.queues
async def test_without_its_shared_queue_a_bridge_is_not_ready(start: StartService, vhost: Vhost) -> None:
    service = await start(deadlines=SOON, BROKER_GRACE_SECONDS="0")
    limit(vhost, "max-queues", 0)
    vhost.delete_bound_queue("all.#")
    await service.logged("shared queue lost", count=2)
    not_ready = await reason(service)
    assert not_ready is not None
    assert "queue limit" in not_ready
    assert await service.metric("bridge_broker_connected") == 0
    limit(vhost, "max-queues", None)
    await service.logged("shared queue made again")
    assert await reason(service) is None
    assert await service.metric("bridge_broker_connects") == 1


@pytest.fixture
def channel_max(node: Node) -> Iterator[None]:
    yield
    node.ctl("eval", "application:set_env(rabbit, channel_max, 2047).")


@pytest.mark.queues
@pytest.mark.contract("5.34")
@pytest.mark.usefixtures("channel_max")
async def test_a_bridge_needs_few_channels(start: StartService, connect: OpenStream, vhost: Vhost, node: Node) -> None:
    node.ctl("eval", "application:set_env(rabbit, channel_max, 5).")
    service = await start(ready=False)
    await service.logged("broker unavailable")
    not_ready = await reason(service)
    assert not_ready is not None
    assert "channel_max" in not_ready
    node.ctl("eval", "application:set_env(rabbit, channel_max, 7).")
    await service.logged("broker connected")
    streams = {str(user): await connect(service, str(user)) for user in range(30)}
    for user, stream in streams.items():
        await assert_gets(vhost, stream, user, "e-1")
    assert await service.metric("bridge_broker_connects") == 1


@pytest.fixture
def user(vhost: Vhost) -> Iterator[str]:
    name = f"bridge-{vhost.name}"
    vhost.add_user(name)
    vhost.grant(name)
    yield name
    vhost.node.ctl("clear_user_limits", name, "all")
    vhost.delete_user(name)


async def test_a_bridge_works_with_the_channels_of_its_user(
    start: StartService, connect: OpenStream, vhost: Vhost, user: str
) -> None:
    vhost.node.ctl("set_user_limits", user, '{"max-channels": 16}')
    url = vhost.url_at(vhost.port, user=user, password=f"secret-{user}")
    service = await start(amqp_url=url, deadlines={"service.broker.eventlog.PATIENCE_SECONDS": 1.0})
    streams = {str(each): await connect(service, str(each)) for each in range(30)}
    for each, stream in streams.items():
        await assert_gets(vhost, stream, each, "e-1")
    assert await service.metric("bridge_broker_connects") == 1
    # Another program takes the rest: open streams continue, and new ones start without the log.
    vhost.node.ctl("set_user_limits", user, '{"max-channels": 0}')
    await assert_gets(vhost, await connect(service, "late"), "late", "e-2")
    assert await service.metric("bridge_broker_connects") == 1


@pytest.mark.contract("5.34")
async def test_the_bridge_waits_while_connections_are_at_their_limit(
    start: StartService, connect: OpenStream, vhost: Vhost
) -> None:
    limit(vhost, "max-connections", 0)
    service = await start(ready=False, BROKER_GRACE_SECONDS="0")
    await service.logged("broker unavailable")
    not_ready = await reason(service)
    assert not_ready is not None
    assert "connection limit" in not_ready
    limit(vhost, "max-connections", None)
    await service.logged("broker connected")
    stream = await connect(service, "1")
    limit(vhost, "max-connections", 0)
    known = sum(line.get("kind") == "LimitReached" for line in service.lines)
    cut(vhost)
    await service.logged("broker unavailable", kind="LimitReached", count=known + 1)
    not_ready = await reason(service)
    assert not_ready is not None
    assert "connection limit" in not_ready
    assert not stream.ended
    limit(vhost, "max-connections", None)
    await service.logged("broker connected", count=2)
    await assert_gets(vhost, stream, "1", "e-2")


@pytest.fixture
def node_limits(node: Node) -> Iterator[None]:
    yield
    for name in ("channel_max_per_node", "cluster_queue_limit"):
        node.ctl("eval", f"application:set_env(rabbit, {name}, infinity).")


@pytest.mark.any_rabbitmq  # RabbitMQ 3.10 has neither limit.
@pytest.mark.usefixtures("node_limits")
@pytest.mark.queues
async def test_the_limit_of_queues_of_a_whole_cluster(
    start: StartService, connect: OpenStream, vhost: Vhost, node: Node
) -> None:
    service = await start(deadlines=SOON)
    first = await connect(service, "1")
    node.ctl("eval", "application:set_env(rabbit, cluster_queue_limit, 1).")
    await assert_busy(service, "2")
    assert "limit" in (await service.logged("live queues refused"))["error"]
    await assert_gets(vhost, first, "1", "e-1")
    assert await reason(service) is None
    assert await service.metric("bridge_broker_connects") == 1
    node.ctl("eval", "application:set_env(rabbit, cluster_queue_limit, infinity).")
    await assert_gets(vhost, await connect(service, "2"), "2", "e-2")


@pytest.mark.queues
@pytest.mark.any_rabbitmq
@pytest.mark.usefixtures("node_limits")
async def test_a_bridge_works_with_the_channels_of_its_node(
    start: StartService, connect: OpenStream, vhost: Vhost, node: Node
) -> None:
    node.ctl("eval", "application:set_env(rabbit, channel_max_per_node, 3).")
    service = await start(ready=False, deadlines={"service.broker.eventlog.PATIENCE_SECONDS": 1.0})
    await service.logged("broker unavailable")
    not_ready = await reason(service)
    assert not_ready is not None
    assert "channel" in not_ready
    node.ctl("eval", "application:set_env(rabbit, channel_max_per_node, 16).")
    await service.logged("broker connected")
    stream = await connect(service, "1")
    await assert_gets(vhost, stream, "1", "e-1")
    # Another program takes the rest: open streams continue, and new ones start without the log.
    node.ctl("eval", "application:set_env(rabbit, channel_max_per_node, 1).")
    late = await connect(service, "late")
    node.ctl("eval", "application:set_env(rabbit, channel_max_per_node, infinity).")
    await assert_gets(vhost, stream, "1", "e-2")
    await assert_gets(vhost, late, "late", "e-3")
    assert await service.metric("bridge_broker_connects") == 1


async def test_the_bridge_waits_while_its_users_connections_are_at_their_limit(
    start: StartService, connect: OpenStream, vhost: Vhost, user: str
) -> None:
    vhost.node.ctl("set_user_limits", user, '{"max-connections": 0}')
    url = vhost.url_at(vhost.port, user=user, password=f"secret-{user}")
    service = await start(amqp_url=url, ready=False, BROKER_GRACE_SECONDS="0")
    await service.logged("broker unavailable")
    not_ready = await reason(service)
    assert not_ready is not None
    assert "connection" in not_ready
    assert "limit" in not_ready
    vhost.node.ctl("set_user_limits", user, '{"max-connections": -1}')
    await service.logged("broker connected")
    assert await reason(service) is None
    await assert_gets(vhost, await connect(service, "1"), "1", "e-1")
