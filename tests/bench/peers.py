"""The measured programs: the bridge, and programs that people build or run instead of it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bridge.service.http import auth
from deploy.local.node import free_ports
from tests.bench.process import ROOT, Child

SECRET = "a-secret-of-the-benchmark-0123456789"
FOLDER = ROOT / ".run" / "bench"
SOURCES = ROOT / "tests" / "bench" / "peers"

ALL_CASES = frozenset({"users", "users-fast", "broadcast", "idle", "open"})


@dataclass
class Server:
    """A server that runs."""

    port: int
    ready: str
    children: list[Child]
    tokens: bool = False
    internal_port: int = 0

    @property
    def pids(self) -> list[int]:
        return [pid for child in self.children for pid in child.pids]

    def request(self, user: str, last_event_id: str = "") -> str:
        path = "/events" if self.tokens else f"/events?user={user}"
        # The headers of a browser, so that no peer gets fewer headers than in production.
        headers = {
            "Host": f"127.0.0.1:{self.port}",
            "Connection": "keep-alive",
            "Accept": "text/event-stream",
            "Cache-Control": "no-cache",
            "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0",
            "Accept-Language": "en-US,en;q=0.9",
            "Accept-Encoding": "gzip, deflate, br, zstd",
            "Sec-Fetch-Mode": "cors",
            "Sec-Fetch-Site": "same-origin",
            "Referer": f"http://127.0.0.1:{self.port}/",
        }
        if self.tokens:
            headers["Authorization"] = f"Bearer {token(user)}"
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join(lines) + "\r\n\r\n"

    def end(self) -> None:
        for child in self.children:
            child.end()


_tokens: dict[str, str] = {}


def token(user: str) -> str:
    if user not in _tokens:
        _tokens[user] = auth.mint(SECRET, user=user, groups=(), ttl_seconds=86_400, now=time.time())
    return _tokens[user]


def python() -> str:
    """The Python of the servers: that of the benchmark's folder, or the tests' own if there is no such folder."""
    fast = FOLDER / "venv/bin/python"
    return str(fast) if fast.exists() else sys.executable


def _bridge(url: str, port: int, feed: str = "queues") -> Server:
    (internal,) = free_ports(1)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("BRIDGE_")},
        "BRIDGE_AMQP_URL": url,
        "BRIDGE_JWT_SECRET": SECRET,
        "BRIDGE_BIND": f"127.0.0.1:{port}",
        "BRIDGE_INTERNAL_BIND": f"127.0.0.1:{internal}",
        "BRIDGE_MAX_CONNECTIONS": "20000",
        "BRIDGE_SCHEMAS": "bridge.samples",
        "BRIDGE_FEED": feed,
    }
    child = Child(
        [python(), "-m", "bridge", "serve"],
        ready_text="broker connected",
        environment=environment,
        log=FOLDER / "bridge.log",
    )
    return Server(port, "bridge.ready", [child], tokens=True, internal_port=internal)


def _node(script: str) -> Callable[[str, int], Server]:
    def start(url: str, port: int) -> Server:
        # Node resolves modules from the folder of a script.
        shutil.copy(SOURCES / script, FOLDER / script)
        child = Child(["node", str(FOLDER / script), url, str(port)], ready_text="serving", folder=FOLDER)
        return Server(port, "event: ready", [child])

    return start


def _python(script: str) -> Callable[[str, int], Server]:
    def start(url: str, port: int) -> Server:
        child = Child([python(), str(SOURCES / script), url, str(port)], ready_text="serving", folder=FOLDER)
        time.sleep(0.5)  # It prints "serving" just before it listens.
        return Server(port, "event: ready", [child])

    return start


def _nchan(url: str, port: int) -> Server:
    config = (SOURCES / "nchan.conf").read_text().replace("FOLDER", str(FOLDER)).replace("PORT", str(port))
    (FOLDER / "nchan.conf").write_text(config)
    nginx = Child(["nginx", "-c", str(FOLDER / "nchan.conf"), "-p", str(FOLDER)], ready_text=None)
    time.sleep(1)
    feeder = _node("feeder.mjs")(url, port)
    return Server(port, "200 OK", [nginx, *feeder.children])


@dataclass(frozen=True)
class Peer:
    """
    Args:
        name: in the tables' first row, and on the command line.
        about: a description, as one line of the report.
        start: starts it, with the broker's URL and a port.
        cases: the cases that it supports.
    """

    name: str
    about: str
    start: Callable[..., Server]
    cases: frozenset[str] = field(default=ALL_CASES)


PEERS = (
    Peer("bridge", "this bridge, with tokens, validation, ids, the log and metrics, as it ships", _bridge),
    Peer("bridge-log", "the same with `BRIDGE_FEED=log`: no queue for a connection", partial(_bridge, feed="log")),
    Peer("node", "Node's `http` and `amqplib`, an exclusive queue for each connection", _node("bare.mjs")),
    Peer("node-shared", "the same with one queue for the process and the fan-out in memory", _node("shared.mjs")),
    Peer("fastify", "Fastify with `fastify-sse-v2` and `amqplib`", _node("fastify.mjs")),
    Peer("obvious", "aio-pika's queue iterator, Quart, Hypercorn, pydantic; on uvloop", _python("obvious.py")),
    Peer("starlette", "sse-starlette on uvicorn (uvloop, httptools), aio-pika", _python("starlette_sse.py")),
    Peer(
        "nchan",
        "nginx with nchan, fed by a small consumer in Node",
        _nchan,
        frozenset({"broadcast", "idle", "open"}),
    ),
)


def folder() -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    return FOLDER
