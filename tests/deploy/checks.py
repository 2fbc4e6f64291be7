"""What has to hold of any proxy in front of the bridge. Each check returns what it measured."""

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
"""Of one of the two bridges, so that its quiet streams meet the proxy's idle limit; the other's do not."""

BROKEN = (EOFError, OSError, ssl.SSLError, ValueError, IndexError, asyncio.IncompleteReadError, httpx.HTTPError)
"""However a stream may end that its client did not end."""


@dataclass(frozen=True)
class Place:
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
        """At most one connection, so that what does not fit on it fails."""
        return httpx.AsyncClient(
            http1=False,
            http2=True,
            verify=self.edge.trust(),
            base_url=self.edge.url,
            limits=httpx.Limits(max_connections=1),
            timeout=httpx.Timeout(PATIENCE, read=None),
        )


class Reader:
    """A page's end of it: comes back with its cursor, however its stream ended.

    Args:
        client: for HTTP/2; otherwise it is HTTP/1.1 on a connection of its own.
    """

    def __init__(self, place: Place, user: str, client: httpx.AsyncClient | None = None) -> None:
        self._place = place
        self._user = user
        self._client = client
        self._cursor = ""
        self._news = asyncio.Condition()
        self.ready = 0
        self.ids: list[str] = []
        self.arrived: dict[str, float] = {}
        self.unresumed = 0
        """Times that it came back and was not taken on where it had been."""
        self.refused = 0
        """Statuses other than 200, each of which would have been the end of an EventSource."""
        self.ends: list[str] = []
        """What ended each of its streams."""

    async def run(self) -> None:
        while True:
            frames = self._over_http1() if self._client is None else self._over_http2(self._client)
            try:
                async with contextlib.aclosing(frames):
                    async for frame in frames:
                        await self._note(frame)
            except BROKEN as error:
                self.ends.append(repr(error))
            await asyncio.sleep(0.05)  # The pause of a page that comes back.

    async def _over_http1(self) -> AsyncGenerator[Frame]:
        async with self._place.opened(self._user, cursor=self._cursor) as stream:
            self._look_at(stream.status)
            while True:
                yield await stream.next()

    async def _over_http2(self, client: httpx.AsyncClient) -> AsyncGenerator[Frame]:
        headers = {"Authorization": f"Bearer {mint(self._user)}"}
        if self._cursor:
            headers["Last-Event-ID"] = self._cursor
        decoder = Decoder()
        async with client.stream("GET", "/events", headers=headers) as response:
            assert response.http_version == "HTTP/2"
            self._look_at(response.status_code)
            async for piece in response.aiter_raw():
                for frame in decoder.feed(piece):
                    yield frame

    def _look_at(self, status: int) -> None:
        if status != 200:
            self.refused += 1
            raise EOFError(f"status {status}")

    async def _note(self, frame: Frame) -> None:
        self._cursor = frame.id
        async with self._news:
            if frame.event == "bridge.ready":
                self.unresumed += self.ready > 0 and not frame.json["resumed"]
                self.ready += 1
            elif not frame.event.startswith("bridge."):
                event_id = frame.json["id"]
                self.ids.append(event_id)
                self.arrived.setdefault(event_id, time.monotonic())
            self._news.notify_all()

    async def is_ready(self) -> None:
        await self._until(lambda: self.ready > 0)

    async def has(self, count: int) -> None:
        await self._until(lambda: len(self.ids) >= count)

    async def _until(self, look: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(look)


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
async def flow(vhost: Vhost, key: str, *, every: float) -> AsyncIterator[dict[str, float]]:
    """Publishes one event after another while the block lasts; gives their ids, and when each was about to go out."""
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
                await asyncio.sleep(every)  # The rate of the flow.

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


async def each_at_once(place: Place, count: int) -> dict[str, float]:
    """The first byte, and then each event although nothing follows it: in a proxy that waits for
    a full buffer they would stay for ever.
    """
    reader = Reader(place, "at-once")
    began = time.monotonic()
    async with reading(reader):
        first = time.monotonic() - began
        slowest = 0.0
        for number in range(count):
            published = time.monotonic()
            await place.vhost.publish("user.at-once.job.completed", cloudevent(f"a{number}"))
            await reader.has(number + 1)
            slowest = max(slowest, reader.arrived[f"a{number}"] - published)
    return {"first frame, ms": first * 1000, "slowest event with its publisher's connection, ms": slowest * 1000}


async def idle_limit(place: Place, opened: asyncio.Event | None = None) -> dict[str, float]:
    """Heartbeats keep a quiet stream open for several times the limit; without them the limit ends it.

    The two stand side by side behind one proxy: one bridge's heartbeat is shorter than the limit, the other's longer.

    Args:
        opened: set once both are open.
    """
    limit = place.edge.idle_seconds
    quiet: dict[bool, Stream] = {}
    since: dict[bool, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        for number in range(20):  # Which bridge a stream gets is not for us to say.
            stream = await stack.enter_async_context(place.opened(f"quiet-{number}"))
            beats = (await stream.ready()).json["heartbeat_seconds"] != SILENT_HEARTBEAT
            quiet.setdefault(beats, stream)
            since.setdefault(beats, time.monotonic())
            if len(quiet) == 2:
                break
        if opened is not None:
            opened.set()

        async def lives(beats: bool, times: int) -> float:
            """How long from its ready on, up to so many times the limit."""
            with contextlib.suppress(*BROKEN):
                await quiet[beats].next(seconds=since[beats] + times * limit - time.monotonic())
            return time.monotonic() - since[beats]

        kept, cut = await asyncio.gather(lives(True, 2), lives(False, 3 if place.edge.has_idle_limit else 2))
    assert kept >= 2 * limit, f"cut after {kept:.2f} s in spite of heartbeats: {place.edge.said()[-2000:]}"
    if not place.edge.has_idle_limit:
        assert cut >= 2 * limit, f"it does have an idle limit: {cut:.2f} s"
        return {}
    assert 0.5 * limit < cut < 3 * limit, f"an idle limit of {limit} s cut after {cut:.2f} s"
    return {"idle limit, s": limit, "cut without heartbeats, s": cut}


async def resume(place: Place) -> None:
    """Last-Event-ID arrives: what was missed comes, and nothing twice."""
    async with place.opened("resumer") as stream:
        assert not (await stream.ready()).json["resumed"]
        await place.vhost.publish("user.resumer.job.completed", cloudevent("r1"))
        assert (await stream.next_event())["id"] == "r1"
        cursor = stream.decoder.last_event_id
    await place.vhost.publish("user.resumer.job.completed", cloudevent("r2"))
    async with place.opened("resumer", cursor=cursor) as stream:
        assert (await stream.ready()).json["resumed"]
        assert (await stream.next_event())["id"] == "r2"


async def many_on_one_connection(place: Place, count: int) -> None:
    """More streams than the six connections of HTTP/1.1, all of them live."""
    async with place.http2() as client:
        readers = [Reader(place, "tabs", client) for _ in range(count)]
        async with reading(*readers):
            await place.vhost.publish("user.tabs.job.completed", cloudevent("t1"))
            await asyncio.gather(*(reader.has(1) for reader in readers))
        assert [reader.ends for reader in readers] == [[]] * count


async def leaves(place: Place) -> dict[str, float]:
    """A page that goes is gone from the bridge too, and before any heartbeat: it counts against its user's limit."""
    # Where a proxy does not see to it, the idle limit ends the silent bridge's streams; so it has to be sooner.
    limit = 0.75 * place.edge.idle_seconds
    quickest = limit
    for _ in range(3):  # A busy machine may be late; a proxy that waits is late each time.
        user = f"leaver-{secrets.token_hex(4)}"
        # Not over HTTP/2, where httpx forgets a stream and does not say so; Chromium does, in the long version.
        readers = [Reader(place, user) for _ in range(6)]
        async with reading(*readers):
            pass
        quickest = min(quickest, await ended_at_the_bridges(place, user, len(readers)))
        if quickest < limit:
            return {"gone from the bridge after, ms": quickest * 1000}
    raise AssertionError(f"streams of pages that have gone were still there {limit:.1f} s later")


async def ended_at_the_bridges(place: Place, user: str, count: int) -> float:
    """Seconds until so many streams of this user have ended there."""
    began = time.monotonic()

    def ended() -> int:
        lines = [line for bridge in place.bridges for line in bridge.lines]
        return sum(line["event"] == "stream ended" and line["user"] == user for line in lines)

    async with asyncio.timeout(PATIENCE):
        while ended() < count:  # noqa: ASYNC110 - both bridges' logs at once have nothing to wait on.
            await asyncio.sleep(0.01)  # Between two looks.
    return time.monotonic() - began


async def nothing_private(place: Place) -> None:
    """Tokens are not logged, and probes and metrics are not there."""
    token = mint("query")
    stream = place.stream("query", query=f"access_token={token}", in_query=True)
    await stream.open()
    await stream.ready()
    stream.abort()
    sign = secrets.token_hex(8)
    async with place.http2() as client:
        for path in ("/metrics", "/livez", "/readyz"):
            assert (await client.get(path)).status_code == 404
        assert (await client.get(f"/schemas/{sign}", params={"access_token": token})).status_code == 404
    # Its log is being written, and the stream is in it; most write a line when a stream has ended.
    await place.edge.logged(sign)
    await place.edge.logged("/events")
    assert token not in place.edge.said()


async def reload(place: Place, *, readers: int, every: float, times: int = 1, between: int = 10) -> dict[str, float]:
    """Reloads under a flow of events: each reader gets each of them, once, in order, cut or not.

    Args:
        between: events before the first reload and after each.
    """
    async with place.http2() as client:
        one = [Reader(place, "flow") for _ in range(readers)]
        two = [Reader(place, "flow", client) for _ in range(readers)]
        async with reading(*one, *two):
            slowest = 0.0
            async with flow(place.vhost, "user.flow.job.completed", every=every) as published:
                await one[0].has(between)
                for _ in range(times):
                    began = time.monotonic()
                    await place.edge.reload()
                    slowest = max(slowest, time.monotonic() - began)
                    async with reading(Reader(place, "newcomer")):
                        pass
                    await one[0].has(len(published) + between)
            await asyncio.gather(*(reader.has(len(published)) for reader in (*one, *two)))
    ids = list(published)
    for reader in (*one, *two):
        assert reader.ids == ids, f"{reader.ends}\n{place.edge.said()[-4000:]}"
        assert (reader.unresumed, reader.refused) == (0, 0)
    late = sorted(reader.arrived[one_id] - published[one_id] for reader in (*one, *two) for one_id in ids)
    return {
        "reloads": times,
        "deliveries": len(late),
        "cut, HTTP/1.1": sum(len(reader.ends) for reader in one),
        "cut, HTTP/2": sum(len(reader.ends) for reader in two),
        "readers of each": readers,
        "median, ms": late[len(late) // 2] * 1000,
        "slowest, ms": late[-1] * 1000,
        "reload, s": slowest,
    }


async def away(place: Place) -> None:
    """No bridge is up: an EventSource gets what it comes back from, and no token is in what the proxy says of it."""
    token = mint("query")
    stream = place.stream("query", query=f"access_token={token}", in_query=True)
    await stream.open()
    await stream.ready()
    for bridge in place.bridges:
        await bridge.stop()  # Killed, in the middle of that stream.
    with pytest.raises(BROKEN):
        await stream.next()
    stream.abort()
    origin = "https://app.example.com"
    async with place.http2() as client:
        response = await client.get("/events", params={"access_token": token}, headers={"Origin": origin})
        assert response.http_version == "HTTP/2"
        if place.edge.answers_when_away:
            assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
            assert response.headers["access-control-allow-origin"] == origin
            assert response.headers["access-control-allow-credentials"] == "true"
            field, _, pause = response.text.partition(": ")
            assert field == "retry"
            assert pause.endswith("\n")
            assert 4000 <= int(pause) < 20_000
        else:
            assert response.status_code in (502, 503, 504)
        # Not for the rest: a script that gets an empty 200 would take it for a script.
        assert (await client.get("/client.js")).status_code in (502, 503, 504)
    await place.edge.logged("/client.js")
    assert token not in place.edge.said()


async def rate_limit(place: Place) -> None:
    """Of one token's streams a few are opened at once, and the others get a pause that an EventSource understands."""
    answers = []
    async with httpx.AsyncClient(verify=place.edge.trust(), timeout=PATIENCE) as client:
        headers = {"Authorization": f"Bearer {mint('attacker')}"}
        for number in range(12):
            if number == 11:
                headers["Origin"] = "https://app.example.com"  # As a page of another host, whose answer is readable.
            async with client.stream("GET", f"{place.edge.url}/events", headers=headers) as response:
                text = await anext(response.aiter_text()) if response.status_code != 429 else ""
                answers.append("opened" if "bridge.ready" in text else "refused")
                if answers[-1] == "refused" and place.edge.answers_when_away:
                    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
                    assert response.headers.get("access-control-allow-origin", "") == headers.get("Origin", "")
                    field, _, pause = text.partition(": ")
                    assert field == "retry"
                    assert 4000 <= int(pause) < 20_000
    assert answers == ["opened"] * 5 + ["refused"] * 7, place.edge.said()
    assert sum([await bridge.metric("bridge_streams_opened_total") for bridge in place.bridges]) == 5


@contextlib.asynccontextmanager
async def behind(
    kind: type[Edge],
    start: StartService,
    vhost: Vhost,
    folder: Path,
    *,
    idle_seconds: float = 2,
    limited: bool = False,
) -> AsyncIterator[Place]:
    """A proxy of this kind with two bridges behind it, one of which does not say much."""
    (internal,) = free_ports(1)

    def start_one(host: str, heartbeat: float) -> Awaitable[Service]:
        return start(
            BIND=f"{host}:0",
            INTERNAL_BIND=f"{host}:{internal}",
            HEARTBEAT_SECONDS=f"{heartbeat:g}",
            QUERY_TOKEN="true",
            MAX_CONNECTIONS_PER_USER="100",
        )

    beating, silent = BRIDGE_HOSTS
    bridges = list(await asyncio.gather(start_one(beating, idle_seconds / 4), start_one(silent, SILENT_HEARTBEAT)))
    made = kind(folder, bridges, idle_seconds)
    made.limits = dict(kind.limited) if limited else {}
    async with made as edge:
        yield Place(edge, bridges, vhost)
