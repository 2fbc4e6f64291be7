"""The feed `log`: reads the event log at its end, once for all streams of the process.

One consumer gets every entry in the log's order, and the hub hands each to the streams whose audience it is. There is
one order and one position, so nothing has to be joined: a stream that resumes reads the log up to this position, and
gets each later entry from this consumer. Opening a stream costs RabbitMQ nothing.

After a loss of the connection the reader continues with the last entry that it has read. If the log no longer has that
entry, or has another one in its place, events may be missing: the streams are sent a gap.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import structlog

from bridge import amqp
from bridge.amqp import AccessRefused, BrokerError, BrokerUnavailable, NotFound, TopologyMismatch
from bridge.service.broker.consumer import Batch
from bridge.service.broker.deliveries import MAX_BODY_BYTES
from bridge.service.broker.eventlog import LogConsumer, OnWatermark
from bridge.service.broker.feed import EXCHANGE_CHECK_SECONDS, REPLICAS_EXCHANGE, ConsumingFeed, Deletion
from bridge.service.settings import LogSettings
from bridge.service.streams.cursor import Anchor, digest

if TYPE_CHECKING:
    import aio_pika

LOOK_SECONDS = 0.5
"""If the entry that the reader continues with has not arrived by then, the reader looks for the newest one. RabbitMQ
sends an entry that it has at once."""

VERIFY_SECONDS = 10.0
"""Limit of the wait for that entry."""

_log = structlog.get_logger("bridge.tail")

OnLogged = Callable[[int, str, bytes], None]
"""Called with each entry: its offset, its routing key and its body. It must not raise."""


class Log(Protocol):
    """What the reader needs of `EventLog`."""

    async def newest(self) -> Anchor: ...
    def write_watermark(self, on_written: OnWatermark) -> None: ...


class TailSubscription:
    """One stream, as the feed knows it."""

    __slots__ = ("_tail", "bound", "number", "on_bound", "on_lost", "wanted")

    queue = ""
    """No stream has a queue of its own."""

    def __init__(self, tail: Tail, number: int, on_bound: Callable[[], None], on_lost: Callable[[], None]) -> None:
        self._tail = tail
        self.number = number
        self.on_bound = on_bound
        self.on_lost = on_lost
        self.bound = False
        self.wanted = True

    def close(self) -> None:
        if self.wanted:
            self.wanted = False
            self.bound = False
            self._tail.drop(self)

    def bind(self) -> None:
        """Reports that the stream gets every entry after the feed's position."""
        if self.wanted and not self.bound and self._tail.connected:
            self.bound = True
            self.on_bound()


class Tail(ConsumingFeed):
    """
    Args:
        log: the stream to read.
        event_log: writes entries, and finds the newest one.
        on_logged: called with each entry.
        Others: see `ConsumingFeed`.
    """

    needs_log = True
    overlaps = False
    has_dropped = False
    shared_queue: str | None = None
    dropped = 0
    refused = 0

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        exchange: str,
        quarantine: str,
        log: LogSettings,
        event_log: Log,
        on_logged: OnLogged,
        write_batch: Batch,
        fleet_key: bytes,
        max_body: int = MAX_BODY_BYTES,
    ) -> None:
        super().__init__(
            addresses,
            exchange=exchange,
            quarantine=quarantine,
            log=log,
            write_batch=write_batch,
            fleet_key=fleet_key,
            max_body=max_body,
        )
        self._stream = log.name
        self._event_log = event_log
        self._on_logged = on_logged
        self._numbers = itertools.count(1)
        self._subscriptions: dict[int, TailSubscription] = {}
        self._last: tuple[int, bytes] | None = None
        """The offset and the body of the last entry that was read."""
        self._anchor: Anchor | None = None
        """The same as a position; None until it is asked for. A digest of each entry would cost more than its
        reading."""
        self._waiting: list[tuple[int, OnWatermark]] = []
        """Streams that resume, each with the entry that must be read first."""
        self._broken: str | None = None
        """Why the log does not continue after the last entry."""
        self._may_bind = True
        """Whether the bridge's user may bind the log to the exchange, and so check that both exist."""

    @property
    def reached(self) -> Anchor | None:
        """The last entry that was read."""
        if self._anchor is None and self._last is not None:
            self._anchor = Anchor(self._last[0], digest(self._last[1]))
        return self._anchor

    def find_position(self, on_found: OnWatermark, *, resumes: bool) -> None:
        """Calls back with the last entry that was read: each entry after it goes to the hub.

        Another process may be ahead of this one, and have sent what this one has not read yet. So for a client with a
        cursor an entry is written, and the answer waits until it has been read.
        """
        if resumes:
            self._event_log.write_watermark(partial(self._on_written, on_found))
        else:
            self._answer(on_found)

    def _answer(self, on_found: OnWatermark) -> None:
        on_found(self.reached, time.time_ns() // 1_000_000)

    def _on_written(self, on_found: OnWatermark, anchor: Anchor | None, _: int) -> None:
        if anchor is None or (self._last is not None and anchor.offset <= self._last[0]):
            self._answer(on_found)
        else:
            self._waiting.append((anchor.offset, on_found))

    def _answer_waiting(self, offset: int) -> None:
        due = [on_found for until, on_found in self._waiting if until <= offset]
        self._waiting = [each for each in self._waiting if each[0] > offset]
        for on_found in due:
            self._answer(on_found)

    def subscribe(
        self,
        keys: Sequence[str],
        groups: Sequence[str],
        *,
        on_delivery: Callable[[str, bytes], None],
        on_bound: Callable[[], None],
        on_lost: Callable[[], None],
        on_refused: Callable[[], None],
    ) -> TailSubscription:
        """Registers a stream. Only `on_bound` and `on_lost` are called, and never inside this call."""
        subscription = TailSubscription(self, next(self._numbers), on_bound, on_lost)
        self._subscriptions[subscription.number] = subscription
        if self.connected:
            asyncio.get_running_loop().call_soon(subscription.bind)
        return subscription

    def drop(self, subscription: TailSubscription) -> None:
        """For `TailSubscription.close`, once for each subscription."""
        del self._subscriptions[subscription.number]

    # The reader.

    async def run(self) -> None:
        """Reads until it is cancelled. Waits for a broker that cannot be reached. Cancelling it closes the connection.

        Raises:
            AccessRefused, TopologyMismatch, NotFound: with the first connection only: waiting does not fix it.
        """
        next_pause = amqp.pauses(amqp.RECONNECT_SECONDS)
        while True:
            try:
                async with self._connection() as connection:
                    await self.declare_topology(connection)
                    await self._report_deletion(connection)
                    try:
                        await amqp.while_open(connection, self._read(connection))
                    finally:
                        if self._was_steady:
                            next_pause = amqp.pauses(amqp.RECONNECT_SECONDS)
                        self._lose_streams()
            except BrokerError as error:
                self.last_error = error
                if self.connects == 0 and not isinstance(error, BrokerUnavailable):
                    raise
                self._outage.log(error)
            await asyncio.sleep(next_pause())

    async def _report_deletion(self, connection: aio_pika.abc.AbstractConnection) -> None:
        if self.deletion_to_report is None:
            return
        try:
            async with amqp.translating(f"publishing to {REPLICAS_EXCHANGE!r}"):
                channel = await amqp.open_channel(connection)
                await channel.exchange_declare(REPLICAS_EXCHANGE, exchange_type="fanout", durable=True)
                await self.report_deletion(channel)
                await channel.close()
        except (AccessRefused, TopologyMismatch) as error:
            self.warn_not_notified(error)

    async def _read(self, connection: aio_pika.abc.AbstractConnection) -> None:
        """Reads from the position on, until the connection is lost.

        Raises:
            BrokerError: the reader is lost, the exchange is gone, or the log does not answer.
        """
        position = self.reached or await self._find_start()
        self._broken = None
        self._may_bind = True
        changed = asyncio.Event()
        expects = position

        def on_entry(offset: int, routing_key: str, body: bytes) -> None:
            nonlocal expects
            if self._broken is not None:
                return
            if expects is not None:
                if Anchor(offset, digest(body)) == expects:
                    self._last, self._anchor = (offset, body), expects
                    self._gain_streams(connection)
                else:
                    self._interrupt(f"entry {expects.offset} is gone, or is another one; the log begins with {offset}")
                expects = None
                changed.set()
                return
            self._last, self._anchor = (offset, body), None
            if routing_key != self._stream:
                self._on_logged(offset, routing_key, body)
            elif self._is_news(body):
                changed.set()
            if self._waiting:
                self._answer_waiting(offset)

        start = "first" if position is None else position.offset
        async with LogConsumer(connection, self._stream, start, on_entry, changed.set) as consumer:
            if position is None:
                self._gain_streams(connection)
            else:
                await self._verify(consumer, position, changed)
            self._stop_if_broken()
            changed.clear()
            while True:
                await consumer.idle(EXCHANGE_CHECK_SECONDS, changed)
                self._stop_if_broken()
                if self._may_bind:
                    await self._check_binding(connection)

    def _is_news(self, body: bytes) -> bool:
        """Whether an entry of the bridge's own is the news of a deletion, and not a watermark."""
        news = Deletion.parse(body, self.fleet_key)
        # However old it is: what was published between the deletion and this entry may be missing.
        if news is None or not news.concerns(self.exchange, self.instance, math.inf):
            return False
        self._note_deletion(noticed_here=False)
        self._broken = f"replica {news.instance:.20} reports that the exchange was deleted"
        return True

    def _interrupt(self, why: str) -> None:
        """The log does not continue after the last entry that was read."""
        self.exchanges_lost += 1
        self._broken = why

    def _stop_if_broken(self) -> None:
        """Forgets the position if events may be missing after it: the streams are sent a gap."""
        if self._broken is not None:
            _log.error("the log was interrupted", detail=f"{self._broken}. All streams are sent a gap")
            self._lose_streams()
            self._last = self._anchor = None
            raise BrokerUnavailable(f"the log was interrupted: {self._broken}")

    async def _verify(self, consumer: LogConsumer, position: Anchor, changed: asyncio.Event) -> None:
        """Waits for the entry at the position. In a log that was made again it never arrives.

        An entry that is written now tells the two apart: it is after the position, unless the log is a new one. The
        newest entry of this node would not: in a cluster the node may be behind.
        """
        deadline = time.monotonic() + VERIFY_SECONDS
        while not changed.is_set():
            await consumer.idle(LOOK_SECONDS, changed)
            if changed.is_set():
                return
            written = await self._write_entry()
            if written is not None and written.offset < position.offset and not changed.is_set():
                self._interrupt(f"entry {position.offset} is gone, and the newest is {written.offset}")
                return
            if time.monotonic() > deadline and not changed.is_set():
                self._interrupt(f"entry {position.offset} did not arrive within {VERIFY_SECONDS:g} s")
                return

    async def _check_binding(self, connection: aio_pika.abc.AbstractConnection) -> None:
        """The exchange may have been deleted, and the log's binding with it. To repeat the binding changes nothing."""
        try:
            async with amqp.translating(f"checking that exchange {self.exchange!r} exists"):
                channel = await amqp.open_channel(connection)
                await channel.queue_bind(self._stream, self.exchange, "#")
                await channel.close()
        except AccessRefused:
            self._may_bind = False  # An operator has bound the log. RabbitMQ would log an error for each check.
        except NotFound as error:
            self._note_deletion(noticed_here=True)
            self._broken = f"the exchange is gone, and the log's binding with it: {error}"
            self._stop_if_broken()

    async def _find_start(self) -> Anchor | None:
        """The newest entry of the log. After an interruption, and in an empty log, an entry that is written now: a
        client whose position is the newest entry of before may have missed events. None: the log has no entry, and the
        bridge may not write one."""
        newest: Anchor | None = None
        try:
            newest = await self._event_log.newest()
        except BrokerUnavailable as error:
            _log.info("newest entry not found", reason=str(error))
        if newest is not None and not self.exchanges_lost:
            return newest
        return await self._write_entry() or newest

    async def _write_entry(self) -> Anchor | None:
        """An entry that is written to the log now; None if the log does not answer, or the bridge may not write."""
        written: asyncio.Future[Anchor | None] = asyncio.get_running_loop().create_future()

        def on_written(anchor: Anchor | None, _: int) -> None:
            if not written.done():
                written.set_result(anchor)

        self._event_log.write_watermark(on_written)
        return await written

    def _gain_streams(self, connection: aio_pika.abc.AbstractConnection) -> None:
        self.connects += 1
        self._mark_up(connection, len(self._subscriptions))
        for subscription in list(self._subscriptions.values()):
            subscription.bind()

    def _lose_streams(self) -> None:
        self._mark_down()
        self._waiting = []  # These streams are bound again later.
        for subscription in list(self._subscriptions.values()):
            if subscription.bound:
                subscription.bound = False
                subscription.on_lost()
