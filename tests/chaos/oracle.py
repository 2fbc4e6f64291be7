"""Publishers that number their events, clients that record what they receive, and the comparison of the two.

The clients do what an EventSource does, over a plain socket and with an independent decoder. They return with the last
id that they saw, to any replica, after the pause that the bridge asked for.
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
"""Bursts have publisher numbers from here on: each burst is a publisher of its own, on one channel."""

BURST_WINDOW = 500
"""Events of a burst that are published without waiting for a confirm."""

TOKEN_SECONDS = 86_400
"""Life of the clients' tokens: longer than any jump of a replica's clock."""

DROPPED_WITHIN = 512
"""The contract: within one stream, an event that is among the last so many must not come again."""


@dataclass
class Ledger:
    """The confirmed events: for each key, when the publishing of each number began."""

    began: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    confirmed: int = 0
    retries: int = 0
    bursts: int = 0
    reordered: set[int] = field(default_factory=set)
    """Bursts with events that were published again after later ones: RabbitMQ nacked them, or the connection broke.
    They must arrive, but in any order."""


async def publish(
    number: int, url: str, users: int, groups: int, rate: float, ledger: Ledger, stop: asyncio.Event
) -> None:
    """One publisher: one event after another to a random audience, each repeated until it is confirmed."""
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
def _ignore_lost_connection() -> Iterator[None]:
    """Ends the block without an error if the broker is away or ends the connection, whatever the library raises."""
    try:
        yield
    except Exception:  # noqa: BLE001, S110
        pass
    except asyncio.CancelledError:
        # The library also raises this for a lost connection, in a task that was not cancelled.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise


async def burst(url: str, audiences: Sequence[Audience], count: int, ledger: Ledger) -> None:
    """Publishes `count` events to the audiences in turn on one channel, as fast as RabbitMQ confirms them.

    It uses no code of the bridge: any program may publish so. An event without a confirm is published again, with the
    same id.
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
        with _ignore_lost_connection():
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


class Target(Protocol):
    """What clients connect to: a replica, or a proxy in front of several."""

    public: str


class Client:
    """
    Args:
        longest_pause: the longest pause between two streams, in seconds. A browser waits as long as the bridge asks.
    """

    def __init__(
        self,
        user: str,
        groups: tuple[str, ...],
        replicas: Sequence[Target],
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
        """In the current stream: for each event, its index when it last came."""
        self._index = 0
        self.repeats: list[str] = []
        """Events that came again within one stream, though the contract says that the bridge drops them."""
        self.last_id = ""
        self.expected_since: float | None = None
        """The client must get events whose publishing began after this time: its first ready, or its last gap."""
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
        """What it did and received, to help find a fault."""

    @property
    def away(self) -> bool:
        """Whether it is between two streams."""
        return self._left_at is not None

    @property
    def audiences(self) -> set[str]:
        return {f"user:{self.user}", "all", *(f"group:{group}" for group in self.groups)}

    def cut(self) -> None:
        if self._stream is not None:
            self._stream.abort()

    def half_close(self) -> None:
        """Closes its sending side, and still reads."""
        if self._stream is not None:
            self._stream.half_close()

    async def segment(self, seconds: float) -> None:
        """Reconnects for a time, and sends each request in segments of one byte."""
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
            self._log_step("opens a stream", replica)
            try:
                await stream.open()
                self.connects += 1
                self._log_step(f"reads a stream with status {stream.status}", replica)
                while stream.status == 200:
                    await self._stalled.wait()
                    frame = await stream.next(seconds=60)
                    retry = frame.retry / 1000 if frame.retry is not None else retry
                    self.last_id = (
                        frame.id
                    )  # As the standard says: a block without an id would empty it on a new stream.
                    self._record(frame.event, frame.json)
                    if frame.event.startswith("bridge."):
                        self._log(f"gets {frame.event} {frame.data}, id {frame.id!r}")
            except (OSError, EOFError, ValueError, IndexError, asyncio.IncompleteReadError, TimeoutError):
                pass  # It reconnects after any error.
            finally:
                self.empty_blocks += len(stream.decoder.empty_blocks)
                stream.abort()
            self._left_at = self._left_at or time.monotonic()
            self._log_step("pauses after a stream", replica)
            await asyncio.sleep(min(retry, self._longest_pause))  # The pause that the bridge asked for.

    def _log_step(self, what: str, replica: Target) -> None:
        self._log(f"{what} of {replica.public}, last id {self.last_id!r}")

    def _log(self, what: str) -> None:
        self.history.append(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {what}")

    def _record(self, event: str, data: dict[str, object]) -> None:
        now = time.monotonic()
        if event == "bridge.ready":
            self.resumed += bool(data["resumed"])
            self.ready_at.append(now)
            if self._left_at is not None:
                self.longest_away = max(self.longest_away, now - self._left_at)
                self._left_at = None
            if self.expected_since is None:
                self.expected_since = now
        elif event == "bridge.gap":
            self.gaps += 1
            self.expected_since = now
        elif event == "bridge.bye":
            self.byes[str(data["reason"])] += 1
        elif not event.startswith("bridge."):
            inner = data["data"]
            assert isinstance(inner, dict)
            publisher, audience, sequence = str(inner["job_id"]).split("|")
            key = (int(publisher), audience)
            self.seen[key].append(int(sequence))
            last = self._positions.get((key, int(sequence)))
            if last is not None and self._index - last <= DROPPED_WITHIN:
                self.repeats.append(f"{key} {sequence}, {self._index - last} events later")
            self._positions[key, int(sequence)] = self._index
            self._index += 1


@dataclass
class Verdict:
    expected: int = 0
    missing: list[str] = field(default_factory=list)
    duplicates: int = 0
    """Events that came again after a reconnect. The contract allows it in some cases."""
    duplicates_by_client: Counter[str] = field(default_factory=Counter)
    """Duplicates of each client, from bursts and from single events: this helps to find the cause."""
    disorder: list[str] = field(default_factory=list)
    other_audiences: list[str] = field(default_factory=list)
    repeats: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> list[str]:
        return [*self.missing, *self.disorder, *self.other_audiences, *self.repeats]


def _ranges(numbers: Sequence[int]) -> str:
    """The numbers as ranges, for example `3-7 9`."""
    known = set(numbers)
    first = [n for n in numbers if n - 1 not in known]
    last = [n for n in numbers if n + 1 not in known]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))


def judge(ledger: Ledger, clients: list[Client]) -> Verdict:
    verdict = Verdict()
    for name, client in enumerate(clients):
        since = client.expected_since
        verdict.repeats += [f"client {name} saw twice in one stream: {each}" for each in client.repeats]
        for key, began in ledger.began.items():
            seen = client.seen.get(key, [])
            if key[1] not in client.audiences:
                verdict.other_audiences += [f"client {name} saw {key} {number}" for number in seen]
                continue
            again = len(seen) - len(set(seen))
            verdict.duplicates += again
            verdict.duplicates_by_client[
                f"client {name}, {'bursts' if key[0] >= FIRST_BURST else 'single events'}"
            ] += again
            first = list(dict.fromkeys(seen))
            if first != sorted(first) and key[0] not in ledger.reordered:
                verdict.disorder.append(f"client {name} {key}: {first}")
            expected = {number for number, at in enumerate(began) if since is not None and at > since}
            verdict.expected += len(expected)
            lost = sorted(expected - set(seen))
            if lost:
                of = f"{len(lost)} of {len(expected)}"
                verdict.missing.append(
                    f"client {name} ({client.user}) {key}: {of}: {_ranges(lost)}; since {client.history[-1]}"
                )
    return verdict


async def wait_for_verdict(ledger: Ledger, clients: list[Client], seconds: float) -> Verdict:
    """Waits until the verdict is good, at most this long, and returns it."""
    deadline = time.monotonic() + seconds
    while True:
        verdict = judge(ledger, clients)
        if verdict.good or time.monotonic() > deadline:
            return verdict
        await asyncio.sleep(1)  # Between two checks.
