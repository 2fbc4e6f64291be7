"""Checks that each proxy in front of the bridge must pass. Each check returns what it measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import httpx
import pytest

from deploy.local.node import free_ports
from tests.client import Stream
from tests.conftest import StartService
from tests.decoder import Decoder, Frame
from tests.deploy.proxies import BRIDGE_HOSTS, Edge
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent, ignore_deleted_queue
from tests.service import Service, mint

SILENT_HEARTBEAT = 30.0
"""For one of the two bridges: its quiet streams reach the proxy's idle limit. The streams of the other do not."""

BROKEN = (EOFError, OSError, ssl.SSLError, ValueError, IndexError, asyncio.IncompleteReadError, httpx.HTTPError)
"""The exceptions for a stream that was not ended by its client."""


@dataclass(frozen=True)
class Setup:
    """A proxy with two bridges behind it."""

    edge: Edge
    bridges: list[Service]
    vhost: Vhost

    def stream(self, user: str, *, cursor: str = "", query: str = "", in_query: bool = False) -> Stream:
        headers = {"Last-Event-ID": cursor} if cursor else {}
        return Stream(
            self.edge.url, None if in_query else mint(user), query=query, headers=headers, tls=self.edge.trust()
        )

    @contextlib.asynccontextmanager
    async def opened(self, user: str, *, cursor: str = "") -> AsyncIterator[Stream]:
        stream = self.stream(user, cursor=cursor)
        try:
            await stream.open()
            yield stream
        finally:
            stream.abort()

    def http2(self) -> httpx.AsyncClient:
        """A client with at most one connection: streams that do not fit on it fail."""
        return httpx.AsyncClient(
            http1=False,
            http2=True,
            verify=self.edge.trust(),
            base_url=self.edge.url,
            limits=httpx.Limits(max_connections=1),
            timeout=httpx.Timeout(PATIENCE, read=None),
        )


class Reader:
    """Reads like a page: it reconnects with its cursor after any end of its stream.

    Args:
        client: for HTTP/2; without it, HTTP/1.1 on a connection of its own.
    """

    def __init__(self, setup: Setup, user: str, client: httpx.AsyncClient | None = None) -> None:
        self._setup = setup
        self._user = user
        self._client = client
        self._cursor = ""
        self._changed = asyncio.Condition()
        self.ready = 0
        self.ids: list[str] = []
        self.arrived: dict[str, float] = {}
        self.unresumed = 0
        """Times that it reconnected and did not resume."""
        self.refused = 0
        """Answers with a status other than 200: each would have ended an EventSource."""
        self.ends: list[str] = []
        """The exception that ended each of its streams."""

    async def run(self) -> None:
        while True:
            frames = self._over_http1() if self._client is None else self._over_http2(self._client)
            try:
                async with contextlib.aclosing(frames):
                    async for frame in frames:
                        await self._record(frame)
            except BROKEN as error:
                self.ends.append(repr(error))
            await asyncio.sleep(0.05)  # The pause before a page reconnects.

    async def _over_http1(self) -> AsyncGenerator[Frame]:
        async with self._setup.opened(self._user, cursor=self._cursor) as stream:
            self._check_status(stream.status)
            while True:
                yield await stream.next()

    async def _over_http2(self, client: httpx.AsyncClient) -> AsyncGenerator[Frame]:
        headers = {"Authorization": f"Bearer {mint(self._user)}"}
        if self._cursor:
            headers["Last-Event-ID"] = self._cursor
        decoder = Decoder()
        async with client.stream("GET", "/events", headers=headers) as response:
            assert response.http_version == "HTTP/2"
            self._check_status(response.status_code)
            async for piece in response.aiter_raw():
                for frame in decoder.feed(piece):
                    yield frame

    def _check_status(self, status: int) -> None:
        if status != 200:
            self.refused += 1
            raise EOFError(f"status {status}")

    async def _record(self, frame: Frame) -> None:
        self._cursor = frame.id
        async with self._changed:
            if frame.event == "bridge.ready":
                self.unresumed += self.ready > 0 and not frame.json["resumed"]
                self.ready += 1
            elif not frame.event.startswith("bridge."):
                event_id = frame.json["id"]
                self.ids.append(event_id)
                self.arrived.setdefault(event_id, time.monotonic())
            self._changed.notify_all()

    async def is_ready(self) -> None:
        await self._until(lambda: self.ready > 0)

    async def has(self, count: int) -> None:
        await self._until(lambda: len(self.ids) >= count)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(condition)


@contextlib.asynccontextmanager
async def reading(*readers: Reader) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(reader.run()) for reader in readers]
    try:
        await asyncio.gather(*(reader.is_ready() for reader in readers))
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def publishing(vhost: Vhost, key: str, *, every: float) -> AsyncIterator[dict[str, float]]:
    """Publishes one event after another during the block. Yields their ids, and when the publishing of each began."""
    began: dict[str, float] = {}
    enough = asyncio.Event()

    confirmed = 0

    async def run() -> None:
        nonlocal confirmed
        async with await aio_pika.connect(vhost.url) as connection:
            exchange = await (await connection.channel()).get_exchange("events", ensure=False)
            while not enough.is_set() or confirmed < len(began):
                event_id = f"f{confirmed}"
                message = aio_pika.Message(json.dumps(cloudevent(event_id)).encode())
                began.setdefault(event_id, time.monotonic())
                await exchange.publish(message, key)
                confirmed += 1
                await asyncio.sleep(every)  # The publishing rate.

    async def run_on() -> None:
        while not enough.is_set() or confirmed < len(began):
            with ignore_deleted_queue():
                await run()

    running = asyncio.create_task(run_on())
    try:
        yield began
    finally:
        enough.set()
        await running


async def events_at_once(setup: Setup, count: int) -> dict[str, float]:
    """The first byte arrives, and then each event though no other follows it. A proxy that waits for a full buffer
    would never send them."""
    reader = Reader(setup, "at-once")
    began = time.monotonic()
    async with reading(reader):
        first = time.monotonic() - began
        slowest = 0.0
        for number in range(count):
            published = time.monotonic()
            await setup.vhost.publish("user.at-once.job.completed", cloudevent(f"a{number}"))
            await reader.has(number + 1)
            slowest = max(slowest, reader.arrived[f"a{number}"] - published)
    return {"first frame, ms": first * 1000, "slowest event with its publisher's connection, ms": slowest * 1000}


async def idle_limit(setup: Setup, opened: asyncio.Event | None = None) -> dict[str, float]:
    """Heartbeats keep a quiet stream open for several times the limit; without them the limit ends it.

    One proxy has two bridges: the heartbeat of one is shorter than the limit, that of the other is longer.

    Args:
        opened: set once both are open.
    """
    limit = setup.edge.idle_seconds
    quiet: dict[bool, Stream] = {}
    since: dict[bool, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        for number in range(20):  # The proxy chooses the bridge of a stream.
            stream = await stack.enter_async_context(setup.opened(f"quiet-{number}"))
            has_heartbeats = (await stream.ready()).json["heartbeat_seconds"] != SILENT_HEARTBEAT
            quiet.setdefault(has_heartbeats, stream)
            since.setdefault(has_heartbeats, time.monotonic())
            if len(quiet) == 2:
                break
        if opened is not None:
            opened.set()

        async def seconds_open(has_heartbeats: bool, times: int) -> float:
            """How long a stream stays open after its ready, at most so many times the limit."""
            with contextlib.suppress(*BROKEN):
                await quiet[has_heartbeats].next(seconds=since[has_heartbeats] + times * limit - time.monotonic())
            return time.monotonic() - since[has_heartbeats]

        kept, cut = await asyncio.gather(
            seconds_open(True, 2), seconds_open(False, 3 if setup.edge.has_idle_limit else 2)
        )
    assert kept >= 2 * limit, f"cut after {kept:.2f} s though it had heartbeats: {setup.edge.logs()[-2000:]}"
    if not setup.edge.has_idle_limit:
        assert cut >= 2 * limit, f"it does have an idle limit: {cut:.2f} s"
        return {}
    assert 0.5 * limit < cut < 3 * limit, f"an idle limit of {limit} s cut after {cut:.2f} s"
    return {"idle limit, s": limit, "cut without heartbeats, s": cut}


async def resume(setup: Setup) -> None:
    """Last-Event-ID arrives: missed events come, and none twice."""
    async with setup.opened("resumer") as stream:
        assert not (await stream.ready()).json["resumed"]
        await setup.vhost.publish("user.resumer.job.completed", cloudevent("r1"))
        assert (await stream.next_event())["id"] == "r1"
        cursor = stream.decoder.last_event_id
    await setup.vhost.publish("user.resumer.job.completed", cloudevent("r2"))
    async with setup.opened("resumer", cursor=cursor) as stream:
        assert (await stream.ready()).json["resumed"]
        assert (await stream.next_event())["id"] == "r2"


async def many_on_one_connection(setup: Setup, count: int) -> None:
    """More streams than the six connections that a browser opens with HTTP/1.1. All of them are live."""
    async with setup.http2() as client:
        readers = [Reader(setup, "tabs", client) for _ in range(count)]
        async with reading(*readers):
            await setup.vhost.publish("user.tabs.job.completed", cloudevent("t1"))
            await asyncio.gather(*(reader.has(1) for reader in readers))
        assert [reader.ends for reader in readers] == [[]] * count


async def closed_pages(setup: Setup) -> dict[str, float]:
    """When a page closes, its stream ends at the bridge before any heartbeat: it counts towards its user's limit."""
    # If a proxy does not pass on the close, its idle limit ends the silent bridge's streams. So it must be sooner.
    limit = 0.75 * setup.edge.idle_seconds
    quickest = limit
    for _ in range(3):  # A busy machine may be late once; a proxy that waits is late each time.
        user = f"leaver-{secrets.token_hex(4)}"
        # Not over HTTP/2: httpx drops a stream without telling the proxy. The long version tests it with Chromium.
        readers = [Reader(setup, user) for _ in range(6)]
        async with reading(*readers):
            pass
        quickest = min(quickest, await ended_at_the_bridges(setup, user, len(readers)))
        if quickest < limit:
            return {"closed at the bridge after, ms": quickest * 1000}
    raise AssertionError(f"streams of closed pages were still open {limit:.1f} s later")


async def ended_at_the_bridges(setup: Setup, user: str, count: int) -> float:
    """Seconds until so many streams of this user have ended there."""
    began = time.monotonic()

    def ended() -> int:
        lines = [line for bridge in setup.bridges for line in bridge.lines]
        return sum(line["event"] == "stream ended" and line["user"] == user for line in lines)

    async with asyncio.timeout(PATIENCE):
        while ended() < count:  # noqa: ASYNC110 - the logs of two bridges can only be polled.
            await asyncio.sleep(0.01)  # Between two polls.
    return time.monotonic() - began


async def nothing_private(setup: Setup) -> None:
    """Tokens are not logged, and probes and metrics cannot be reached."""
    token = mint("query")
    stream = setup.stream("query", query=f"access_token={token}", in_query=True)
    await stream.open()
    await stream.ready()
    stream.abort()
    marker = secrets.token_hex(8)
    async with setup.http2() as client:
        for path in ("/metrics", "/livez", "/readyz"):
            assert (await client.get(path)).status_code == 404
        assert (await client.get(f"/schemas/{marker}", params={"access_token": token})).status_code == 404
    # Wait until the log has both requests: most proxies write a line when a stream has ended.
    await setup.edge.logged(marker)
    await setup.edge.logged("/events")
    assert token not in setup.edge.logs()


async def reload(setup: Setup, *, readers: int, every: float, times: int = 1, between: int = 10) -> dict[str, float]:
    """Reloads while events are published: each reader gets each event once and in order, even if it was cut.

    Args:
        between: events before the first reload and after each.
    """
    async with setup.http2() as client:
        one = [Reader(setup, "publishing") for _ in range(readers)]
        two = [Reader(setup, "publishing", client) for _ in range(readers)]
        async with reading(*one, *two):
            slowest = 0.0
            async with publishing(setup.vhost, "user.publishing.job.completed", every=every) as published:
                await one[0].has(between)
                for _ in range(times):
                    began = time.monotonic()
                    await setup.edge.reload()
                    slowest = max(slowest, time.monotonic() - began)
                    async with reading(Reader(setup, "new")):
                        pass
                    await one[0].has(len(published) + between)
            await asyncio.gather(*(reader.has(len(published)) for reader in (*one, *two)))
    ids = list(published)
    for reader in (*one, *two):
        assert reader.ids == ids, f"{reader.ends}\n{setup.edge.logs()[-4000:]}"
        assert (reader.unresumed, reader.refused) == (0, 0)
    delays = sorted(reader.arrived[one_id] - published[one_id] for reader in (*one, *two) for one_id in ids)
    return {
        "reloads": times,
        "deliveries": len(delays),
        "cut, HTTP/1.1": sum(len(reader.ends) for reader in one),
        "cut, HTTP/2": sum(len(reader.ends) for reader in two),
        "readers of each": readers,
        "median, ms": delays[len(delays) // 2] * 1000,
        "slowest, ms": delays[-1] * 1000,
        "reload, s": slowest,
    }


async def no_bridge(setup: Setup) -> None:
    """No bridge is up: an EventSource gets an answer after which it reconnects, and the proxy logs no token."""
    token = mint("query")
    stream = setup.stream("query", query=f"access_token={token}", in_query=True)
    await stream.open()
    await stream.ready()
    for bridge in setup.bridges:
        await bridge.stop()  # Killed, in the middle of that stream.
    with pytest.raises(BROKEN):
        await stream.next()
    stream.abort()
    origin = "https://app.example.com"
    async with setup.http2() as client:
        response = await client.get("/events", params={"access_token": token}, headers={"Origin": origin})
        assert response.http_version == "HTTP/2"
        if setup.edge.answers_without_bridges:
            assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
            assert response.headers["access-control-allow-origin"] == origin
            assert response.headers["access-control-allow-credentials"] == "true"
            field, _, pause = response.text.partition(": ")
            assert field == "retry"
            assert pause.endswith("\n")
            assert 4000 <= int(pause) < 20_000
        else:
            assert response.status_code in (502, 503, 504)
        # For other paths the answer is an error: a page would treat an empty 200 as the script.
        assert (await client.get("/client.js")).status_code in (502, 503, 504)
    await setup.edge.logged("/client.js")
    assert token not in setup.edge.logs()


async def rate_limit(setup: Setup) -> None:
    """A few streams of one token open at once. The others get a pause that an EventSource understands."""
    answers = []
    async with httpx.AsyncClient(verify=setup.edge.trust(), timeout=PATIENCE) as client:
        headers = {"Authorization": f"Bearer {mint('attacker')}"}
        for number in range(12):
            if number == 11:
                headers["Origin"] = "https://app.example.com"  # A page of another host, which can read the answer.
            async with client.stream("GET", f"{setup.edge.url}/events", headers=headers) as response:
                text = await anext(response.aiter_text()) if response.status_code != 429 else ""
                answers.append("opened" if "bridge.ready" in text else "refused")
                if answers[-1] == "refused" and setup.edge.answers_without_bridges:
                    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
                    assert response.headers.get("access-control-allow-origin", "") == headers.get("Origin", "")
                    field, _, pause = text.partition(": ")
                    assert field == "retry"
                    assert 4000 <= int(pause) < 20_000
    assert answers == ["opened"] * 5 + ["refused"] * 7, setup.edge.logs()
    assert sum([await bridge.metric("bridge_streams_opened_total") for bridge in setup.bridges]) == 5


@contextlib.asynccontextmanager
async def proxy_with_bridges(
    kind: type[Edge],
    start: StartService,
    vhost: Vhost,
    folder: Path,
    *,
    idle_seconds: float = 2,
    limited: bool = False,
) -> AsyncIterator[Setup]:
    """A proxy of this kind with two bridges behind it, one of which sends few heartbeats."""
    (internal,) = free_ports(1)

    def start_one(host: str, heartbeat: float) -> Awaitable[Service]:
        return start(
            BIND=f"{host}:0",
            INTERNAL_BIND=f"{host}:{internal}",
            HEARTBEAT_SECONDS=f"{heartbeat:g}",
            QUERY_TOKEN="true",
            MAX_CONNECTIONS_PER_USER="100",
        )

    frequent, silent = BRIDGE_HOSTS
    bridges = list(await asyncio.gather(start_one(frequent, idle_seconds / 4), start_one(silent, SILENT_HEARTBEAT)))
    made = kind(folder, bridges, idle_seconds)
    made.limits = dict(kind.limited) if limited else {}
    async with made as edge:
        yield Setup(edge, bridges, vhost)
