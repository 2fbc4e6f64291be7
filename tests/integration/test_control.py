"""Kicks and questions reach every replica: by the command line, and by the internal address."""

from __future__ import annotations

import json
import time

import aio_pika
import pytest

from tests.client import Stream
from tests.conftest import OpenStream, StartService
from tests.integration.test_cli import run
from tests.rabbit import Vhost, cloudevent
from tests.service import SECRET, mint


async def bye(stream: Stream) -> str:
    reason = (await stream.until("bridge.bye")).json["reason"]
    assert isinstance(reason, str)
    return reason


@pytest.mark.contract("9.1", "9.2", "9.4")
@pytest.mark.parametrize("feed", ["queues", "log"])
async def test_a_kick_ends_a_users_streams_on_every_replica(
    start: StartService, vhost: Vhost, connect: OpenStream, feed: str
) -> None:
    replicas = [await start(FEED=feed) for _ in range(3)]
    for service in replicas:
        await service.logged("control stream read")
    streams = [await connect(service, "a/b é") for service in replicas]
    other = await connect(replicas[0], "43")
    token = mint("a/b é")
    who = await run("who", "--user", "a/b é", amqp_url=vhost.url)
    assert (who.code, len(who.out.splitlines()), "3 replica(s) answered" in who.err) == (0, 3, True), who.err
    done = await run("kick", "--user", "a/b é", "--until", "now", "--reason", "left us", amqp_url=vhost.url)
    assert (done.code, done.out.count(": 1 ended")) == (0, 3), done.err
    assert [await bye(stream) for stream in streams] == ["revoked"] * 3
    line = await replicas[1].logged("kicked")
    assert (line["user"], line["streams"], line["reason"]) == ("a/b é", 1, "left us")
    assert "@" in line["by"]
    # The old token opens no stream on any replica, also not on one that starts later.
    late = await start(FEED=feed)
    await late.logged("control stream read", revocations=1)
    for service in (*replicas, late):
        async with Stream(service.public, token) as refused:
            assert refused.status == 401
            assert b"revoked-token" in await refused.body()
    await vhost.publish("user.43.job.completed", cloudevent("e"))
    assert await other.ids(1) == ["e"]


@pytest.mark.any_rabbitmq
@pytest.mark.contract("9.3")
async def test_a_token_that_was_issued_later_is_accepted(start: StartService, vhost: Vhost) -> None:
    service = await start()
    await service.logged("control stream read")
    done = await run("kick", "--user", "42", "--until", str(time.time() - 60), amqp_url=vhost.url)
    assert done.code == 0, done.err
    async with Stream(service.public, mint("42")) as stream:
        await stream.ready()


@pytest.mark.any_rabbitmq
@pytest.mark.contract("9.2")
async def test_one_stream_of_a_user_is_ended(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start()
    await service.logged("control stream read")
    first, second = await connect(service), await connect(service)
    listed = await run("who", "--user", "42", amqp_url=vhost.url)
    rows = [json.loads(line) for line in listed.out.splitlines()]
    done = await run("kick", "--user", "42", "--session", rows[0]["session"], amqp_url=vhost.url)
    assert ": 1 ended" in done.out
    assert await bye(first) == "revoked"
    await vhost.publish("user.42.job.completed", cloudevent("e"))
    assert await second.ids(1) == ["e"]


@pytest.mark.any_rabbitmq
@pytest.mark.contract("9.5", "9.6")
async def test_the_internal_address_has_the_same(start: StartService, connect: OpenStream) -> None:
    replicas = [await start(INTERNAL_KEY="k" * 32) for _ in range(2)]
    for service in replicas:
        await service.logged("control stream read")
    streams = [await connect(replicas[0], "a/b"), await connect(replicas[1], "a/b")]
    await connect(replicas[1], "c")
    for refused in ({}, {"Authorization": "Bearer wrong"}):
        assert (await replicas[0].get("/users", internal=True, headers=refused)).status_code == 401
    key = {"Authorization": f"Bearer {'k' * 32}"}

    async def ask(path: str, method: str = "GET") -> dict[str, object]:
        answer = await replicas[0].get(path, internal=True, method=method, headers=key)
        assert answer.status_code == 200, answer.text
        value: dict[str, object] = answer.json()
        return value

    users = await ask("/users?limit=1")
    assert (users["users"], users["further"]) == ([{"user": "a/b", "streams": 2}], True)
    assert (await ask("/users?after=a/b"))["users"] == [{"user": "c", "streams": 1}]
    shown = await ask("/users/a%2Fb/streams")
    assert len(shown["streams"]) == len(shown["replicas"]) == 2  # type: ignore[arg-type]
    assert (await ask("/users/a%2Fb/streams?until=now&reason=x", "DELETE"))["ended"] == 2
    assert [await bye(stream) for stream in streams] == ["revoked"] * 2
    bad = await replicas[0].get("/users/a/streams?until=soon", internal=True, method="DELETE", headers=key)
    assert bad.status_code == 400
    assert (await replicas[0].get("/users", headers=key)).status_code == 404, "not on the public address"


@pytest.mark.contract("9.4")
async def test_a_kick_reaches_a_replica_that_was_cut_off(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    from tests.proxy import Proxy

    async with Proxy(vhost.node.port) as proxy:
        service = await start(amqp_url=vhost.url_at(proxy.port))
        await service.logged("control stream read")
        stream = await connect(service)
        await proxy.refuse()
        proxy.cut()
        await service.logged("control interrupted")
        done = await run("kick", "--user", "42", "--until", "now", amqp_url=vhost.url)
        assert (done.code, "no replica has answered" in done.err) == (1, True)
        await proxy.open()
        assert await bye(stream) == "revoked"
        await service.logged("control restored")
        proxy.cut()
        await service.logged("control restored", count=2)
        assert [line["event"] for line in service.lines].count("control interrupted") >= 2, "each outage has its line"


@pytest.mark.any_rabbitmq
async def test_what_is_no_order_is_logged_and_the_next_one_is_read(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start()
    await service.logged("control stream read")
    stream = await connect(service)
    connection = await aio_pika.connect(vhost.url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange("bridge.control", ensure=False)
        for body in (b"\xff", b"[]", b'{"kind":"kick"}', b"[" * 50_000):
            await exchange.publish(aio_pika.Message(body), "kick")
    await service.logged("order not read", count=4)
    assert (await run("kick", "--user", "42", amqp_url=vhost.url)).code == 0
    assert await bye(stream) == "revoked"


@pytest.mark.any_rabbitmq
async def test_without_control_there_are_no_orders(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start(CONTROL="")
    await connect(service)
    assert (await service.get("/users", internal=True)).status_code == 404
    done = await run("who", amqp_url=vhost.url, CONTROL="")
    assert (done.code, "BRIDGE_CONTROL is empty" in done.err) == (2, True)
    assert "bridge.control" not in vhost.all_queues()


@pytest.mark.contract("9.4")
async def test_another_age_of_revocations_needs_no_other_stream(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    """RabbitMQ refuses to declare a stream again with other arguments."""
    first = await start()
    await first.logged("control stream read")
    second = await start(CONTROL_MAX_AGE="60D")
    await second.logged("control stream read")
    stream = await connect(second)
    done = await run("check", amqp_url=vhost.url, JWT_SECRET=SECRET, CONTROL_MAX_AGE="90D")
    assert (done.code, "ok control stream 'bridge.control'. It fits, and differs: x-max-age" in done.out) == (0, True)
    assert (await run("kick", "--user", "42", amqp_url=vhost.url)).code == 0
    assert await bye(stream) == "revoked"
