"""The users of deploy/rabbitmq/definitions.json on a real broker: each can do its work, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import aio_pika
import aiormq
import pytest

from bridge import Publisher
from bridge.samples.jobs import JobCompleted
from tests.conftest import Eventually, OpenStream, StartService
from tests.deploy.manifests import KUBERNETES, Manifest, of_kind, render
from tests.integration.test_cli import run
from tests.rabbit import Vhost, cloudevent
from tests.service import ROOT, SAMPLES, SECRET, bare_environment

DEFINITIONS: dict[str, list[dict[str, Any]]] = json.loads(
    (KUBERNETES.parent / "rabbitmq" / "definitions.json").read_text()
)
USERS = [user["name"] for user in DEFINITIONS["users"]]


@pytest.fixture
def rights(vhost: Vhost) -> Iterator[Vhost]:
    """A virtual host with everything that the file has for `/`."""
    vhost.import_definitions(json.dumps(DEFINITIONS).replace('"vhost": "/"', f'"vhost": "{vhost.name}"'))
    try:
        for user in USERS:
            vhost.add_user(user)  # Sets a password, as `rabbitmqctl change_password` does: the file has none.
        yield vhost
    finally:
        for user in USERS:
            vhost.delete_user(user)


def url_of(vhost: Vhost, user: str) -> str:
    return vhost.url_at(vhost.port, user=user, password=f"secret-{user}")


def bridge_url(rights: Vhost) -> str:
    return url_of(rights, "bridge")


async def test_each_user_can_do_its_work(
    rights: Vhost, start: StartService, connect: OpenStream, eventually: Eventually
) -> None:
    service = await start(amqp_url=bridge_url(rights))
    stream = await connect(service, "42", "ops")
    async with Publisher(url_of(rights, "worker-jobs"), source="/workers/reports") as publisher:
        first = await publisher.to_user("42", JobCompleted(job_id="r-7", duration_seconds=3.2))
        assert await stream.ids(1) == [first]
        await rights.publish("group.ops.notification", cloudevent("g", "notification", title="t"))
        await rights.publish("all.job.completed", cloudevent("a"))
        assert await stream.ids(2) == ["g", "a"]
        cursor = stream.frames[-1].id
        await stream.close()
        missed = await publisher.to_user("42", JobCompleted(job_id="r-8", duration_seconds=1))
    assert cursor is not None
    back = await connect(service, "42", "ops", headers={"Last-Event-ID": cursor})
    assert await back.ids(1) == [missed]
    await rights.publish("user.42.job.completed", b"no JSON")
    await eventually(lambda: rights.count("events.invalid") == 1)
    assert await service.metric("bridge_quarantine_dropped_total") == 0


@pytest.mark.queues
async def test_the_bridge_warns_if_the_log_may_be_unbound(
    rights: Vhost, start: StartService, connect: OpenStream
) -> None:
    """The bindings of the log are deleted with the exchange, and the bridge has no right to check them."""
    service = await start(amqp_url=bridge_url(rights))
    stream = await connect(service, "42")
    rights.delete_exchange("events")
    await service.logged("broker unavailable")
    assert not any(line["event"] == "the log may be unbound" for line in service.lines)
    rights.add_exchange("events")
    assert "Bind it with '#'" in (await service.logged("the log may be unbound"))["detail"]
    await service.logged("broker connected", count=2)
    await stream.until("bridge.gap")  # Its queue is bound again.
    await rights.publish("user.42.job.completed", cloudevent("live"))
    assert await stream.ids(1) == ["live"]


@pytest.mark.contract("9.7")
async def test_an_operator_can_list_users_and_end_streams(
    rights: Vhost, start: StartService, connect: OpenStream
) -> None:
    service = await start(amqp_url=bridge_url(rights))
    await service.logged("control stream read")
    stream = await connect(service, "42")
    url = url_of(rights, "bridge-operator")
    done = await run("who", amqp_url=url)
    assert (done.code, json.loads(done.out)) == (0, {"user": "42", "streams": 1}), done.err
    assert (await run("kick", "--user", "42", "--until", "now", amqp_url=url)).code == 0
    assert (await stream.until("bridge.bye")).json["reason"] == "revoked"
    refused = await run("kick", "--user", "42", amqp_url=url_of(rights, "worker-jobs"))
    assert (refused.code, "ACCESS_REFUSED" in refused.err) == (1, True)


async def test_bridge_check_accepts_the_rights(rights: Vhost) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bridge", "check",
        cwd=ROOT,
        env={
            **bare_environment(),
            "BRIDGE_AMQP_URL": bridge_url(rights),
            "BRIDGE_JWT_SECRET": SECRET,
            "BRIDGE_SCHEMAS": SAMPLES,
        },
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()
    assert os.fsencode("!!") not in printed


Channel = aiormq.abc.AbstractChannel
Action = Callable[[Channel], Awaitable[Any]]


async def _nothing(_: object) -> None:
    pass


def publish(key: str, exchange: str = "events") -> Action:
    return lambda channel: channel.basic_publish(b"{}", exchange=exchange, routing_key=key)


def bind_own(key: str, exchange: str = "events") -> Action:
    async def bind(channel: Channel) -> None:
        await channel.queue_declare("bridge.mine", exclusive=True)
        await channel.queue_bind("bridge.mine", exchange, key)

    return bind


ALLOWED: dict[str, list[tuple[str, Action]]] = {
    "bridge": [
        ("bind one user's events", bind_own("user.42.#")),
        ("bind some of them", bind_own("user.a%2Eb~.job.*")),
        ("bind a group's", bind_own("group.ops.#")),
        ("bind everybody's", bind_own("all.#")),
    ],
    "worker-jobs": [
        ("publish a job event to a user", publish("user.42.job.completed")),
        ("publish to a user with an odd name", publish("user.a%2Eb.job.progress")),
    ],
}

REFUSED: dict[str, list[tuple[str, Action]]] = {
    "bridge": [
        ("bind all users' events", bind_own("user.*.#")),
        ("bind all users' events at once", bind_own("user.#")),
        ("bind everything", bind_own("#")),
        ("bind all groups'", bind_own("group.*.job.completed")),
        ("publish an event", publish("user.42.job.completed")),
        ("delete the log", lambda c: c.queue_delete("events.log")),
        ("make a log", lambda c: c.queue_declare("events.log2", durable=True, arguments={"x-queue-type": "stream"})),
        ("bind the log to another exchange", lambda c: c.queue_bind("events.log", "amq.fanout", "")),
        ("unbind the log", lambda c: c.queue_unbind("events.log", "events", "#")),
        ("read the refused messages", lambda c: c.basic_consume("events.invalid", _nothing)),
        ("purge the refused messages", lambda c: c.queue_purge("events.invalid")),
        ("delete the exchange", lambda c: c.exchange_delete("events")),
        ("make an exchange", lambda c: c.exchange_declare("other")),
        ("read other exchanges", bind_own("#", "amq.topic")),
        ("write to other exchanges", publish("user.42.job.completed", "amq.topic")),
    ],
    "bridge-operator": [
        ("publish an event", publish("user.42.job.completed")),
        ("write without an exchange", publish("events.log", "")),
        ("read the log", lambda c: c.basic_consume("events.log", _nothing, arguments={"x-stream-offset": "first"})),
        ("make a queue like the bridge's", lambda c: c.queue_declare("bridge.live.mine")),
        ("delete the control exchange", lambda c: c.exchange_delete("bridge.control")),
    ],
    "worker-jobs": [
        ("publish a billing event", publish("user.42.billing.notice")),
        ("publish to a group", publish("group.ops.job.completed")),
        ("publish to everybody", publish("all.job.completed")),
        ("publish with a longer key", publish("user.42.x.job.completed")),
        ("write into the log without the exchange", publish("events.log", "")),
        ("write into the quarantine", publish("events.invalid", "")),
        ("end a user's streams", publish("kick", "bridge.control")),
        ("make a queue", lambda c: c.queue_declare("mine")),
        ("make a queue with a name like the bridge's", lambda c: c.queue_declare("bridge.mine")),
        ("bind a queue to the exchange", lambda c: c.queue_bind("events.invalid", "events", "user.42.#")),
        ("read the log", lambda c: c.basic_consume("events.log", _nothing, arguments={"x-stream-offset": "first"})),
        ("read the refused messages", lambda c: c.basic_get("events.invalid")),
        ("delete the log", lambda c: c.queue_delete("events.log")),
        ("delete the exchange", lambda c: c.exchange_delete("events")),
    ],
}


class Channels:
    """Opens a new channel for each action: a refusal closes it."""

    def __init__(self, vhost: Vhost) -> None:
        self._vhost = vhost
        self._connections: dict[str, aio_pika.abc.AbstractConnection] = {}

    async def open(self, user: str) -> Channel:
        if user not in self._connections:
            self._connections[user] = await aio_pika.connect(url_of(self._vhost, user))
        channel = await self._connections[user].channel()
        underlay = await channel.get_underlay_channel()
        await underlay.basic_qos(prefetch_count=1)
        return underlay

    async def close(self) -> None:
        for connection in self._connections.values():
            await connection.close()


@pytest.fixture
async def channels(rights: Vhost) -> AsyncIterator[Channels]:
    made = Channels(rights)
    yield made
    await made.close()


async def attempt(channels: Channels, user: str, action: Action) -> None:
    channel = await channels.open(user)
    await action(channel)
    await channel.basic_qos(prefetch_count=1)  # A publish without a confirm is refused here at the latest.
    if user == "bridge":
        await channel.queue_delete("bridge.mine")
    await channel.close()


async def refusal(channels: Channels, user: str, action: Action) -> str | None:
    try:
        await attempt(channels, user, action)
    except aiormq.exceptions.ChannelAccessRefused as refused:
        return str(refused)
    return None


async def test_no_user_can_do_more(channels: Channels) -> None:
    for user, actions in ALLOWED.items():
        for what, action in actions:
            assert await refusal(channels, user, action) is None, f"{user} could not {what}"
    for user, actions in REFUSED.items():
        for what, action in actions:
            assert "ACCESS_REFUSED" in (await refusal(channels, user, action) or ""), f"{user} could {what}"


@pytest.mark.queues
async def test_a_bridge_cannot_read_the_live_queues_of_another(
    rights: Vhost, start: StartService, connect: OpenStream, channels: Channels
) -> None:
    """Both log in as the same user, whose rights cover both. Live queues are exclusive, and that separates them."""
    service = await start(amqp_url=bridge_url(rights))
    await connect(service, "42")
    (queue,) = rights.live_queues()
    actions: list[Action] = [
        lambda c: c.basic_consume(queue, _nothing),
        lambda c: c.queue_bind(queue, "events", "all.#"),
        lambda c: c.queue_delete(queue),
    ]
    for action in actions:
        with pytest.raises(aiormq.exceptions.ChannelLockedResource):
            await action(await channels.open("bridge"))


# The same for the operator.


def _in_definitions(manifest: Manifest) -> dict[str, Any]:
    spec = manifest["spec"]
    match manifest["kind"]:
        case "Exchange":
            return {"name": spec["name"], "type": spec["type"], "durable": spec["durable"]}
        case "Queue":
            kind = {"x-queue-type": spec["type"]}
            return {"name": spec["name"], "durable": spec["durable"], "arguments": kind | spec["arguments"]}
        case "Binding":
            return {
                "source": spec["source"],
                "destination": spec["destination"],
                "destination_type": spec["destinationType"],
                "routing_key": spec["routingKey"],
            }
        case "User":
            return {"name": manifest["metadata"]["name"]}
        case _:
            return {"user": spec["userReference"]["name"], **spec["permissions"]}


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        ("Exchange", "exchanges"),
        ("Queue", "queues"),
        ("Binding", "bindings"),
        ("User", "users"),
        ("Permission", "permissions"),
        ("TopicPermission", "topic_permissions"),
    ],
)
def test_the_operators_resources_say_the_same(kind: str, section: str) -> None:
    for overlay in ["production-keda"]:  # The one with the example of a publisher.
        made = [_in_definitions(manifest) for manifest in of_kind(render(f"overlays/{overlay}"), kind)]
        wanted = DEFINITIONS[section]
        assert len(made) == len(wanted)
        for one in made:
            assert any(one.items() <= other.items() for other in wanted), one


def test_the_file_has_no_password() -> None:
    assert {user["password_hash"] for user in DEFINITIONS["users"]} == {""}
    assert all(not user["tags"] for user in DEFINITIONS["users"])
