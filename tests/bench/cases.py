"""The measurements. Each case starts a new server on a new virtual host, and returns figures by name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bridge import Audience, Publisher
from bridge.samples.jobs import JobProgress
from deploy.local.node import Node, free_ports
from tests.bench.peers import Peer, Server
from tests.bench.process import Load, Source, cpu_seconds, resident_bytes

WARM_UP_SECONDS = 2.0

Figures = dict[str, float]


@dataclass
class Bench:
    """The broker of a run. Each case gets a server and clients."""

    node: Node
    seconds: float

    @contextlib.contextmanager
    def running(self, peer: Peer) -> Iterator[tuple[Server, Load, str]]:
        """The peer's server on a virtual host of its own, without clients yet."""
        vhost = f"bench-{secrets.token_hex(4)}"
        self.node.ctl("add_vhost", vhost)
        self.node.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
        (port,) = free_ports(1)
        server = peer.start(f"amqp://guest:guest@127.0.0.1:{self.node.port}/{vhost}", port)
        load = Load()
        try:
            yield server, load, vhost
        finally:
            load.end()
            server.end()
            self.node.ctl("delete_vhost", vhost)

    def publish(self, vhost: str, *, rate: float, seconds: float, keys: list[str]) -> Source:
        return Source(self.node.port, vhost, rate=rate, seconds=seconds, keys=keys)

    def cpu(self, server: Server) -> tuple[float, float]:
        """CPU seconds of the server and of the broker so far."""
        return cpu_seconds(server.pids), cpu_seconds([self.node.pid])


def open_streams(load: Load, server: Server, users: list[str], group: str = "live") -> dict[str, Any]:
    clients = [[user, group, server.request(user.partition("/")[0])] for user in users]
    answer = load.ask("open", port=server.port, clients=clients, ready=server.ready)
    if answer["refused"]:
        raise RuntimeError(f"{answer['refused']} of {len(users)} streams ended before they were ready")
    return answer


def open_in_waves(load: Load, server: Server, users: list[str], *, wave: int = 1_000) -> None:
    """Opens streams in groups: the bridge ends a stream that is not ready in time, and a broker makes 350 queues a
    second."""
    for at in range(0, len(users), wave):
        open_streams(load, server, users[at : at + wave])


def wait_for_events(load: Load, expected: int, *, seconds: float = 20) -> dict[str, Any]:
    """Waits until all events have arrived, at most this long, and returns the report."""
    deadline = time.monotonic() + seconds
    while True:
        report = load.ask("report")
        if report["distinct"] >= expected or time.monotonic() > deadline:
            return report
        time.sleep(0.2)


def _measure_events(
    bench: Bench, server: Server, load: Load, vhost: str, *, rate: float, keys: list[str], fan: int, seconds: float = 0
) -> Figures:
    """Publishes a warm-up and then events for a time, and returns the cost of each delivery."""
    warm_up = bench.publish(vhost, rate=rate, seconds=WARM_UP_SECONDS, keys=keys).done()
    wait_for_events(load, warm_up["sent"] * fan)  # A slow peer must not be measured with these, too.
    time.sleep(1)
    load.ask("reset")
    server_before, broker_before = bench.cpu(server)
    began = time.monotonic()
    published = bench.publish(vhost, rate=rate, seconds=seconds or bench.seconds, keys=keys).done()
    expected = published["sent"] * fan
    report = wait_for_events(load, expected)
    elapsed = time.monotonic() - began
    server_after, broker_after = bench.cpu(server)
    live = report["groups"].get("live", {"p50_ms": 0, "p99_ms": 0, "max_ms": 0})
    delivered = max(1, report["distinct"])
    return {
        "server_us": (server_after - server_before) / delivered * 1e6,
        "broker_us": (broker_after - broker_before) / delivered * 1e6,
        "p50_ms": live["p50_ms"],
        "p99_ms": live["p99_ms"],
        "max_ms": live["max_ms"],
        "missing": expected - report["distinct"],
        "twice": report["twice"],
        "longest_silence_s": report["longest_silence"],
        # To detect that load or publisher were the bottleneck: their shares of a core, and the publisher's delay.
        "load_share": report["cpu_seconds"] / elapsed,
        "publisher_share": published["cpu_seconds"] / elapsed,
        "publisher_late_s": published["late_seconds"],
        "server_share": (server_after - server_before) / elapsed,
        "resident_mb": resident_bytes(server.pids) / 1e6,
    }


def users(bench: Bench, peer: Peer, *, count: int = 500, rate: float = 2_000, seconds: float = 0) -> Figures:
    """Users with one connection each; events are for one user after the other."""
    names = [f"u{number}" for number in range(count)]
    with bench.running(peer) as (server, load, vhost):
        open_in_waves(load, server, names)
        keys = [f"user.{name}.job.progress" for name in names]
        return _measure_events(bench, server, load, vhost, rate=rate, keys=keys, fan=1, seconds=seconds)


def broadcast(bench: Bench, peer: Peer, *, count: int = 1_000, rate: float = 10) -> Figures:
    """Every client gets every event."""
    names = [f"u{number}" for number in range(count)]
    with bench.running(peer) as (server, load, vhost):
        open_streams(load, server, names)
        return _measure_events(bench, server, load, vhost, rate=rate, keys=["all.job.progress"], fan=count)


def idle(bench: Bench, peer: Peer, *, few: int = 500, many: int = 2_500) -> Figures:
    """The memory of one more open connection: the slope between few and many. The first ones are not counted."""
    with bench.running(peer) as (server, load, _):
        # One after the other, so that memory for opening many at once is not part of the slope.
        for number in range(few):
            open_streams(load, server, [f"u{number}"])
        time.sleep(2)
        before = resident_bytes(server.pids), resident_bytes([bench.node.pid])
        for number in range(few, many):
            open_streams(load, server, [f"u{number}"])
        time.sleep(4)
        after = resident_bytes(server.pids), resident_bytes([bench.node.pid])
        return {
            "server_kb": (after[0] - before[0]) / (many - few) / 1024,
            "broker_kb": (after[1] - before[1]) / (many - few) / 1024,
        }


def opening(bench: Bench, peer: Peer, *, count: int = 2_000) -> Figures:
    """Opens all streams at once, until each is ready."""
    with bench.running(peer) as (server, load, _):
        open_streams(load, server, ["warm-up"])
        server_before, broker_before = bench.cpu(server)
        answer = open_streams(load, server, [f"u{number}" for number in range(count)])
        server_after, broker_after = bench.cpu(server)
        return {
            "seconds": answer["seconds"],
            "server_us": (server_after - server_before) / count * 1e6,
            "broker_us": (broker_after - broker_before) / count * 1e6,
        }


def back(bench: Bench, peer: Peer, *, count: int = 2_000, away: float = 30, rate: float = 1_000) -> Figures:
    """Clients that return at the same time, while others stay connected and events are published."""
    staying = [f"s{number}" for number in range(100)]
    leaving = [f"l{number}" for number in range(count)]
    keys = [f"user.{name}.job.progress" for name in staying + leaving]
    with bench.running(peer) as (server, load, vhost):
        open_streams(load, server, staying)
        open_streams(load, server, leaving, "back")
        load.ask("reset")
        total = away + 25 + 5
        publisher = bench.publish(vhost, rate=rate, seconds=total, keys=keys)
        time.sleep(5)
        cursors = load.ask("close", group="back")["cursors"]
        time.sleep(away)
        server_before, _ = bench.cpu(server)
        returned_ns = time.time_ns()
        load.ask("since", since_ns=returned_ns)
        clients = [[name, "back", server.request(name, cursors[name])] for name in leaving]
        answer = load.ask("open", port=server.port, clients=clients, ready=server.ready)
        time.sleep(20)
        first = load.ask("first", since_ns=returned_ns)["first"]
        published = publisher.done()
        report = wait_for_events(load, published["sent"])
        server_after, _ = bench.cpu(server)
        return {
            "ready_s": answer["seconds"],
            "refused": answer["refused"],
            # The first event that was published after the return: a client gets all missed events before it.
            "all_live_s": max(first.get(name, float("inf")) for name in leaving),
            "live_p99_ms": report["groups"]["live"]["p99_ms"],
            "missing": published["sent"] - report["distinct"],
            "twice": report["twice"],
            "server_cpu_s": server_after - server_before,
        }


def restart(bench: Bench, peer: Peer, *, count: int = 3_000) -> Figures:
    """Kills RabbitMQ with SIGKILL, and starts it again: seconds from its first answer until all streams are live."""
    names = [f"u{number}" for number in range(count)]
    with bench.running(peer) as (server, load, vhost):
        open_in_waves(load, server, names)
        server_before, _ = bench.cpu(server)
        bench.node.kill()
        bench.node.start()
        up_ns = time.time_ns()
        load.ask("since", since_ns=up_ns)
        # Four broadcasts a second, more would slow the streams down. A stream gets its first one when it is live.
        deadline = time.monotonic() + 60
        while len(first := load.ask("first", since_ns=up_ns)["first"]) < count and time.monotonic() < deadline:
            bench.publish(vhost, rate=4, seconds=0.25, keys=["all.job.progress"]).done()
            time.sleep(0.2)
        server_after, _ = bench.cpu(server)
        return {
            "all_live_s": max((first.get(name, float("inf")) for name in names), default=0.0),
            "missing": count - len(first),
            "server_cpu_s": server_after - server_before,
        }


def killed(bench: Bench, peer: Peer, *, count: int = 5_000) -> Figures:
    """Kills the server of many streams with SIGKILL: the longest time that RabbitMQ takes to confirm an event."""
    with bench.running(peer) as (server, load, vhost):
        open_in_waves(load, server, [f"u{number}" for number in range(count)])
        url = f"amqp://guest:guest@127.0.0.1:{bench.node.port}/{vhost}"
        before, after = asyncio.run(_confirm_times(url, lambda: os.kill(server.pids[0], signal.SIGKILL)))
        return {"stall_before_ms": max(before) * 1000, "stall_ms": max(after) * 1000}


async def _confirm_times(url: str, kill: Callable[[], None]) -> tuple[list[float], list[float]]:
    """How long each event took until its confirm, for three seconds before `kill` and ten seconds after it."""

    async def publish(seconds: float) -> list[float]:
        taken = []
        end = time.monotonic() + seconds
        while (began := time.monotonic()) < end:
            await publisher.publish(Audience.user("somebody"), JobProgress(job_id="1", percent=1))
            taken.append(time.monotonic() - began)
            await asyncio.sleep(0.002)
        return taken

    async with Publisher(url, source="/bench") as publisher:
        await publish(0.5)
        before = await publish(3)
        kill()
        return before, await publish(10)


def log_reading(bench: Bench, peer: Peer, *, entries: int = 300_000) -> Figures:
    """One client resumes from a log that is full of other users' events."""
    with bench.running(peer) as (server, load, vhost):
        open_streams(load, server, ["reader"], "back")
        bench.publish(vhost, rate=10, seconds=0.5, keys=["user.reader.job.progress"]).done()
        time.sleep(1)
        cursor = load.ask("close", group="back")["cursors"]["reader"]
        bench.publish(vhost, rate=25_000, seconds=entries / 25_000, keys=["user.other.job.progress"]).done()
        bench.publish(vhost, rate=10, seconds=0.1, keys=["user.reader.job.progress"]).done()
        time.sleep(2)
        server_before, broker_before = bench.cpu(server)
        load.ask("reset")
        began = time.monotonic()
        clients = [["reader", "back", server.request("reader", cursor)]]
        load.ask("open", port=server.port, clients=clients, ready=server.ready)
        while load.ask("report")["distinct"] < 1:
            time.sleep(0.01)
        elapsed = time.monotonic() - began
        server_after, broker_after = bench.cpu(server)
        return {
            "entries_per_s": entries / elapsed,
            "entries_per_cpu_s": entries / (server_after - server_before),
            "server_us": (server_after - server_before) / entries * 1e6,
            "broker_us": (broker_after - broker_before) / entries * 1e6,
        }
