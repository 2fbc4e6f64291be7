"""`python -m tests.endurance.leaks`: open many streams, lose connections, let tokens expire, and count what is left.

It uses real processes: a RabbitMQ node, one bridge, and clients with plain sockets. Each scenario runs a little before
the first count, because some things are made on first use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.local.node import Installation, Node
from tests.client import Stream
from tests.decoder import Frame
from tests.endurance.counts import CountedService, Counts
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import INSTALLATIONS, Vhost, cloudevent
from tests.service import mint

TOGETHER = 40
"""Streams that are open at once."""

USERS = 500
GROUPS = 50

DAY_OF_TOKENS = 20 * 24 * 12
"""Tokens of twenty users in one day, if each token is valid for five minutes."""

TOKEN_SECONDS = 3

PARTS = 10
"""Parts of a scenario. After each part the table gets a row."""

DEADLINES = {
    "service.broker.feed.STEADY_SECONDS": 0.0,  # Each loss is followed by a quick try.
    "service.http.entrance.KEEP_ALIVE_SECONDS": 10
    * PATIENCE,  # No connection ends by this limit; its client closes it.
}

Scenario = Callable[["LeakTest", int], Awaitable[None]]


class LeakTest:
    """One bridge behind a proxy, and the scenarios that run against it."""

    def __init__(self, vhost: Vhost, proxy: Proxy, service: CountedService) -> None:
        self.vhost = vhost
        self.proxy = proxy
        self.service = service
        self._opened = 0
        self.expired = 0
        """Streams that ended with their token. On a busy machine it may expire before its stream opens."""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, vhost: Vhost, folder: Path) -> AsyncIterator[LeakTest]:
        async with Proxy(vhost.node.port) as proxy:
            service = CountedService(
                vhost.url_at(proxy.port),
                folder,
                deadlines=DEADLINES,
                RETRY_SECONDS="0.1",
            )
            await service.start()
            try:
                yield cls(vhost, proxy, service)
            finally:
                await service.stop()

    async def stable_counts(self, before: Counts | None = None) -> Counts:
        """Opens a stream first: when it is ready, all connections to RabbitMQ are there again."""
        async with self._stream(0) as stream:
            await stream.ready()
        return await self.service.stable_counts(self.vhost, before)

    async def streams(self, count: int) -> None:
        """Opens so many streams, of many users and groups, and closes them in four ways."""
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                await self._one_stream(number)

        await asyncio.gather(*(work() for _ in range(min(TOGETHER, count))))

    async def _one_stream(self, number: int) -> None:
        stream = self._stream(number)
        if number % 4 == 0:  # The client resets before there is an answer.
            await stream.request()
            await asyncio.sleep(0.001 * (number % 16))  # Somewhere in the middle of the opening.
            stream.abort()
            return
        await stream.open()
        await stream.ready()
        if number % 4 == 1:
            stream.abort()
        elif number % 4 == 2:
            await stream.close()
        else:
            stream.half_close()
            with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
                await stream.rest()
            stream.abort()

    def _stream(self, number: int) -> Stream:
        groups = [str(number % GROUPS), f"only-{number}"]
        return Stream(self.service.public, mint(str(number % USERS), *groups, ttl=86_400))

    async def losses(self, count: int) -> None:
        """Cuts the connection to RabbitMQ so many times, with open streams. After every tenth cut, all streams get an
        event before the next one."""
        streams = [self._stream(number) for number in range(10)]
        for stream in streams:
            await stream.open()
            await stream.ready()
        try:
            for number in range(count):
                connects = self.service.events["broker connected"]
                self.proxy.cut()
                await self.service.wait_until_logged("broker connected", connects + 1)
                if number % 10 == 0 or number == count - 1:
                    await self._wait_for_delivery(streams, number)
        finally:
            for stream in streams:
                stream.abort()

    async def _wait_for_delivery(self, streams: list[Stream], number: int) -> None:
        self._opened += 1
        mark = f"loss-{self._opened}-{number}"
        await self.vhost.publish("all.job.completed", cloudevent(mark))
        for stream in streams:
            while (await stream.next_event())["id"] != mark:
                pass

    async def tokens(self, count: int) -> None:
        """Lets so many tokens expire. With each one, a client returns until it is refused."""
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                token = mint(str(number % USERS), str(number % GROUPS), ttl=TOKEN_SECONDS)
                while await self._read_until_expired(token):
                    self.expired += 1

        await asyncio.gather(*(work() for _ in range(min(100, count))))

    async def _read_until_expired(self, token: str) -> bool:
        """Reads a stream until its token has expired; False if the token had expired before."""
        stream = Stream(self.service.public, token)
        await stream.open()
        if stream.status == 200:
            frames: list[Frame] = await stream.rest()
            assert frames[-1].json["reason"] == "expired", frames
        else:
            assert stream.status == 401
        await stream.close()
        return stream.status == 200


SCENARIOS: dict[str, tuple[str, Scenario]] = {
    "streams": ("streams opened and closed", LeakTest.streams),
    "losses": ("connections to RabbitMQ lost", LeakTest.losses),
    "tokens": ("tokens expired", LeakTest.tokens),
}


@dataclass(frozen=True)
class Row:
    """The counts after `count` streams, losses or tokens."""

    count: int
    seconds: float
    counts: Counts


async def leaks(
    vhost: Vhost,
    folder: Path,
    name: str,
    count: int,
    *,
    parts: int = 2,
    on_part: Callable[[Row], None] = lambda _: None,
) -> tuple[Row, Row, LeakTest]:
    """Runs a scenario, and returns the counts before and after it.

    Args:
        on_part: called with the counts before, and after each part.
    """
    _, scenario = SCENARIOS[name]
    async with LeakTest.open(vhost, folder) as test:
        # Each of the bridge's channel workers opens a channel with its first stream, and keeps it.
        await test.streams(2 * TOGETHER)
        await scenario(test, min(count, 2 * TOGETHER))
        before = last = Row(0, 0.0, await test.stable_counts())
        on_part(before)
        began = time.monotonic()
        for part in range(1, parts + 1):
            done = count * part // parts
            await scenario(test, done - last.count)
            took = time.monotonic() - began
            last = Row(done, took, await test.stable_counts(before.counts))
            on_part(last)
        return before, last, test


def format_row(row: Row) -> str:
    each = row.counts
    cells = [each.queues, each.bindings, each.descriptors, each.tasks, f"{each.objects:,}", each.rss_mb]
    return f"| {row.count:,} | {row.seconds:.0f} | {' | '.join(map(str, cells))} |"


HEAD = """\
| done | seconds | queues | bindings | file descriptors | tasks | objects | RSS, MB |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=50_000)
    parser.add_argument("--losses", type=int, default=1_000)
    parser.add_argument("--tokens", type=int, default=DAY_OF_TOKENS)
    parser.add_argument("--rabbitmq", default="", help="only versions that begin so, as in 4 or 3.10")
    options = parser.parse_args()
    failed = False
    for rabbitmq in INSTALLATIONS:
        if rabbitmq.version.startswith(options.rabbitmq):
            for name in SCENARIOS:
                count = getattr(options, name)
                failed |= count > 0 and not asyncio.run(_try(rabbitmq, name, count))
    raise SystemExit(failed)


async def _try(rabbitmq: Installation, name: str, count: int) -> bool:
    """Whether nothing is left. Prints the table row by row."""
    with tempfile.TemporaryDirectory(prefix="leaks-") as folder:
        node = Node(Path(folder) / "node", management=True, rabbitmq=rabbitmq)
        try:
            await asyncio.to_thread(node.start)
            vhost = Vhost(node)
            vhost.create()
            print(f"{count:,} {SCENARIOS[name][0]}, RabbitMQ {rabbitmq.version}\n\n{HEAD}", flush=True)
            counts: list[Counts] = []

            def on_part(part: Row) -> None:
                counts.append(part.counts)
                print(format_row(part), flush=True)

            _, _, test = await leaks(vhost, Path(folder), name, count, parts=PARTS, on_part=on_part)
            before, half, after = counts[0], counts[PARTS // 2], counts[-1]
            print(f"\nstreams that ended with their token: {test.expired}", flush=True)
            print(f"more objects since half of the run: {(after.kinds - half.kinds).most_common(8)}\n", flush=True)
            if after.exact != before.exact:
                print(after.differs(before), flush=True)
            vhost.close()
        finally:
            node.remove()
    return after.exact == before.exact


if __name__ == "__main__":
    main()
