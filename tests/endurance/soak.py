"""`python -m tests.endurance.soak --seconds 3600`: a bridge under steady load, with its resources every few minutes.

Clients return with the last id that they saw, streams rotate, and publishers send single events and bursts. From time
to time clients' connections and the connection to RabbitMQ are cut. At the end no event may be missing, and no resource
may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import random
import re
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from bridge import Audience
from deploy.local.node import Installation, Node
from tests.chaos.oracle import Client, Ledger, Verdict, burst, publish, wait_for_verdict
from tests.client import Stream
from tests.endurance.counts import CountedService, Counts
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import INSTALLATIONS, Vhost
from tests.service import mint

CLIENTS = 100
USERS = 50
GROUPS = 5
PUBLISHERS = 3
RATE = 10.0
SAMPLES = 12

BURST_EVERY = 60.0
CUT_CLIENTS_EVERY = 20.0
LOSE_EVERY = 300.0
"""Seconds between two bursts, two cuts of five clients, and two losses of the connection to RabbitMQ."""


@dataclass
class Sample:
    minutes: float
    published: int
    delivered: int
    connects: int
    cpu_seconds: float
    p99_ms: float
    counts: Counts

    def row(self, before: Sample) -> str:
        """A row of the table: what happened since the sample before, and the resources now."""
        seconds = 60 * (self.minutes - before.minutes)
        cells = [
            f"{self.minutes:.1f}",
            f"{self.published - before.published:,}",
            f"{self.delivered - before.delivered:,}",
            f"{self.connects - before.connects:,}",
            f"{self.p99_ms:.0f}" if math.isfinite(self.p99_ms) else "over 10000",
            f"{100 * (self.cpu_seconds - before.cpu_seconds) / seconds:.0f} %",
            self.counts.queues,
            self.counts.bindings,
            self.counts.descriptors,
            self.counts.tasks,
            f"{self.counts.objects:,}",
            self.counts.rss_mb,
        ]
        return f"| {' | '.join(map(str, cells))} |"


TITLES = ["minute", "published", "delivered", "connects", "p99, ms", "CPU", "queues", "bindings", "file descriptors",
          "tasks", "objects", "RSS, MB"]  # fmt: skip
HEAD = f"| {' | '.join(TITLES)} |\n|{' --- |' * len(TITLES)}"


class Soak:
    def __init__(self, vhost: Vhost, proxy: Proxy, service: CountedService) -> None:
        self.vhost = vhost
        self.proxy = proxy
        self.service = service
        self.ledger = Ledger()
        self.clients: list[Client] = []
        self._chance = random.Random("soak")
        self._began = time.monotonic()
        self._buckets: dict[float, float] = {}

    async def run(self, seconds: float) -> tuple[Verdict, Counts, Counts]:
        for _ in range(20):  # Each of the bridge's channel workers opens a channel with its first stream, and keeps it.
            async with Stream(self.service.public, mint("first")) as first:
                await first.ready()
        before = await self.service.stable_counts(self.vhost)
        for number in range(CLIENTS):
            groups = tuple(str(group) for group in range(GROUPS) if self._chance.random() < 0.3)
            own = random.Random(self._chance.random())
            self.clients.append(Client(str(number % USERS), groups, [self.service], own, longest_pause=2))
        streams = [asyncio.create_task(client.run()) for client in self.clients]
        stop = asyncio.Event()
        publishers = [
            asyncio.create_task(publish(n, self.vhost.url, USERS, GROUPS, RATE, self.ledger, stop))
            for n in range(PUBLISHERS)
        ]
        faults = [
            asyncio.create_task(self._every(BURST_EVERY, self._burst)),
            asyncio.create_task(self._every(CUT_CLIENTS_EVERY, self._cut_clients)),
            asyncio.create_task(self._every(LOSE_EVERY, self._lose)),
        ]
        self._began = time.monotonic()
        last = await self._sample()
        print(HEAD, flush=True)
        for number in range(1, SAMPLES + 1):
            await asyncio.sleep(max(0.0, self._began + number * seconds / SAMPLES - time.monotonic()))  # The soak.
            now = await self._sample()
            print(now.row(last), flush=True)
            last = now
        for task in faults:
            task.cancel()
        await asyncio.gather(*faults, return_exceptions=True)
        stop.set()
        await asyncio.wait(publishers)
        verdict = await wait_for_verdict(self.ledger, self.clients, PATIENCE)
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        return verdict, before, await self.service.stable_counts(self.vhost, before)

    async def _every(self, seconds: float, happens: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)  # The interval.
            await happens()

    async def _burst(self) -> None:
        user, group = self._chance.randrange(USERS), self._chance.randrange(GROUPS)
        audiences = [Audience.user(str(user)), Audience.everyone(), Audience.group(str(group))]
        await burst(self.vhost.url, audiences, 600, self.ledger)

    async def _cut_clients(self) -> None:
        for client in self._chance.sample(self.clients, 5):
            client.cut()

    async def _lose(self) -> None:
        self.proxy.cut()

    async def _sample(self) -> Sample:
        counts = await self.service.count(self.vhost)
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            text = (await client.get(f"{self.service.internal}/metrics")).text
        series = dict(line.rpartition(" ")[::2] for line in text.splitlines() if not line.startswith("#"))
        buckets = {
            float(match[1]): float(value)
            for name, value in series.items()
            if (match := re.fullmatch(r'bridge_delivery_seconds_bucket\{le="([^"]+)"\}', name))
        }
        grown = {bound: value - self._buckets.get(bound, 0.0) for bound, value in buckets.items()}
        self._buckets = buckets
        most = max(grown.values(), default=0.0)
        p99 = next((bound for bound, value in sorted(grown.items()) if value >= 0.99 * most), float("nan"))
        return Sample(
            minutes=(time.monotonic() - self._began) / 60,
            published=self.ledger.confirmed,
            delivered=int(float(series["bridge_events_delivered_total"])),
            connects=sum(each.connects for each in self.clients),
            cpu_seconds=float(series["process_cpu_seconds_total"]),
            p99_ms=1000 * p99,
            counts=counts,
        )


async def soak(rabbitmq: Installation, seconds: float) -> bool:
    """Whether no event was missing and no resource is left. Prints the table row by row."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        node = Node(Path(folder) / "node", management=True, rabbitmq=rabbitmq)
        try:
            await asyncio.to_thread(node.start)
            vhost = Vhost(node)
            vhost.create()
            async with Proxy(node.port) as proxy:
                service = CountedService(
                    vhost.url_at(proxy.port),
                    Path(folder),
                    MAX_AGE_SECONDS="120",
                    RETRY_SECONDS="0.5",
                    BACKLOG_EVENTS="5000",
                )
                await service.start()
                try:
                    run = Soak(vhost, proxy, service)
                    print(f"RabbitMQ {rabbitmq.version}, {seconds / 60:.0f} minutes, {CLIENTS} streams\n", flush=True)
                    verdict, before, after = await run.run(seconds)
                finally:
                    await service.stop()
            vhost.close()
        finally:
            node.remove()
    found = {
        "expected": verdict.expected,
        "missing": len(verdict.missing),
        "disorder": len(verdict.disorder),
        "other_audiences": len(verdict.other_audiences),
        "repeats": len(verdict.repeats),
        "duplicates": verdict.duplicates,
        "gaps": sum(client.gaps for client in run.clients),
        "tracebacks": sum("Traceback" in line for line in service.warnings),
        "counts_before": before.exact,
        "counts_after": after.exact,
        "rss_mb_before": before.rss_mb,
        "rss_mb_after": after.rss_mb,
    }
    print(f"\n{json.dumps(found)}", flush=True)
    for line in verdict.faults[:20]:
        print("   ", line, flush=True)
    if after.exact != before.exact:
        print(after.differs(before), flush=True)
    return verdict.good and after.exact == before.exact and not found["tracebacks"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3_600)
    parser.add_argument("--rabbitmq", default="", help="only versions that begin so; the last of them is used")
    options = parser.parse_args()
    for library in ("aiormq", "aio_pika", "asyncio"):  # They report each connection that is cut.
        logging.getLogger(library).setLevel(logging.CRITICAL)
    chosen = [each for each in INSTALLATIONS if each.version.startswith(options.rabbitmq)]
    raise SystemExit(not asyncio.run(soak(chosen[-1], options.seconds)))


if __name__ == "__main__":
    main()
