"""`python -m tests.chaos.run --seconds 60 --seed 7`: many faults under load, and then no event may be missing.

It uses real processes: a RabbitMQ node, and replicas of the bridge, each behind its own TCP proxy. Faults are chosen
with a seed, which is printed. The same seed chooses the same faults, though the machine's timing differs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from bridge import Audience
from deploy.local.node import MACHINES, Installation, Node, NodeFailed, free_ports
from tests.chaos import inside
from tests.chaos.oracle import Client, Ledger, Verdict, burst, publish, wait_for_verdict
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import INSTALLATIONS, Vhost
from tests.service import FEEDS, Service

REPLICAS = 2
USERS = 12
GROUPS = 3
CLIENTS = 24
PUBLISHERS = 3
QUIET_SECONDS = 2 * PATIENCE
LEAST_EVENTS = 500
"""Faults continue until so many events are confirmed: a slow machine publishes few events a second."""

BACKLOGS = [{"BACKLOG_EVENTS": "200"}, {"BACKLOG_EVENTS": "10000", "BACKLOG_BYTES": "10000000"}]
"""The two replicas: one ends streams as `slow` in a burst, the other buffers a whole burst for each stream."""

DESCRIPTORS = 200
"""The hard limit of file descriptors of the second replica: enough for all clients and for RabbitMQ."""

LEAST_PAUSE = 4.0
LONGEST_PAUSE = 60.0
LONGEST_IN_A_CLUSTER = 20.0
"""Seconds. A cluster treats a node that is silent for 45 s as down (net_ticktime). Such a node does not join again by
itself."""

LONGEST_JUMP = 3_600.0
"""Seconds by which a replica's wall clock is wrong, at most, in either direction."""

DISK_LIMIT = "50MB"
"""As in deploy/local/node.py."""


class Chaos:
    """
    Args:
        longest: seconds that a pause of a process, or an alarm, lasts at most.
    """

    def __init__(self, seed: int, *, rate: float, nodes: int, rabbitmq: Installation, longest: float) -> None:
        self.chance = random.Random(seed)
        self.rate = rate
        self.longest = min(longest, LONGEST_PAUSE if nodes == 1 else LONGEST_IN_A_CLUSTER)
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        first = Node(self._folder / "0", management=True, rabbitmq=rabbitmq)
        self.nodes = [
            first,
            *(Node(self._folder / str(number), peer=first, rabbitmq=rabbitmq) for number in range(1, nodes)),
        ]
        self.faults: Counter[str] = Counter()
        self.ledger = Ledger()
        self.clients: list[Client] = []
        self.replicas: list[Service] = []
        self.clocks: list[inside.Clock] = []
        self.proxies: list[Proxy] = []
        self.most_descriptors = 0
        self.shortages = 0
        """How often the second replica had no descriptor left, or closed connections before that."""
        self.crashes: list[str] = []
        """What the replicas logged with a traceback."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._faults: list[asyncio.Task[None]] = []
        self._broker_free = asyncio.Lock()
        self._replica_free = [asyncio.Lock() for _ in range(REPLICAS)]

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
            for number, port in enumerate(free_ports(REPLICAS)):
                await self._start_replica(number, port)
            for node in self.nodes:
                node.flush()
            return await self._run_faults(seconds)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for service in self.replicas:
                self._record_crashes(service)
                await service.stop()
            for proxy in self.proxies:
                await proxy.__aexit__(None, None, None)
            self.vhost.close()
            for node in self.nodes:
                node.remove()
            shutil.rmtree(self._folder)

    async def _start_replica(self, number: int, port: int) -> None:
        proxies = [Proxy(node.port) for node in self.nodes]
        for proxy in proxies:
            await proxy.open()
        self.proxies += proxies
        clock = inside.Clock(self._folder / f"clock-{number}")
        self.clocks.append(clock)
        service = Service(
            ",".join(self.vhost.url_at(proxy.port) + "?heartbeat=4" for proxy in proxies),
            BIND=f"127.0.0.1:{port}",
            DRAIN_SECONDS="1",
            RETRY_SECONDS="0.5",
            HEARTBEAT_SECONDS="2",
            STALL_SECONDS="5",
            MAX_AGE_SECONDS="30",
            FEED=FEEDS[number % len(FEEDS)],
        )
        for name, value in BACKLOGS[number].items():
            service.set(name, value)
        service.set_variable(inside.CLOCK, str(clock.path))
        if number == 1:
            service.set_variable(inside.DESCRIPTORS, str(DESCRIPTORS))
        self.replicas.append(service)
        await service.start()

    def _start(self, work: Awaitable[None]) -> asyncio.Task[None]:
        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        return task

    async def _run_faults(self, seconds: float) -> Verdict:
        for number in range(CLIENTS):
            groups = tuple(str(group) for group in range(GROUPS) if self.chance.random() < 0.4)
            own = random.Random(self.chance.random())
            client = Client(str(number % USERS), groups, self.replicas, own, longest_pause=self.chance.uniform(1, 2))
            self.clients.append(client)
            self._start(client.run())
        stop = asyncio.Event()
        urls = ",".join(self.vhost.url_at(node.port) for node in self.nodes)
        publishers = [
            self._start(publish(n, urls, USERS, GROUPS, self.rate, self.ledger, stop)) for n in range(PUBLISHERS)
        ]
        ends = time.monotonic() + seconds
        chosen = self._choose()
        while time.monotonic() < ends or self.ledger.confirmed < LEAST_EVENTS or len(self.faults) < len(self.weights):
            await asyncio.sleep(self.chance.uniform(0.2, 2.0))  # The pause between two faults.
            fault = next(chosen)
            self.faults[fault.__name__] += 1
            await fault()
            for task in self._faults:
                if task.done():
                    task.result()  # A fault that failed ends the run.
        await asyncio.gather(*self._faults)
        for clock in self.clocks:
            clock.set(0.0)
        stop.set()
        await asyncio.wait(publishers, timeout=PATIENCE)
        return await wait_for_verdict(self.ledger, self.clients, QUIET_SECONDS)

    @property
    def weights(self) -> list[tuple[int, Callable[[], Awaitable[None]]]]:
        return [
            (6, self.cut_client),
            (3, self.stall_client),
            (3, self.half_close_client),
            (2, self.segment_client),
            (3, self.cut_amqp),
            (2, self.stall_amqp),
            (2, self.refuse_amqp),
            (2, self.half_close_amqp),
            (2, self.segment_amqp),
            (2, self.close_amqp),
            (2, self.delete_queue),
            (2, self.kill_replica),
            (2, self.drain_replica),
            (3, self.pause_replica),
            (2, self.exhaust_descriptors),
            (3, self.jump_clock),
            (3, self.burst),
            (3, self.burst_into_pause),
            (1, self.kill_broker),
            (2, self.pause_broker),
            (1, self.disk_alarm),
        ]

    def _choose(self) -> Iterator[Callable[[], Awaitable[None]]]:
        """Each fault once, in random order, and then by weight. While a fault of RabbitMQ lasts, no other of these is
        added."""
        weights, faults = zip(*self.weights, strict=True)
        yield from self.chance.sample(faults, len(faults))
        of_broker = {self.kill_broker, self.pause_broker, self.disk_alarm, self.burst_into_pause}
        while True:
            (fault,) = self.chance.choices(faults, weights)
            if not (fault in of_broker and self._broker_free.locked()):
                yield fault

    # Faults. A fault that lasts runs in the background of the next ones. Random choices are made before it starts, so
    # that a seed always gives the same faults.

    def _in_background(self, work: Awaitable[None]) -> None:
        self._faults.append(self._start(work))

    def _seconds(self) -> float:
        """How long a fault lasts: mostly short, sometimes as long as allowed."""
        seconds: float = self.longest ** self.chance.random()
        return seconds

    async def cut_client(self) -> None:
        for client in self.chance.sample(self.clients, 3):
            client.cut()

    async def stall_client(self) -> None:
        self._start(self.chance.choice(self.clients).stall(self.chance.uniform(1, 8)))

    async def half_close_client(self) -> None:
        for client in self.chance.sample(self.clients, 3):
            client.half_close()

    async def segment_client(self) -> None:
        for client in self.chance.sample(self.clients, 3):
            self._start(client.segment(self._seconds()))

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

    async def half_close_amqp(self) -> None:
        self.chance.choice(self.proxies).half_close()

    async def segment_amqp(self) -> None:
        """RabbitMQ and a replica get each other's bytes in segments of one byte."""
        proxy, seconds = self.chance.choice(self.proxies), self.chance.uniform(0.5, 3)

        async def lasts() -> None:
            proxy.segment_bytes = 1
            await asyncio.sleep(seconds)  # The fault lasts for so long.
            proxy.segment_bytes = None

        self._in_background(lasts())

    async def close_amqp(self) -> None:
        """RabbitMQ closes connections, as by an operator's command. The streams over HTTP stay open."""
        which = self.chance.choice(["consumer", "log reader", "log writer", "bridge", "all"])

        async def happens() -> None:
            async with self._broker_free:
                if which != "all":
                    await asyncio.to_thread(self.vhost.close_connections, named=which)
                else:  # Those of the publishers, too.
                    command = ["close_all_connections", "--vhost", self.vhost.name, "an operator's command"]
                    await asyncio.to_thread(self.nodes[0].ctl, *command)

        self._in_background(happens())

    async def delete_queue(self) -> None:
        place = self.chance.random()

        async def happens() -> None:
            async with self._broker_free:
                found = await asyncio.to_thread(self.vhost.queues)
                queues = sorted(name for name in found if name.startswith("bridge."))
                if queues:
                    # The queue may be gone already, if its stream has ended.
                    with contextlib.suppress(NodeFailed):
                        await asyncio.to_thread(self.vhost.delete_queue, queues[int(place * len(queues))])

        self._in_background(happens())

    async def kill_replica(self) -> None:
        await self._restart(signal.SIGKILL)

    async def drain_replica(self) -> None:
        await self._restart(signal.SIGTERM)

    async def _restart(self, by: signal.Signals) -> None:
        number = self.chance.randrange(REPLICAS)

        async def happens() -> None:
            async with self._replica(number) as service:
                service.signal(by)
                code = await service.ended()
                assert by == signal.SIGKILL or code == 0, f"a drain ended with {code}:\n{service.text[-3000:]}"
                self._record_crashes(service)
                await service.start(ready=False)

        self._in_background(happens())

    @contextlib.asynccontextmanager
    async def _replica(self, number: int) -> AsyncIterator[Service]:
        """A replica, without any other fault of it during the block."""
        async with self._replica_free[number]:
            service = self.replicas[number]
            assert service.is_running, f"a replica ended by itself:\n{service.text[-6000:]}"
            yield service

    def _record_crashes(self, service: Service) -> None:
        self.crashes += [str(line) for line in service.lines if "Traceback" in str(line) or line.get("exception")]

    async def pause_replica(self) -> None:
        """A pause as by throttling, a move of the machine or garbage collection."""
        number, seconds = self.chance.randrange(REPLICAS), self._seconds()

        async def lasts() -> None:
            async with self._replica(number) as service:
                service.signal(signal.SIGSTOP)
                await asyncio.sleep(seconds)  # The fault lasts for so long.
                service.signal(signal.SIGCONT)

        self._in_background(lasts())

    async def exhaust_descriptors(self) -> None:
        """Opens sockets to the second replica until it has no descriptor left, or closes some of them. Each sends half
        of a request."""
        seconds, half_closed = self._seconds(), self.chance.random() < 0.5

        async def lasts() -> None:
            async with self._replica(1) as service:
                address = urlsplit(service.public)
                where = (address.hostname, address.port)
                opened: list[socket.socket] = []
                try:
                    for _ in range(DESCRIPTORS + 50):
                        opened.append(socket.socket())
                        opened[-1].setblocking(False)
                        with contextlib.suppress(OSError):
                            await asyncio.get_running_loop().sock_connect(opened[-1], where)
                            opened[-1].send(b"GET /events HTTP/1.1\r\nHost: ")
                    async with asyncio.timeout(PATIENCE):
                        while not self._is_short(service, opened):  # noqa: ASYNC110 - It gives no signal.
                            await asyncio.sleep(0.1)  # Between two checks.
                    if half_closed:
                        for each in opened:
                            with contextlib.suppress(OSError):
                                each.shutdown(socket.SHUT_WR)
                    await asyncio.sleep(seconds)  # The fault lasts for so long.
                finally:
                    for each in opened:
                        each.close()

        self._in_background(lasts())

    def _is_short(self, service: Service, opened: list[socket.socket]) -> bool:
        """Whether the replica has no descriptor left, or has closed some of these sockets."""
        used = len(os.listdir(f"/proc/{service.pid}/fd"))
        self.most_descriptors = max(self.most_descriptors, used)
        closed = select.poll()
        for each in opened:
            closed.register(each, select.POLLIN)
        if used >= DESCRIPTORS - 5 or closed.poll(0):
            self.shortages += 1
            return True
        return False

    async def jump_clock(self) -> None:
        """The wall clock of a replica jumps: up to an hour in either direction, some seconds, or to the right time."""
        clock = self.chance.choice(self.clocks)
        jumps = [self.chance.uniform(-LONGEST_JUMP, LONGEST_JUMP), self.chance.uniform(-2, 2), 0.0]
        clock.set(self.chance.choice(jumps))

    async def burst(self) -> None:
        """One publisher on one channel, to one user, to everybody and to a group in turn."""
        user, group = self.chance.randrange(USERS), self.chance.randrange(GROUPS)
        audiences = [Audience.user(str(user)), Audience.everyone(), Audience.group(str(group))]
        node, count = self.chance.choice(self.nodes), self.chance.randrange(1_000, 4_000)
        self._in_background(burst(self.vhost.url_at(node.port), audiences, count, self.ledger))

    async def burst_into_pause(self) -> None:
        """A burst fills the queues of a stopped replica. While it catches up, clients' connections are cut."""
        number, closes = self.chance.randrange(REPLICAS), self.chance.random() < 0.3
        cuts = [(self.chance.uniform(0, 0.5), client) for client in self.chance.sample(self.clients, 12)]
        user, count = self.chance.randrange(USERS), self.chance.randrange(1_000, 4_000)
        audiences = [Audience.user(str(user)), Audience.everyone()]
        url = self.vhost.url_at(self.chance.choice(self.nodes).port)

        async def lasts() -> None:
            async with self._broker_free, self._replica(number) as service:
                service.signal(signal.SIGSTOP)
                try:
                    await burst(url, audiences, count, self.ledger)
                    if closes:
                        await asyncio.to_thread(self.vhost.close_connections, named="consumer")
                finally:
                    service.signal(signal.SIGCONT)
            for pause, client in cuts:
                await asyncio.sleep(pause)  # Somewhere in the middle of the backlog.
                client.cut()

        self._in_background(lasts())

    async def kill_broker(self) -> None:
        node, seconds = self.chance.choice(self.nodes), self.chance.uniform(0, 2)

        async def lasts() -> None:
            async with self._broker_free:
                await asyncio.to_thread(node.kill)
                await asyncio.sleep(seconds)  # The fault lasts for so long.
                await asyncio.to_thread(node.start)
                if len(self.nodes) > 1:  # At most one of them may be down at a time.
                    await asyncio.to_thread(self.vhost.wait_for_log, node, len(self.nodes))

        self._in_background(lasts())

    async def pause_broker(self) -> None:
        node, seconds = self.chance.choice(self.nodes), self._seconds()

        async def lasts() -> None:
            async with self._broker_free:
                os.kill(node.pid, signal.SIGSTOP)
                await asyncio.sleep(seconds)  # The fault lasts for so long.
                os.kill(node.pid, signal.SIGCONT)

        self._in_background(lasts())

    async def disk_alarm(self) -> None:
        """RabbitMQ accepts nothing from publishers, and so no watermarks and fences of the bridge."""
        node, seconds = self.chance.choice(self.nodes), self._seconds()

        async def lasts() -> None:
            async with self._broker_free:
                await asyncio.to_thread(node.ctl, "set_disk_free_limit", "100000GB")
                await asyncio.sleep(seconds)  # The fault lasts for so long.
                await asyncio.to_thread(node.ctl, "set_disk_free_limit", DISK_LIMIT)

        self._in_background(lasts())

    def report(self, verdict: Verdict, seed: int, seconds: float) -> dict[str, object]:
        return {
            "rabbitmq": self.version,
            "nodes": len(self.nodes),
            "seed": seed,
            "seconds": round(seconds),
            "published": self.ledger.confirmed,
            "publish_retries": self.ledger.retries,
            "bursts": self.ledger.bursts,
            "bursts_reordered": len(self.ledger.reordered),
            "expected": verdict.expected,
            "missing": len(verdict.missing),
            "disorder": len(verdict.disorder),
            "other_audiences": len(verdict.other_audiences),
            "repeats": len(verdict.repeats),
            "duplicates": verdict.duplicates,
            "duplicates_most": dict((+verdict.duplicates_by_client).most_common(5)),
            "gaps": sum(client.gaps for client in self.clients),
            "connects": sum(client.connects for client in self.clients),
            "resumed": sum(client.resumed for client in self.clients),
            "empty_blocks": sum(client.empty_blocks for client in self.clients),
            "byes": dict(sum((Counter(client.byes) for client in self.clients), Counter())),
            "shortages": self.shortages,
            "most_descriptors": self.most_descriptors,
            "crashes": len(self.crashes),
            "faults": dict(self.faults),
        }


async def chaos(
    seed: int,
    seconds: float,
    *,
    rate: float = 20.0,
    nodes: int = 1,
    rabbitmq: Installation = MACHINES,
    longest: float = LONGEST_PAUSE,
) -> tuple[dict[str, object], Verdict, Chaos]:
    began = time.monotonic()
    run = Chaos(seed, rate=rate, nodes=nodes, rabbitmq=rabbitmq, longest=longest)
    verdict = await run.run(seconds)
    return run.report(verdict, seed, time.monotonic() - began), verdict, run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--rabbitmq", default="", help="only versions that begin so, as in 4 or 3.10")
    options = parser.parse_args()
    chosen = [each for each in INSTALLATIONS if each.version.startswith(options.rabbitmq)]
    if not chosen:
        there = ", ".join(each.version for each in INSTALLATIONS)
        parser.error(f"RabbitMQ {options.rabbitmq} is not installed; installed are: {there}")
    # The publishers' library logs a traceback for each connection that is cut; here this is intended.
    for library in ("aiormq", "aio_pika", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    first = options.seed if options.seed is not None else random.randrange(10**6)
    failed = 0
    for seed in range(first, first + options.rounds):
        for rabbitmq in chosen:
            print(f"==> seed {seed}, RabbitMQ {rabbitmq.version}", file=sys.stderr, flush=True)
            report, verdict, run = asyncio.run(
                chaos(
                    seed,
                    options.seconds,
                    nodes=options.nodes,
                    rabbitmq=rabbitmq,
                    longest=max(LEAST_PAUSE, options.seconds / 4),
                )
            )
            print(json.dumps(report), flush=True)
            if not verdict.good or run.crashes:
                failed += 1
                _show(f"{seed}-{rabbitmq.version}", verdict, run)
    sys.exit(1 if failed else 0)


def _show(name: str, verdict: Verdict, run: Chaos) -> None:
    for line in [*verdict.faults, *run.crashes][:20]:
        print("   ", line, file=sys.stderr, flush=True)
    for number, service in enumerate(run.replicas):
        path = Path(tempfile.gettempdir()) / f"chaos-{name}-replica-{number}.log"
        path.write_text(service.text)
        print(f"    log: {path}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
