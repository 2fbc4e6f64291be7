"""Measures how late the events of innocent users are during attacks: `make attacks`.

    python -m tests.bench.attacks [--seconds 8] [--only bodies,flood] [--limited]

Each attack has a new bridge, with default settings. Five innocent streams together get 100 events a second before,
during and after the attack. The goal is a p99 below 250 ms. The row `none` shows how busy the machine is.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import selectors
import socket
import struct
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

from deploy.local.node import MACHINES, Installation, Node
from tests.bench import cases, peers
from tests.bench.process import ROOT, cpu_seconds
from tests.bench.publish import close, connect, message
from tests.raw_amqp import frame, short_string

GOAL_MS = 250.0

INNOCENTS = [f"innocent-{number}" for number in range(5)]
RATE = 100

MARGIN_SECONDS = 2.0
"""Events are also published for this long after the attack: events that it delays are measured, too."""

FRAME_BYTES = 131_072 - 8


@dataclass
class Target:
    """What an attack runs against, and when it ends (monotonic seconds)."""

    server: peers.Server
    port: int
    vhost: str
    until: float

    def request(self, user: str, *, method: str = "GET", query: str = "") -> bytes:
        text = self.server.request(user).replace("GET /events", f"{method} /events{query}", 1)
        return text.encode()


def nothing(target: Target) -> str:
    time.sleep(max(0.0, target.until - time.monotonic()))
    return ""


def patterns(target: Target) -> str:
    """One client sends requests again and again, each with 16 new long patterns."""
    for number in itertools.count():
        if time.monotonic() >= target.until:
            return f"{number:,} requests"
        words = [f"p{number}x{index}." + "*.a." * 28 + "%23" for index in range(16)]
        with socket.create_connection(("127.0.0.1", target.server.port)) as client:
            client.sendall(target.request("attacker", method="HEAD", query="?types=" + ",".join(words)))
            answer = client.recv(65_536)
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(answer.decode())
    raise AssertionError


def publish(broker: socket.socket, key: str, body: bytes) -> None:
    method = struct.pack(">HHH", 60, 40, 0) + short_string(b"events") + short_string(key.encode()) + b"\0"
    broker.sendall(frame(1, 1, method) + frame(2, 1, struct.pack(">HHQH", 60, 0, len(body), 0)))
    broker.sendall(b"".join(frame(3, 1, body[at : at + FRAME_BYTES]) for at in range(0, len(body), FRAME_BYTES)))


def bodies(target: Target) -> str:
    """Bodies of 10 MB, one a second, to a user with 20 streams."""
    streams = [socket.create_connection(("127.0.0.1", target.server.port)) for _ in range(20)]
    for stream in streams:
        stream.sendall(target.request("attacker"))
    for stream in streams:
        text = b""
        while b"bridge.ready" not in text:
            text += stream.recv(65_536)
    sent = 0
    while time.monotonic() < target.until:
        broker = connect(target.port, target.vhost)
        with contextlib.suppress(OSError):  # RabbitMQ may refuse it (--limited).
            publish(broker, "user.attacker.job.progress", b"x" * 10_000_000)
        sent += 1
        time.sleep(1)
        broker.close()
    for stream in streams:
        stream.close()
    return f"{sent} bodies"


def flood(target: Target) -> str:
    """Up to 100,000 messages that are not JSON, to everybody, as fast as RabbitMQ accepts them."""
    broker = connect(target.port, target.vhost)
    sent = 0
    while sent < 100_000 and time.monotonic() < target.until:
        raw = b"".join(_refused(sent + index) for index in range(100))
        broker.sendall(raw)
        sent += 100
    close(broker)
    return f"{sent:,} messages"


def _refused(number: int) -> bytes:
    body = b"{no JSON %d" % number
    method = struct.pack(">HHH", 60, 40, 0) + short_string(b"events") + short_string(b"all.job.progress") + b"\0"
    return frame(1, 1, method) + frame(2, 1, struct.pack(">HHQH", 60, 0, len(body), 0)) + frame(3, 1, body)


def reconnects(target: Target) -> str:
    """One user opens streams and closes them, again and again, in four threads."""
    counts = [0] * 4

    def run(index: int) -> None:
        while time.monotonic() < target.until:
            with socket.create_connection(("127.0.0.1", target.server.port)) as client:
                client.sendall(target.request("attacker"))
                client.recv(65_536)
            counts[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{sum(counts):,} streams"


LOG_ENTRIES = 200_000
"""Entries of other users in the log: for an old cursor the bridge reads all of them."""

BEHIND = 30_000
"""Entries that the other returning users have missed."""


class Cursors:
    """One user resumes 20 streams from the beginning of the log, again and again. Others return meanwhile."""

    def __init__(self) -> None:
        self._old = self._later = ""
        self._seconds: list[float] = []
        self._returned = 0

    def prepare(self, target: Target) -> None:
        self._seconds, self._returned = [], 0
        self._old = _cursor(target)
        _fill(target, LOG_ENTRIES - BEHIND)
        self._later = _cursor(target)
        _fill(target, BEHIND)
        users = ["attacker", *(f"returning-{number}" for number in range(100))]
        broker = connect(target.port, target.vhost)
        broker.sendall(b"".join(message(f"user.{user}.job.progress", n) for n, user in enumerate(users)))
        close(broker)

    def __call__(self, target: Target) -> str:
        threads = [threading.Thread(target=self._attack, args=(target,)) for _ in range(20)]
        threads.append(threading.Thread(target=self._return, args=(target,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        known = sorted(self._seconds)
        wait = f"median {known[len(known) // 2]:.1f} s, longest {known[-1]:.1f} s" if known else "none was read"
        read = _metric(target.server, "bridge_log_entries_read")
        return f"{read:,.0f} entries read; replays of others: {len(known)} of {self._returned}, {wait}"

    def _attack(self, target: Target) -> None:
        while time.monotonic() < target.until:
            _replay(target, "attacker", self._old)
            time.sleep(0.1)

    def _return(self, target: Target) -> None:
        time.sleep(1)  # Until the attack has begun.
        while time.monotonic() < target.until:
            began = time.monotonic()
            self._returned += 1
            if _replay(target, f"returning-{self._returned}", self._later):
                self._seconds.append(time.monotonic() - began)
            time.sleep(0.5)


def _cursor(target: Target) -> str:
    with socket.create_connection(("127.0.0.1", target.server.port)) as client:
        client.sendall(target.request("attacker"))
        text = b""
        while (found := re.search(rb"\nid: ([^\n]+)\n", text)) is None:
            text += client.recv(65_536)
        return found[1].decode()


def _fill(target: Target, count: int) -> None:
    broker = connect(target.port, target.vhost)
    for at in range(0, count, 1_000):
        broker.sendall(b"".join(message("user.other.job.progress", n) for n in range(at, at + 1_000)))
    close(broker)


def _replay(target: Target, user: str, cursor: str) -> bool:
    """Whether the log was read to this user's event before the attack was over."""
    text = b""
    with socket.create_connection(("127.0.0.1", target.server.port)) as client:
        client.settimeout(0.2)
        client.sendall(target.server.request(user, cursor).encode())
        while time.monotonic() < target.until:
            with contextlib.suppress(TimeoutError):
                piece = client.recv(65_536)
                text += piece
                if not piece or b"event: bridge.bye" in text:
                    return False
                if b"event: job.progress" in text:
                    return True
    return False


REFUSED = 60
REFUSED_BYTES = 49_000
RETURNING = 200


class Returning:
    """Clients that return at the same time. The log has large broadcasts that the bridge refuses."""

    def __init__(self) -> None:
        self._cursor = ""

    def prepare(self, target: Target) -> None:
        self._cursor = _cursor(target)
        broker = connect(target.port, target.vhost)
        for number in range(REFUSED):
            publish(broker, "all.job.progress", (b"{no JSON %d " % number).ljust(REFUSED_BYTES, b"x"))
        broker.sendall(b"".join(message(f"user.returning-{n}.job.progress", n) for n in range(RETURNING)))
        close(broker)

    def __call__(self, target: Target) -> str:
        began = time.monotonic()
        times: list[float] = []
        with _Livez(target.server) as livez, selectors.DefaultSelector() as selector:
            for number in range(RETURNING):
                client = socket.create_connection(("127.0.0.1", target.server.port))
                client.sendall(target.server.request(f"returning-{number}", self._cursor).encode())
                selector.register(client, selectors.EVENT_READ, bytearray())
            while len(times) < RETURNING and time.monotonic() < target.until:
                for key, _ in selector.select(0.2):
                    client = cast("socket.socket", key.fileobj)
                    piece = client.recv(65_536)
                    key.data.extend(piece)
                    if not piece or b"event: job.progress" in key.data:
                        selector.unregister(client)
                        client.close()
                        times.append(time.monotonic() - began)
            nothing(target)
        last = f"the last after {times[-1]:.1f} s" if times else "none"
        return f"{len(times)} of {RETURNING} got their event, {last}; {livez}"


HALF_OPEN = 2_000


def half_open(target: Target) -> str:
    """Connections that send half of a request. When the bridge closes one, another one is opened."""
    opened = 0
    with _Livez(target.server) as livez, selectors.DefaultSelector() as selector:
        while time.monotonic() < target.until:
            while len(selector.get_map()) < HALF_OPEN:
                client = socket.socket()
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", target.server.port))
                selector.register(client, selectors.EVENT_WRITE)
                opened += 1
            for key, events in selector.select(0.05):
                client = cast("socket.socket", key.fileobj)
                try:
                    if events & selectors.EVENT_WRITE:
                        client.send(b"GET /events HTTP/1.1\r\nHost: ")
                        selector.modify(client, selectors.EVENT_READ)
                        continue
                    is_open = bool(client.recv(65_536))
                except OSError:
                    is_open = False
                if not is_open:
                    selector.unregister(client)
                    client.close()
        for key in list(selector.get_map().values()):
            cast("socket.socket", key.fileobj).close()
    return f"{opened:,} connections; {livez}"


class _Livez:
    """Requests /livez again and again during the block."""

    def __init__(self, server: peers.Server) -> None:
        self._url = f"http://127.0.0.1:{server.internal_port}/livez"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest = 0.0
        self.failed = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            began = time.monotonic()
            try:
                with urllib.request.urlopen(self._url, timeout=30) as answer:
                    answer.read()
            except OSError:
                self.failed += 1
            self.longest = max(self.longest, time.monotonic() - began)

    def __str__(self) -> str:
        return f"/livez within {1000 * self.longest:.0f} ms, {self.failed} failed"


ATTACKS: dict[str, Callable[[Target], str]] = {
    "none": nothing,
    "patterns": patterns,
    "bodies": bodies,
    "flood": flood,
    "reconnects": reconnects,
    "cursors": Cursors(),
    "returning": Returning(),
    "half-open": half_open,
}


def measure(bench: cases.Bench, attack: Callable[[Target], str]) -> dict[str, float | str]:
    with bench.running(peers.PEERS[0]) as (server, load, vhost):
        cases.open_streams(load, server, INNOCENTS, "innocent")
        seconds = bench.seconds + 2 * MARGIN_SECONDS
        if isinstance(attack, Cursors | Returning):
            attack.prepare(Target(server, bench.node.port, vhost, 0.0))
        load.ask("reset")
        keys = [f"user.{user}.job.progress" for user in INNOCENTS]
        publisher = bench.publish(vhost, rate=RATE, seconds=seconds, keys=keys)
        time.sleep(MARGIN_SECONDS)
        before = cpu_seconds(server.pids)
        done = attack(Target(server, bench.node.port, vhost, time.monotonic() + bench.seconds))
        sent = publisher.done()
        report = cases.wait_for_events(load, sent["sent"], seconds=60)
        used = _until_idle(server) - before
    innocent = report["groups"]["innocent"]
    return {
        "done": done,
        "p50_ms": innocent["p50_ms"],
        "p99_ms": innocent["p99_ms"],
        "max_ms": innocent["max_ms"],
        "missing": sent["sent"] - report["distinct"],
        "bridge_cpu_s": used,
    }


def _until_idle(server: peers.Server) -> float:
    """Waits until the bridge has no more work: no message for two seconds. Returns its CPU seconds so far."""
    received = -1.0
    while received != (received := _received(server)):
        time.sleep(2)
    return cpu_seconds(server.pids)


def _received(server: peers.Server) -> float:
    return _metric(server, "bridge_events_received_total")


def _metric(server: peers.Server, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.internal_port}/metrics", timeout=120) as answer:
        text = answer.read().decode()
    return float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make attacks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="how long each attack lasts")
    parser.add_argument("--only", default=",".join(ATTACKS), help="some attacks, joined by commas")
    parser.add_argument("--rabbitmq", type=Path, help="a folder with another RabbitMQ, as `deploy/local/ensure` makes")
    parser.add_argument("--limited", action="store_true", help="with the limits of deploy/rabbitmq/rabbitmq.conf")
    options = parser.parse_args()
    peers.folder()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="bridge-attacks-") as folder:
        rabbitmq = MACHINES if options.rabbitmq is None else Installation(root=options.rabbitmq)
        node = Node(Path(folder), rabbitmq=rabbitmq)
        if options.limited:
            with (Path(folder) / "rabbitmq.conf").open("a") as configuration:
                configuration.write((ROOT / "deploy" / "rabbitmq" / "rabbitmq.conf").read_text())
        node.start()
        try:
            bench = cases.Bench(node, options.seconds)
            for name in options.only.split(","):
                rows[name] = measure(bench, ATTACKS[name])
                print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
        finally:
            node.remove()
    print(f"\nRabbitMQ {rabbitmq.version}, {options.seconds:g} s each; the goal is a p99 below {GOAL_MS:g} ms\n")
    print("| attack | what was done | innocent p50 | p99 | max | missing | CPU of the bridge |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        print(
            f"| {name} | {row['done']} | {row['p50_ms']:.0f} ms | {row['p99_ms']:.0f} ms | {row['max_ms']:.0f} ms "
            f"| {row['missing']} | {row['bridge_cpu_s']:.1f} s |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
