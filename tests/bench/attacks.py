"""Attacks, and how late the events of an innocent user are meanwhile: `make attacks`.

    python -m tests.bench.attacks [--seconds 8] [--only bodies,flood] [--limited]

Each attack has a bridge of its own, with its default settings. Five innocent streams get 100 events a second together
before, during and after it. The goal is a p99 below 250 ms. The row `none` shows how busy the machine is.
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
"""Events come for this long after the attack, too: what was held up by it is late, and counts."""

FRAME_BYTES = 131_072 - 8


@dataclass
class Scene:
    """Where an attack takes place, and until when (monotonic seconds) it goes on."""

    server: peers.Server
    port: int
    vhost: str
    until: float

    def asks(self, user: str, *, method: str = "GET", query: str = "") -> bytes:
        text = self.server.request(user).replace("GET /events", f"{method} /events{query}", 1)
        return text.encode()


def nothing(scene: Scene) -> str:
    time.sleep(max(0.0, scene.until - time.monotonic()))
    return ""


def patterns(scene: Scene) -> str:
    """One client asks again and again, each time for 16 long patterns that nobody has asked for before."""
    for number in itertools.count():
        if time.monotonic() >= scene.until:
            return f"{number:,} requests"
        words = [f"p{number}x{index}." + "*.a." * 28 + "%23" for index in range(16)]
        with socket.create_connection(("127.0.0.1", scene.server.port)) as client:
            client.sendall(scene.asks("attacker", method="HEAD", query="?types=" + ",".join(words)))
            answer = client.recv(65_536)
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(answer.decode())
    raise AssertionError


def publish(broker: socket.socket, key: str, body: bytes) -> None:
    method = struct.pack(">HHH", 60, 40, 0) + short_string(b"events") + short_string(key.encode()) + b"\0"
    broker.sendall(frame(1, 1, method) + frame(2, 1, struct.pack(">HHQH", 60, 0, len(body), 0)))
    broker.sendall(b"".join(frame(3, 1, body[at : at + FRAME_BYTES]) for at in range(0, len(body), FRAME_BYTES)))


def bodies(scene: Scene) -> str:
    """Bodies of 10 MB, one a second, to a user with 20 streams."""
    streams = [socket.create_connection(("127.0.0.1", scene.server.port)) for _ in range(20)]
    for stream in streams:
        stream.sendall(scene.asks("attacker"))
    for stream in streams:
        text = b""
        while b"bridge.ready" not in text:
            text += stream.recv(65_536)
    sent = 0
    while time.monotonic() < scene.until:
        broker = connect(scene.port, scene.vhost)
        with contextlib.suppress(OSError):  # RabbitMQ may refuse it (--limited).
            publish(broker, "user.attacker.job.progress", b"x" * 10_000_000)
        sent += 1
        time.sleep(1)
        broker.close()
    for stream in streams:
        stream.close()
    return f"{sent} bodies"


def flood(scene: Scene) -> str:
    """Up to 100,000 messages that are not JSON, to everybody, as fast as RabbitMQ takes them."""
    broker = connect(scene.port, scene.vhost)
    sent = 0
    while sent < 100_000 and time.monotonic() < scene.until:
        raw = b"".join(_refused(sent + index) for index in range(100))
        broker.sendall(raw)
        sent += 100
    close(broker)
    return f"{sent:,} messages"


def _refused(number: int) -> bytes:
    body = b"{no JSON %d" % number
    method = struct.pack(">HHH", 60, 40, 0) + short_string(b"events") + short_string(b"all.job.progress") + b"\0"
    return frame(1, 1, method) + frame(2, 1, struct.pack(">HHQH", 60, 0, len(body), 0)) + frame(3, 1, body)


def reconnects(scene: Scene) -> str:
    """One user opens a stream and leaves it, again and again, on four connections."""
    counts = [0] * 4

    def run(index: int) -> None:
        while time.monotonic() < scene.until:
            with socket.create_connection(("127.0.0.1", scene.server.port)) as client:
                client.sendall(scene.asks("attacker"))
                client.recv(65_536)
            counts[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{sum(counts):,} streams"


LOG_ENTRIES = 200_000
"""Entries of others in the log, which an old cursor has to be read past."""

BEHIND = 30_000
"""Entries that the others who return were away for."""


class Cursors:
    """One user has the log read from its beginning by 20 streams, and returns when it has been. Others return, too."""

    def __init__(self) -> None:
        self._old = self._later = ""
        self._seconds: list[float] = []
        self._returned = 0

    def prepare(self, scene: Scene) -> None:
        self._seconds, self._returned = [], 0
        self._old = _cursor(scene)
        _fill(scene, LOG_ENTRIES - BEHIND)
        self._later = _cursor(scene)
        _fill(scene, BEHIND)
        users = ["attacker", *(f"returning-{number}" for number in range(100))]
        broker = connect(scene.port, scene.vhost)
        broker.sendall(b"".join(message(f"user.{user}.job.progress", n) for n, user in enumerate(users)))
        close(broker)

    def __call__(self, scene: Scene) -> str:
        threads = [threading.Thread(target=self._attack, args=(scene,)) for _ in range(20)]
        threads.append(threading.Thread(target=self._return, args=(scene,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        known = sorted(self._seconds)
        wait = f"median {known[len(known) // 2]:.1f} s, longest {known[-1]:.1f} s" if known else "none was read"
        read = _metric(scene.server, "bridge_log_entries_read")
        return f"{read:,.0f} entries read; replays of others: {len(known)} of {self._returned}, {wait}"

    def _attack(self, scene: Scene) -> None:
        while time.monotonic() < scene.until:
            _replay(scene, "attacker", self._old)
            time.sleep(0.1)

    def _return(self, scene: Scene) -> None:
        time.sleep(1)  # When the attack has begun.
        while time.monotonic() < scene.until:
            began = time.monotonic()
            self._returned += 1
            if _replay(scene, f"returning-{self._returned}", self._later):
                self._seconds.append(time.monotonic() - began)
            time.sleep(0.5)


def _cursor(scene: Scene) -> str:
    with socket.create_connection(("127.0.0.1", scene.server.port)) as client:
        client.sendall(scene.asks("attacker"))
        text = b""
        while (found := re.search(rb"\nid: ([^\n]+)\n", text)) is None:
            text += client.recv(65_536)
        return found[1].decode()


def _fill(scene: Scene, count: int) -> None:
    broker = connect(scene.port, scene.vhost)
    for at in range(0, count, 1_000):
        broker.sendall(b"".join(message("user.other.job.progress", n) for n in range(at, at + 1_000)))
    close(broker)


def _replay(scene: Scene, user: str, cursor: str) -> bool:
    """Whether the log was read to this user's event before the attack was over."""
    text = b""
    with socket.create_connection(("127.0.0.1", scene.server.port)) as client:
        client.settimeout(0.2)
        client.sendall(scene.server.request(user, cursor).encode())
        while time.monotonic() < scene.until:
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
    """Clients that come back at once, to a log with broadcasts that the bridge refuses, large ones."""

    def __init__(self) -> None:
        self._cursor = ""

    def prepare(self, scene: Scene) -> None:
        self._cursor = _cursor(scene)
        broker = connect(scene.port, scene.vhost)
        for number in range(REFUSED):
            publish(broker, "all.job.progress", (b"{no JSON %d " % number).ljust(REFUSED_BYTES, b"x"))
        broker.sendall(b"".join(message(f"user.returning-{n}.job.progress", n) for n in range(RETURNING)))
        close(broker)

    def __call__(self, scene: Scene) -> str:
        began = time.monotonic()
        times: list[float] = []
        with _Livez(scene.server) as livez, selectors.DefaultSelector() as selector:
            for number in range(RETURNING):
                client = socket.create_connection(("127.0.0.1", scene.server.port))
                client.sendall(scene.server.request(f"returning-{number}", self._cursor).encode())
                selector.register(client, selectors.EVENT_READ, bytearray())
            while len(times) < RETURNING and time.monotonic() < scene.until:
                for key, _ in selector.select(0.2):
                    client = cast("socket.socket", key.fileobj)
                    piece = client.recv(65_536)
                    key.data.extend(piece)
                    if not piece or b"event: job.progress" in key.data:
                        selector.unregister(client)
                        client.close()
                        times.append(time.monotonic() - began)
            nothing(scene)
        last = f"the last after {times[-1]:.1f} s" if times else "none"
        return f"{len(times)} of {RETURNING} had their event, {last}; {livez}"


HALF_OPEN = 2_000


def half_open(scene: Scene) -> str:
    """Connections that send half of a request, each of which is followed by another one when it is closed."""
    opened = 0
    with _Livez(scene.server) as livez, selectors.DefaultSelector() as selector:
        while time.monotonic() < scene.until:
            while len(selector.get_map()) < HALF_OPEN:
                client = socket.socket()
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", scene.server.port))
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
    """Asks for /livez, again and again, while the block lasts."""

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


ATTACKS: dict[str, Callable[[Scene], str]] = {
    "none": nothing,
    "patterns": patterns,
    "bodies": bodies,
    "flood": flood,
    "reconnects": reconnects,
    "cursors": Cursors(),
    "returning": Returning(),
    "half-open": half_open,
}


def measure(bench: cases.Bench, attack: Callable[[Scene], str]) -> dict[str, float | str]:
    with bench.running(peers.PEERS[0]) as (server, load, vhost):
        cases.open_streams(load, server, INNOCENTS, "innocent")
        seconds = bench.seconds + 2 * MARGIN_SECONDS
        if isinstance(attack, Cursors | Returning):
            attack.prepare(Scene(server, bench.node.port, vhost, 0.0))
        load.ask("reset")
        keys = [f"user.{user}.job.progress" for user in INNOCENTS]
        publisher = bench.publish(vhost, rate=RATE, seconds=seconds, keys=keys)
        time.sleep(MARGIN_SECONDS)
        before = cpu_seconds(server.pids)
        done = attack(Scene(server, bench.node.port, vhost, time.monotonic() + bench.seconds))
        sent = publisher.done()
        report = cases.settled(load, sent["sent"], seconds=60)
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
    """CPU seconds so far, once the attack is worked off: no message came for two seconds."""
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
    parser.add_argument("--seconds", type=float, default=8, help="how long each attack goes on")
    parser.add_argument("--only", default=",".join(ATTACKS), help="some of them, joined by commas")
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
