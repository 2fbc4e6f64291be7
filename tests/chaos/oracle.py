"""Publishers that number what they publish, clients that note what they see, and the comparison of the two.

The clients are an EventSource's logic over a plain socket, with a decoder of their own: they come back with the last id
that they saw, to any replica, after the pause that they were told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import aio_pika

from bridge import Audience, Publisher, PublishError
from bridge.event import EventData
from bridge.samples.jobs import JobProgress
from tests.client import Stream
from tests.rabbit import cloudevent
from tests.service import mint

Key = tuple[int, str]
"""Publisher and audience: events of one key come in order."""

FIRST_BURST = 1_000
"""Bursts are publishers with numbers from here on: each is a publisher of its own, on one channel."""

BURST_WINDOW = 500
"""Events of a burst that are published without waiting for a confirm."""

TOKEN_SECONDS = 86_400
"""Life of the clients' tokens: longer than any jump of a replica's clock."""

DROPPED_WITHIN = 512
"""Within one stream, the contract lets no event come again that is among the last so many."""


@dataclass
class Ledger:
    """What was confirmed: for each key, when the publishing of each number began."""

    began: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    confirmed: int = 0
    retries: int = 0
    bursts: int = 0
    reordered: set[int] = field(default_factory=set)
    """Bursts of which some events were published again after later ones: RabbitMQ nacked them, or the connection broke.
    Their order is not promised; that they arrive is."""


async def publish(
    number: int, url: str, users: int, groups: int, rate: float, ledger: Ledger, stop: asyncio.Event
) -> None:
    """One publisher: the next event to anybody, one after another, each until it is confirmed."""
    chance = random.Random(f"publisher {number} {users}")
    audiences = [
        *(Audience.user(str(user)) for user in range(users)),
        *(Audience.group(str(group)) for group in range(groups)),
        Audience.everyone(),
    ]
    publisher = Publisher(url, source=f"/chaos/{number}", timeout=10)
    try:
        while not stop.is_set():
            audience = chance.choice(audiences)
            key = (number, str(audience))
            sequence = len(ledger.began[key])
            data: EventData = JobProgress(job_id=f"{number}|{audience}|{sequence}", percent=1)
            began = time.monotonic()
            attributes: dict[str, str] = {}
            while True:
                try:
                    await publisher.publish(audience, data, **attributes)
                    break
                except PublishError as error:
                    # Not confirmed in time: the same id is the same event.
                    attributes = {"id": getattr(error, "id", "")} if getattr(error, "id", "") else attributes
                    ledger.retries += 1
                    await asyncio.sleep(0.2)  # The pause before the next try.
            ledger.began[key].append(began)
            ledger.confirmed += 1
            await asyncio.sleep(chance.expovariate(rate))  # The rate of a publisher.
    finally:
        await publisher.close()


@contextlib.contextmanager
def _unless_cut_off() -> Iterator[None]:
    """Leaves the block when the broker is away or ends the connection, whichever exception the library makes of it."""
    try:
        yield
    except Exception:  # noqa: BLE001, S110
        pass
    except asyncio.CancelledError:
        # The library's word for a connection that is gone, too, in a task that nobody has cancelled.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise


async def burst(url: str, audiences: Sequence[Audience], count: int, ledger: Ledger) -> None:
    """Publishes `count` events to the audiences in turn on one channel, as fast as RabbitMQ confirms them.

    No code of the bridge's: any program may publish so. What is not confirmed is published again, under the same id.
    """
    number = FIRST_BURST + ledger.bursts
    ledger.bursts += 1
    began = time.monotonic()
    messages: list[tuple[str, aio_pika.Message]] = []
    for index in range(count):
        audience = audiences[index % len(audiences)]
        sequence = index // len(audiences)
        event = cloudevent(f"b{number}-{index}", "job.progress", job_id=f"{number}|{audience}|{sequence}", percent=1)
        messages.append((f"{audience.prefix}job.progress", aio_pika.Message(json.dumps(event).encode())))
    while messages:
        with _unless_cut_off():
            connection = await aio_pika.connect(url)
            async with connection:
                # While a node starts, RabbitMQ 3.10 returns and confirms what it cannot route yet.
                channel = await connection.channel(on_return_raises=True)
                exchange = await channel.get_exchange("events", ensure=False)
                while messages and not channel.is_closed:
                    # Tasks run in the order in which they are made, each up to its first frame.
                    some = messages[:BURST_WINDOW]
                    sending = [exchange.publish(message, key, mandatory=True) for key, message in some]
                    results = await asyncio.gather(*sending, return_exceptions=True)
                    failed = [
                        each for each, result in zip(some, results, strict=True) if isinstance(result, BaseException)
                    ]
                    if failed:
                        ledger.reordered.add(number)
                        ledger.retries += len(failed)
                        await asyncio.sleep(0.2)  # The pause before the next try.
                    messages[: len(some)] = failed
        if messages:
            await asyncio.sleep(0.2)  # The pause before the next connection.
    for place, audience in enumerate(audiences):
        ledger.began[number, str(audience)] = [began] * len(range(place, count, len(audiences)))
    ledger.confirmed += count


class Door(Protocol):
    """Where clients come in: a replica, or a proxy before several."""

    public: str


class Client:
    """
    Args:
        longest_pause: in seconds. Told to wait for longer, it waits for so long; a browser would do as it is told.
    """

    def __init__(
        self,
        user: str,
        groups: tuple[str, ...],
        replicas: Sequence[Door],
        chance: random.Random,
        *,
        longest_pause: float = float("inf"),
    ) -> None:
        self.user = user
        self.groups = groups
        self._replicas = replicas
        self._chance = chance
        self._longest_pause = longest_pause
        self._stream: Stream | None = None
        self._stalled = asyncio.Event()
        self._stalled.set()
        self._segment_bytes: int | None = None
        self._positions: dict[tuple[Key, int], int] = {}
        """Of the present stream: each event, and the place at which it last came."""
        self._place = 0
        self.repeats: list[str] = []
        """Events that came again within one stream, where the contract says that the bridge drops them."""
        self.last_id = ""
        self.owed_since: float | None = None
        """Events whose publishing began after this are owed: its first ready, or the last gap it was told."""
        self.seen: dict[Key, list[int]] = defaultdict(list)
        self.gaps = 0
        self.connects = 0
        self.resumed = 0
        self.byes: dict[str, int] = defaultdict(int)
        self.ready_at: list[float] = []
        """When each of its streams became ready, by the monotonic clock."""
        self.longest_away = 0.0
        """Seconds from the end of a stream to the next one's ready."""
        self._left_at: float | None = None
        self.empty_blocks = 0
        self.history: list[str] = []
        """What it did and was told, for who looks for a fault."""

    @property
    def away(self) -> bool:
        """Between two streams."""
        return self._left_at is not None

    @property
    def audiences(self) -> set[str]:
        return {f"user:{self.user}", "all", *(f"group:{group}" for group in self.groups)}

    def cut(self) -> None:
        if self._stream is not None:
            self._stream.abort()

    def half_close(self) -> None:
        """Says that it has nothing more to send, and reads on."""
        if self._stream is not None:
            self._stream.half_close()

    async def segment(self, seconds: float) -> None:
        """Comes back again and again, and sends each request in segments of one byte."""
        self._segment_bytes = 1
        self.cut()
        await asyncio.sleep(seconds)  # The fault lasts for so long.
        self._segment_bytes = None

    async def stall(self, seconds: float) -> None:
        """Reads nothing for a while, and leaves the connection open."""
        self._stalled.clear()
        await asyncio.sleep(seconds)  # The fault lasts for so long.
        self._stalled.set()

    async def run(self) -> None:
        retry = 1.0
        while True:
            headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
            replica = self._chance.choice(self._replicas)
            self._stream = stream = Stream(
                replica.public,
                mint(self.user, *self.groups, ttl=TOKEN_SECONDS),
                headers=headers,
                receive_buffer=16_384,
                segment_bytes=self._segment_bytes,
            )
            self._positions.clear()
            self._do("opens a stream", replica)
            try:
                await stream.open()
                self.connects += 1
                self._do(f"reads a stream with status {stream.status}", replica)
                while stream.status == 200:
                    await self._stalled.wait()
                    frame = await stream.next(seconds=60)
                    retry = frame.retry / 1000 if frame.retry is not None else retry
                    self.last_id = frame.id  # By the letter: a block without an id would empty it on a new stream.
                    self._note(frame.event, frame.json)
                    if frame.event.startswith("bridge."):
                        self._write_down(f"is told {frame.event} {frame.data}, id {frame.id!r}")
            except (OSError, EOFError, ValueError, IndexError, asyncio.IncompleteReadError, TimeoutError):
                pass  # However it broke, it comes back.
            finally:
                self.empty_blocks += len(stream.decoder.empty_blocks)
                stream.abort()
            self._left_at = self._left_at or time.monotonic()
            self._do("pauses after a stream", replica)
            await asyncio.sleep(min(retry, self._longest_pause))  # The pause that the bridge told.

    def _do(self, what: str, replica: Door) -> None:
        self._write_down(f"{what} of {replica.public}, last id {self.last_id!r}")

    def _write_down(self, what: str) -> None:
        self.history.append(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {what}")

    def _note(self, event: str, data: dict[str, object]) -> None:
        now = time.monotonic()
        if event == "bridge.ready":
            self.resumed += bool(data["resumed"])
            self.ready_at.append(now)
            if self._left_at is not None:
                self.longest_away = max(self.longest_away, now - self._left_at)
                self._left_at = None
            if self.owed_since is None:
                self.owed_since = now
        elif event == "bridge.gap":
            self.gaps += 1
            self.owed_since = now
        elif event == "bridge.bye":
            self.byes[str(data["reason"])] += 1
        elif not event.startswith("bridge."):
            inner = data["data"]
            assert isinstance(inner, dict)
            publisher, audience, sequence = str(inner["job_id"]).split("|")
            key = (int(publisher), audience)
            self.seen[key].append(int(sequence))
            last = self._positions.get((key, int(sequence)))
            if last is not None and self._place - last <= DROPPED_WITHIN:
                self.repeats.append(f"{key} {sequence}, {self._place - last} events later")
            self._positions[key, int(sequence)] = self._place
            self._place += 1


@dataclass
class Verdict:
    owed: int = 0
    missing: list[str] = field(default_factory=list)
    duplicates: int = 0
    """Over reconnects: the contract lets an event come again there, but says when. `doubled` is to find out why."""
    doubled: Counter[str] = field(default_factory=Counter)
    """Of the duplicates, how many each client has from bursts and from single events."""
    disorder: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    repeats: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> list[str]:
        return [*self.missing, *self.disorder, *self.strangers, *self.repeats]


def _ranges(numbers: Sequence[int]) -> str:
    """As in `3-7 9`."""
    known = set(numbers)
    first = [n for n in numbers if n - 1 not in known]
    last = [n for n in numbers if n + 1 not in known]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))


def judge(ledger: Ledger, clients: list[Client]) -> Verdict:
    verdict = Verdict()
    for name, client in enumerate(clients):
        since = client.owed_since
        verdict.repeats += [f"client {name} saw twice in one stream: {each}" for each in client.repeats]
        for key, began in ledger.began.items():
            seen = client.seen.get(key, [])
            if key[1] not in client.audiences:
                verdict.strangers += [f"client {name} saw {key} {number}" for number in seen]
                continue
            again = len(seen) - len(set(seen))
            verdict.duplicates += again
            verdict.doubled[f"client {name}, {'bursts' if key[0] >= FIRST_BURST else 'single events'}"] += again
            first = list(dict.fromkeys(seen))
            if first != sorted(first) and key[0] not in ledger.reordered:
                verdict.disorder.append(f"client {name} {key}: {first}")
            owed = {number for number, at in enumerate(began) if since is not None and at > since}
            verdict.owed += len(owed)
            lost = sorted(owed - set(seen))
            if lost:
                of = f"{len(lost)} of {len(owed)}"
                verdict.missing.append(
                    f"client {name} ({client.user}) {key}: {of}: {_ranges(lost)}; since {client.history[-1]}"
                )
    return verdict


async def come_to_rest(ledger: Ledger, clients: list[Client], seconds: float) -> Verdict:
    """The verdict once it is good, or after this time."""
    deadline = time.monotonic() + seconds
    while True:
        verdict = judge(ledger, clients)
        if verdict.good or time.monotonic() > deadline:
            return verdict
        await asyncio.sleep(1)  # Between two looks.
