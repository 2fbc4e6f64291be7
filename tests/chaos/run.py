"""`python -m tests.chaos.run --seconds 60 --seed 7`: everything at once, and then nothing may be missing.

Real processes: a RabbitMQ node, replicas of the bridge, each by a TCP proxy of its own. Faults are drawn with a seed,
which is printed; the same seed draws the same faults, though the machine's timing differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from deploy.local.node import MACHINES, Installation, Node, free_ports
from tests.chaos.oracle import Client, Ledger, Verdict, judge, publish
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost
from tests.service import Service

REPLICAS = 2
USERS = 12
GROUPS = 3
CLIENTS = 24
PUBLISHERS = 3
QUIET_SECONDS = 2 * PATIENCE
LEAST_EVENTS = 500
"""The storm lasts until so many were confirmed: a slow machine publishes few of them a second."""


class Chaos:
    def __init__(self, seed: int, *, rate: float, nodes: int, rabbitmq: Installation) -> None:
        self.chance = random.Random(seed)
        self.rate = rate
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        first = Node(folder / "0", management=True, rabbitmq=rabbitmq)
        self.nodes = [first, *(Node(folder / str(number), peer=first, rabbitmq=rabbitmq) for number in range(1, nodes))]
        self.faults: Counter[str] = Counter()
        self.ledger = Ledger()
        self.clients: list[Client] = []
        self.replicas: list[Service] = []
        self.proxies: list[Proxy] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> Verdict:
        first, *others = self.nodes
        await asyncio.to_thread(first.start)
        for node in others:
            await asyncio.to_thread(node.start)
            await asyncio.to_thread(node.join, first)
        self.version = first.ctl("version").strip()
        self.vhost = Vhost(first)
        self.vhost.create()
        try:
            for port in free_ports(REPLICAS):
                proxies = [Proxy(node.port) for node in self.nodes]
                for proxy in proxies:
                    await proxy.open()
                self.proxies += proxies
                service = Service(
                    ",".join(self.vhost.url_at(proxy.port) + "?heartbeat=4" for proxy in proxies),
                    BIND=f"127.0.0.1:{port}",
                    DRAIN_SECONDS="1",
                    RETRY_SECONDS="0.5",
                    HEARTBEAT_SECONDS="2",
                    STALL_SECONDS="5",
                    MAX_AGE_SECONDS="30",
                    BACKLOG_EVENTS="200",
                )
                self.replicas.append(service)
                await service.start()
            for node in self.nodes:
                node.flush()
            return await self._storm(seconds)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for service in self.replicas:
                await service.stop()
            for proxy in self.proxies:
                await proxy.__aexit__(None, None, None)
            self.vhost.close()
            for node in self.nodes:
                node.remove()

    def _start(self, work: Awaitable[None]) -> asyncio.Task[None]:
        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        return task

    async def _storm(self, seconds: float) -> Verdict:
        for number in range(CLIENTS):
            groups = tuple(str(group) for group in range(GROUPS) if self.chance.random() < 0.4)
            own = random.Random(self.chance.random())
            client = Client(str(number % USERS), groups, self.replicas, own, longest_pause=self.chance.uniform(1, 2))
            self.clients.append(client)
            self._start(client.run())
        stop = asyncio.Event()
        ports = [node.port for node in self.nodes]
        publishers = [
            self._start(
                publish(n, ",".join(map(self.vhost.url_at, ports)), USERS, GROUPS, self.rate, self.ledger, stop)
            )
            for n in range(PUBLISHERS)
        ]
        faults: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (6, self.cut_client),
            (3, self.stall_client),
            (3, self.cut_amqp),
            (2, self.stall_amqp),
            (2, self.refuse_amqp),
            (2, self.delete_queue),
            (2, self.kill_replica),
            (2, self.drain_replica),
            (1, self.kill_broker),
        ]
        ends = time.monotonic() + seconds
        while time.monotonic() < ends or self.ledger.confirmed < LEAST_EVENTS:
            await asyncio.sleep(self.chance.uniform(0.2, 2.0))  # The pause between two faults.
            (fault,) = self.chance.choices([what for _, what in faults], [weight for weight, _ in faults])
            self.faults[fault.__name__] += 1
            await fault()
        stop.set()
        await asyncio.wait(publishers, timeout=PATIENCE)
        return await self._come_to_rest()

    async def _come_to_rest(self) -> Verdict:
        deadline = time.monotonic() + QUIET_SECONDS
        while True:
            verdict = judge(self.ledger, self.clients)
            if verdict.good or time.monotonic() > deadline:
                return verdict
            await asyncio.sleep(1)  # Between two looks.

    # Faults.

    async def cut_client(self) -> None:
        for client in self.chance.sample(self.clients, 3):
            client.cut()

    async def stall_client(self) -> None:
        self._start(self.chance.choice(self.clients).stall(self.chance.uniform(1, 8)))

    async def cut_amqp(self) -> None:
        self.chance.choice(self.proxies).cut()

    async def stall_amqp(self) -> None:
        proxy = self.chance.choice(self.proxies)
        proxy.stall()
        await asyncio.sleep(self.chance.uniform(0.2, 3))  # The fault lasts for so long.
        proxy.flow()

    async def refuse_amqp(self) -> None:
        proxy = self.chance.choice(self.proxies)
        await proxy.refuse()
        proxy.cut()
        await asyncio.sleep(self.chance.uniform(0.2, 3))  # The fault lasts for so long.
        await proxy.open()

    async def delete_queue(self) -> None:
        queues = sorted(name for name in self.vhost.queues() if name.startswith("bridge."))
        if queues:
            await asyncio.to_thread(self.vhost.delete_queue, self.chance.choice(queues))

    async def kill_replica(self) -> None:
        await self._restart(signal.SIGKILL)

    async def drain_replica(self) -> None:
        await self._restart(signal.SIGTERM)

    async def _restart(self, number: signal.Signals) -> None:
        service = self.chance.choice(self.replicas)
        assert service.is_running, f"a replica ended by itself:\n{service.text[-6000:]}"
        service.signal(number)
        code = await service.ended()
        assert number == signal.SIGKILL or code == 0, f"a drain ended with {code}:\n{service.text[-3000:]}"
        await service.start(ready=False)

    async def kill_broker(self) -> None:
        node = self.chance.choice(self.nodes)
        await asyncio.to_thread(node.kill)
        await asyncio.sleep(self.chance.uniform(0, 2))  # The fault lasts for so long.
        await asyncio.to_thread(node.start)
        if len(self.nodes) > 1:  # One of them may be down at a time.
            await asyncio.to_thread(self.vhost.wait_for_log, node, len(self.nodes))

    def report(self, verdict: Verdict, seed: int, seconds: float) -> dict[str, object]:
        return {
            "rabbitmq": self.version,
            "nodes": len(self.nodes),
            "seed": seed,
            "seconds": round(seconds),
            "published": self.ledger.confirmed,
            "publish_retries": self.ledger.retries,
            "owed": verdict.owed,
            "missing": len(verdict.missing),
            "disorder": len(verdict.disorder),
            "strangers": len(verdict.strangers),
            "duplicates": verdict.duplicates,
            "gaps_told": sum(client.gaps for client in self.clients),
            "connects": sum(client.connects for client in self.clients),
            "resumed": sum(client.resumed for client in self.clients),
            "phantoms": sum(client.phantoms for client in self.clients),
            "faults": dict(self.faults),
        }


async def chaos(
    seed: int, seconds: float, *, rate: float = 20.0, nodes: int = 1, rabbitmq: Installation = MACHINES
) -> tuple[dict[str, object], Verdict, Chaos]:
    began = time.monotonic()
    storm = Chaos(seed, rate=rate, nodes=nodes, rabbitmq=rabbitmq)
    verdict = await storm.run(seconds)
    return storm.report(verdict, seed, time.monotonic() - began), verdict, storm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    options = parser.parse_args()
    # The publishers' library tells of each connection that is cut, with a traceback; here that is what is meant to be.
    for library in ("aiormq", "aio_pika"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    first = options.seed if options.seed is not None else random.randrange(10**6)
    failed = 0
    for seed in range(first, first + options.rounds):
        print(f"==> seed {seed}", file=sys.stderr, flush=True)
        report, verdict, storm = asyncio.run(chaos(seed, options.seconds, nodes=options.nodes))
        print(json.dumps(report), flush=True)
        if not verdict.good:
            failed += 1
            for line in [*verdict.missing, *verdict.disorder, *verdict.strangers][:20]:
                print("   ", line, file=sys.stderr, flush=True)
            for number, service in enumerate(storm.replicas):
                path = Path(tempfile.gettempdir()) / f"chaos-{seed}-replica-{number}.log"
                path.write_text(service.text)
                print(f"    log: {path}", file=sys.stderr, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
