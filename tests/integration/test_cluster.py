"""One of three nodes dies: browsers notice a pause at most, and the other nodes have all confirmed events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from bridge import Audience, Publisher
from bridge.samples.jobs import JobProgress
from deploy.local.node import Installation, Node
from tests.client import Stream
from tests.patience import PATIENCE
from tests.rabbit import Vhost
from tests.service import Service, mint

USER = Audience.user("42")


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory, rabbitmq: Installation) -> Iterator[list[Node]]:
    folder = tmp_path_factory.mktemp("cluster")
    first = Node(folder / "0", management=True, rabbitmq=rabbitmq)
    nodes = [first, *(Node(folder / str(number), peer=first, rabbitmq=rabbitmq) for number in (1, 2))]
    try:
        first.start()  # It also starts the epmd that all three use.
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.start, nodes[1:]))
        for node in nodes[1:]:
            node.join(first)
        yield nodes
    finally:
        for node in nodes:
            node.remove()


async def node_of(nodes: list[Node], service: Service, *, connects: int) -> Node:
    """The node that a bridge consumes from, as its log line says."""
    address = (await service.logged("broker connected", count=connects))["address"]
    return next(node for node in nodes if f":{node.port}/" in address)


async def test_the_node_that_a_replica_is_connected_to_dies(nodes: list[Node]) -> None:
    vhost = Vhost(nodes[0])
    vhost.create()
    addresses = ",".join(vhost.url_at(node.port) for node in nodes)
    # The quarantine may be on the node that dies. RabbitMQ 4.3 reports this only after a minute.
    service = Service(addresses, deadlines={"service.broker.feed.QUARANTINE_SECONDS": 2.0})
    publisher = Publisher(addresses, source="/cluster", timeout=PATIENCE)
    stream = Stream(service.public, "")
    try:
        await service.start()
        stream = Stream(service.public, mint("42"))
        await stream.open()
        await stream.ready()
        is_4 = nodes[0].rabbitmq.version.startswith("4.")
        victim = await node_of(nodes, service, connects=1)
        confirmed = 0

        async def publish() -> None:
            nonlocal confirmed
            while True:
                await publisher.publish(USER, JobProgress(job_id=str(confirmed), percent=1))
                confirmed += 1

        publishing = asyncio.create_task(publish())

        async def more(count: int) -> None:
            before, deadline = confirmed, time.monotonic() + PATIENCE
            while confirmed < before + count:
                assert not publishing.done(), publishing
                if time.monotonic() > deadline:
                    logs = "\n\n".join(f"{node.folder}\n{node.log_end()}" for node in nodes)
                    pytest.fail(f"{confirmed - before} of {count} events were confirmed\n{logs}\n{service.text}")
                await asyncio.sleep(0.05)  # Between two polls.

        for node in nodes:
            node.flush()
        async with stream.read_on():
            for turn in range(2):
                await more(100)
                await asyncio.to_thread(victim.kill)
                if is_4:
                    # RabbitMQ 4 still routes to the queues of a node that is down, and nacks (docs/rabbitmq.md):
                    # nothing more is confirmed until the node is back.
                    await service.logged("broker connected", count=turn + 2)
                    await asyncio.to_thread(victim.start)
                await more(100)
                if turn == 0:
                    # Then the node that took over dies: one of the two had the quarantine or the stream's leader.
                    if not is_4:
                        await asyncio.to_thread(victim.start)
                    await asyncio.to_thread(vhost.wait_for_log, victim, 3)
                    victim = await node_of(nodes, service, connects=2)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
        seen: list[int] = []
        while not seen or seen[-1] < confirmed - 1:
            frame = await stream.next()
            if frame.event == "job.progress":
                seen.append(int(frame.json["data"]["job_id"]))
            # `bridge.status`: RabbitMQ was away for longer than the pause between two heartbeats.
            known = ("job.progress", "bridge.position", "bridge.status")
            assert frame.event in known, f"{frame}\n{service.text}"
        assert seen == list(range(len(seen))), "in order, each once, on the one stream that was opened"
        cursor = stream.frames[0].id
        again = Stream(service.public, mint("42"), headers={"Last-Event-ID": cursor})
        await again.open()
        assert (await again.ready()).json["resumed"] is True
        from_log = [int((await again.next()).json["data"]["job_id"]) for _ in range(confirmed)]
        assert from_log == list(range(confirmed)), "what was confirmed is in the log on the nodes that are left"
        again.abort()
    finally:
        stream.abort()
        await publisher.close()
        await service.stop()
        vhost.close()
