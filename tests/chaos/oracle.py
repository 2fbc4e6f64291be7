"""Publishers that number what they publish, clients that note what they see, and the comparison of the two.

The clients are an EventSource's logic over a plain socket, with a decoder of their own: they come back with the last id
that they saw, to any replica, after the pause that they were told.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bridge import Audience, Publisher, PublishError
from bridge.event import EventData
from bridge.samples.jobs import JobProgress
from tests.client import Stream
from tests.service import mint

Key = tuple[int, str]
"""Publisher and audience: events of one key come in order."""


@dataclass
class Ledger:
    """What was confirmed: for each key, when the publishing of each number began."""

    began: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    confirmed: int = 0
    retries: int = 0


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
        self.phantoms = 0

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
                replica.public, mint(self.user, *self.groups), headers=headers, receive_buffer=16_384
            )
            try:
                await stream.open()
                self.connects += 1
                while stream.status == 200:
                    await self._stalled.wait()
                    frame = await stream.next(seconds=60)
                    retry = frame.retry / 1000 if frame.retry is not None else retry
                    self.last_id = frame.id  # By the letter: a block without an id would empty it on a new stream.
                    self._note(frame.event, frame.json)
            except (OSError, EOFError, ValueError, IndexError, asyncio.IncompleteReadError, TimeoutError):
                pass  # However it broke, it comes back.
            finally:
                self.phantoms += len(stream.decoder.phantoms)
                stream.abort()
            self._left_at = self._left_at or time.monotonic()
            await asyncio.sleep(min(retry, self._longest_pause))  # The pause that the bridge told.

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
            self.seen[int(publisher), audience].append(int(sequence))


@dataclass
class Verdict:
    owed: int = 0
    missing: list[str] = field(default_factory=list)
    duplicates: int = 0
    disorder: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.missing or self.disorder or self.strangers)


def judge(ledger: Ledger, clients: list[Client]) -> Verdict:
    verdict = Verdict()
    for name, client in enumerate(clients):
        since = client.owed_since
        for key, began in ledger.began.items():
            seen = client.seen.get(key, [])
            if key[1] not in client.audiences:
                verdict.strangers += [f"client {name} saw {key} {number}" for number in seen]
                continue
            verdict.duplicates += len(seen) - len(set(seen))
            first = list(dict.fromkeys(seen))
            if first != sorted(first):
                verdict.disorder.append(f"client {name} {key}: {first}")
            owed = {number for number, at in enumerate(began) if since is not None and at > since}
            verdict.owed += len(owed)
            lost = sorted(owed - set(seen))
            if lost:
                verdict.missing.append(f"client {name} ({client.user}) {key}: {lost}")
    return verdict
