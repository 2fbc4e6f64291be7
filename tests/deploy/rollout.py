"""`python -m tests.deploy.rollout`: a rolling update as Kubernetes does it, with the manifests' own numbers.

Replicas are processes. The Service is a real HAProxy: its servers are set by its runtime API, like endpoints. For each
old replica:

- A new replica starts and is ready for minReadySeconds.
- Then the old one leaves the proxy, and at the same moment its preStop begins. After preStop it gets SIGTERM.
- The next new replica starts without waiting for that.

Meanwhile events are published, and clients reconnect as browsers do. At the end every client must have each event once.

With --scale 0.1 every time of the manifests is a tenth, and also the clients' pauses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.local.node import Node, free_ports
from tests.chaos.oracle import Client, Ledger, Verdict, judge, publish
from tests.deploy.manifests import bridge, named, render, settings
from tests.deploy.proxies import program
from tests.patience import PATIENCE
from tests.rabbit import Vhost
from tests.service import Service

SLOTS = 10
"""The most servers that the proxy has at once."""

WAIT_SECONDS = PATIENCE

LEAST_EVENTS = 50
"""Events that are confirmed before the first replica stops. Each has several clients."""


@dataclass(frozen=True)
class Timings:
    """The times of the manifests, in seconds, multiplied by the scale."""

    min_ready: float
    pre_stop: float
    drain: float
    grace: float
    retry: float

    @classmethod
    def of_manifests(cls, scale: float) -> Timings:
        manifests = render("base")
        pod, container = bridge(manifests)
        return cls(
            min_ready=named(manifests, "Deployment", "bridge")["spec"]["minReadySeconds"] * scale,
            pre_stop=container["lifecycle"]["preStop"]["sleep"]["seconds"] * scale,
            drain=float(settings(manifests)["BRIDGE_DRAIN_SECONDS"]) * scale,
            # The time to close does not depend on the scale.
            grace=max(pod["terminationGracePeriodSeconds"] * scale, 60),
            retry=3 * scale,
        )


class Haproxy:
    """The Service: its servers get new streams. A server that is removed keeps its open streams."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.public = f"http://127.0.0.1:{port}"
        self._socket = folder / "admin.sock"
        self._config = folder / "haproxy.cfg"
        slots = "\n".join(f"    server s{number} 127.0.0.1:1 disabled" for number in range(SLOTS))
        self._config.write_text(f"""
global
    stats socket {self._socket} level admin
defaults
    mode http
    option http-no-delay
    timeout connect 3s
    timeout client 60s
    timeout server 60s
    retries 2
    option redispatch 1
    retry-on conn-failure
listen bridge
    bind 127.0.0.1:{port}
    balance leastconn
{slots}
""")
        self._free = list(range(SLOTS))

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(program("haproxy"), "-db", "-q", "-f", str(self._config))
        deadline = time.monotonic() + PATIENCE
        while not self._socket.exists():
            assert time.monotonic() < deadline, "HAProxy did not start"
            await asyncio.sleep(0.02)  # Between two polls.

    async def stop(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def _send(self, *commands: str) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        writer.write("; ".join(commands).encode() + b"\n")
        answer = (await reader.read()).decode().strip()
        writer.close()
        lines = [
            line
            for line in answer.splitlines()
            if line and not line.startswith(("IP changed", "no need to change", "port changed"))
        ]
        assert not lines, answer

    async def add(self, address: str) -> int:
        """Adds the server at this address, which then gets new streams; returns its slot."""
        slot = self._free.pop(0)
        host, _, port = address.removeprefix("http://").partition(":")
        await self._send(f"set server bridge/s{slot} addr {host} port {port}", f"set server bridge/s{slot} state ready")
        return slot

    async def remove(self, slot: int) -> None:
        await self._send(f"set server bridge/s{slot} state maint")
        self._free.append(slot)


class Rollout:
    def __init__(self, vhost: Vhost, timings: Timings, *, replicas: int, clients: int, rate: float, seed: int) -> None:
        self._vhost = vhost
        self._timings = timings
        self._replicas = replicas
        self._rate = rate
        self._chance = random.Random(seed)
        self._folder = tempfile.TemporaryDirectory(prefix="rollout-")
        self._users = max(1, clients // 5)
        self.proxy = Haproxy(Path(self._folder.name))
        self.ledger = Ledger()
        self.clients = [
            Client(
                str(number % self._users),
                ("ops",) * (number % 3 == 0),
                [self.proxy],
                random.Random(self._chance.random()),
            )
            for number in range(clients)
        ]
        self.pods: list[Service] = []
        self.exits: list[int] = []
        self.longest_exit = 0.0

    async def _new_pod(self) -> tuple[Service, int]:
        timings = self._timings
        pod = Service(
            self._vhost.url,
            DRAIN_SECONDS=str(timings.drain),
            RETRY_SECONDS=str(timings.retry),
        )
        self.pods.append(pod)
        await pod.start()
        return pod, await self.proxy.add(pod.public)

    async def _terminate(self, pod: Service, slot: int) -> None:
        """The removal from the endpoints begins with preStop. SIGTERM follows preStop, SIGKILL the grace period."""
        began = time.monotonic()
        await self.proxy.remove(slot)
        await asyncio.sleep(self._timings.pre_stop)  # As Kubernetes does.
        pod.signal(signal.SIGTERM)
        # TimeoutError if Kubernetes would kill it, which must not happen.
        self.exits.append(await pod.ended(seconds=self._timings.grace - self._timings.pre_stop))
        self.longest_exit = max(self.longest_exit, time.monotonic() - began)

    async def run(self) -> Verdict:
        await self.proxy.start()
        tasks: list[asyncio.Task[None]] = []
        try:
            old = await asyncio.gather(*(self._new_pod() for _ in range(self._replicas)))
            tasks += [asyncio.create_task(client.run()) for client in self.clients]
            await self._until(lambda: all(client.ready_at for client in self.clients))
            stop = asyncio.Event()
            publisher = asyncio.create_task(publish(0, self._vhost.url, self._users, 1, self._rate, self.ledger, stop))
            tasks.append(publisher)
            await self._until(lambda: self.ledger.confirmed >= LEAST_EVENTS)
            self.began = time.monotonic()
            terminating = []
            for pod, slot in old:
                await self._new_pod()
                await asyncio.sleep(self._timings.min_ready)  # As Kubernetes does.
                terminating.append(asyncio.create_task(self._terminate(pod, slot)))
            await asyncio.gather(*terminating)
            self.seconds = time.monotonic() - self.began
            # Publishing continues until all clients are back: a client notices a dead stream only without events.
            await self._until(lambda: not any(client.away for client in self.clients))
            stop.set()
            await publisher
            await self._until(lambda: judge(self.ledger, self.clients).good, must_hold=False)
            return judge(self.ledger, self.clients)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for pod in self.pods:
                await pod.stop()
            await self.proxy.stop()
            self._folder.cleanup()

    async def _until(self, condition: Callable[[], bool], *, must_hold: bool = True) -> None:
        # The last clients that got a bye wait for up to the length of a drain.
        deadline = time.monotonic() + WAIT_SECONDS + self._timings.drain
        while not condition():
            if time.monotonic() > deadline:
                away = [client.byes for client in self.clients if client.away]
                assert not must_hold, f"{len(away)} of {len(self.clients)} clients are still away: {away[:5]}"
                return
            await asyncio.sleep(0.1)  # Between two polls.

    def report(self, verdict: Verdict) -> dict[str, object]:
        back = [at for client in self.clients for at in client.ready_at[1:]]
        per_second = Counter(int(at - self.began) for at in back)
        per_client = [len(client.ready_at) - 1 for client in self.clients]
        return {
            "replicas": self._replicas,
            "clients": len(self.clients),
            "seconds": round(self.seconds, 1),
            "published": self.ledger.confirmed,
            "expected": verdict.expected,
            "missing": len(verdict.missing),
            "disorder": len(verdict.disorder),
            "twice": verdict.duplicates,
            "gaps": sum(client.gaps for client in self.clients),
            "reconnects": len(back),
            "reconnects_per_client": [min(per_client), max(per_client)],
            "most_reconnects_per_second": max(per_second.values(), default=0),
            "longest_away_s": round(max(client.longest_away for client in self.clients), 2),
            "cut_without_bye": len(back) - sum(sum(client.byes.values()) for client in self.clients),
            "busy": sum(client.byes["busy"] for client in self.clients),
            "exits": sorted(set(self.exits)),
            "longest_exit_s": round(self.longest_exit, 1),
        }


async def run_rollout(
    node: Node, *, scale: float, replicas: int = 3, clients: int = 60, rate: float = 50, seed: int = 1
) -> tuple[dict[str, object], Verdict]:
    vhost = Vhost(node)
    vhost.create()
    try:
        rollout = Rollout(vhost, Timings.of_manifests(scale), replicas=replicas, clients=clients, rate=rate, seed=seed)
        verdict = await rollout.run()
        return rollout.report(verdict), verdict
    finally:
        vhost.delete()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make rollout", description=__doc__)
    parser.add_argument("--scale", type=float, default=1)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--clients", type=int, default=600)
    parser.add_argument("--rate", type=float, default=50)
    options = parser.parse_args()
    node = Node(Path(tempfile.mkdtemp(prefix="rollout-")), management=True)
    try:
        node.start()
        report, verdict = asyncio.run(
            run_rollout(
                node, scale=options.scale, replicas=options.replicas, clients=options.clients, rate=options.rate
            )
        )
    finally:
        node.remove()
    print(json.dumps(report, indent=2))
    for line in [*verdict.missing, *verdict.disorder][:20]:
        print("   ", line, file=sys.stderr)
    return 0 if verdict.good and verdict.duplicates == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
