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
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import structlog

from bridge import amqp
from bridge.amqp import AccessRefused, BrokerError, BrokerUnavailable, NotFound, TopologyMismatch
from bridge.service.broker import topology
from bridge.service.broker.consumer import Batch, ConsumingConnection
from bridge.service.broker.deliveries import MAX_BODY_BYTES
from bridge.service.broker.eventlog import LogConsumer
from bridge.service.broker.live import (
    EXCHANGE_CHECK_SECONDS,
    REPLICAS_EXCHANGE,
    STEADY_SECONDS,
    Deletion,
    OnWatermark,
    Outage,
    log_differences,
    report_deletion,
    warn_not_notified,
)
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

OnLogged = Callable[[Callable[[], Anchor], str, bytes], None]
"""Called with each entry: a function that names it, its routing key, its body. It must not raise."""


class Log(Protocol):
    """What the reader needs of `EventLog`."""

    async def newest(self) -> Anchor: ...
    def write_watermark(self, on_written: Callable[[Anchor | None, int], None]) -> None: ...


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


class Tail:
    """
    Args:
        addresses: AMQP URLs of the cluster's nodes.
        exchange, quarantine, log_stream: the topology, declared with every new connection.
        log: finds the newest entry at the start.
        on_logged: called with each entry.
        write_batch: entered and left around the callbacks of all entries of one packet.
        max_body: limit of a body in bytes; callbacks get a `Cut` of a larger one.
    """

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
        log_stream: LogSettings,
        log: Log,
        on_logged: OnLogged,
        write_batch: Batch,
        max_body: int = MAX_BODY_BYTES,
    ) -> None:
        self._addresses = addresses
        self._exchange = exchange
        self._quarantine = quarantine
        self._log_stream = log_stream
        self._log = log
        self._on_logged = on_logged
        self._write_batch = write_batch
        self._max_body = max_body
        self._instance = secrets.token_hex(4)
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
        self.down_since: float | None = time.monotonic()
        self._up_since = 0.0
        self.last_error: BrokerError | None = None
        self._outage = Outage()
        self.connects = 0
        self.exchanges_lost = 0
        self._deletion_to_report: float | None = None
        """When this process noticed a deletion of the exchange (monotonic), until it has notified the others."""

    @property
    def connected(self) -> bool:
        return self.down_since is None

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
            self._log.write_watermark(partial(self._on_written, on_found))
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
        next_pause = amqp.pauses()
        while True:
            try:
                async with self._connection() as connection:
                    await self._declare_topology(connection)
                    try:
                        await self._read(connection)
                    finally:
                        if self.connected and time.monotonic() - self._up_since > STEADY_SECONDS:
                            next_pause = amqp.pauses()
                        self._mark_lost()
            except BrokerError as error:
                self.last_error = error
                if self.connects == 0 and not isinstance(error, BrokerUnavailable):
                    raise
                self._outage.log(error)
            await asyncio.sleep(next_pause())

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aio_pika.abc.AbstractConnection]:
        connection = await ConsumingConnection.open(
            self._addresses,
            name=f"bridge {self._instance} log reader",
            write_batch=self._write_batch,
            max_body=self._max_body,
        )
        try:
            yield connection
        finally:
            await amqp.close(connection)

    async def _declare_topology(self, connection: aio_pika.abc.AbstractConnection) -> None:
        """Declares exchange, quarantine and log.

        Raises:
            BrokerError: names the difference or the missing right, and how to fix it.
        """
        log_differences("exchange", await topology.declare_exchange(connection, self._exchange))
        try:
            log_differences("quarantine", await topology.declare_quarantine(connection, self._quarantine))
        except NotFound as error:
            _log.error("no quarantine", error=str(error))
        log_differences("log", await topology.declare_log(connection, self._log_stream, self._exchange))
        if self._deletion_to_report is not None:
            await self._report_deletion(connection, time.monotonic() - self._deletion_to_report)
            self._deletion_to_report = None

    async def _report_deletion(self, connection: aio_pika.abc.AbstractConnection, age: float) -> None:
        try:
            async with amqp.translating(f"publishing to {REPLICAS_EXCHANGE!r}"):
                channel = await amqp.open_channel(connection)
                await channel.exchange_declare(REPLICAS_EXCHANGE, exchange_type="fanout", durable=True)
                await report_deletion(channel, Deletion(self._exchange, self._instance, age), self._log_stream)
                await channel.close()
        except (AccessRefused, TopologyMismatch) as error:
            warn_not_notified(error)

    async def _read(self, connection: aio_pika.abc.AbstractConnection) -> None:
        """Reads from the position on, until the connection is lost.

        Raises:
            BrokerError: the reader is lost, the exchange is gone, or the log does not answer.
        """
        position = self.reached
        if position is None:
            position = await self._find_start()
        self._broken = None
        changed = asyncio.Event()
        expects = position

        def on_entry(offset: int, routing_key: str, body: bytes) -> None:
            nonlocal expects
            if expects is not None:
                if Anchor(offset, digest(body)) == expects:
                    self._last, self._anchor = (offset, body), expects
                    self._mark_connected(connection)
                else:
                    self._broken = f"entry {expects.offset} is gone, or is another one; the log begins with {offset}"
                expects = None
                changed.set()
                return
            if self._broken is not None:
                return
            self._last, self._anchor = (offset, body), None
            if self._waiting:
                self._answer_waiting(offset)
            if routing_key == self._log_stream.name:
                # The bridge's own entry: a watermark, or the news of a deletion.
                news = Deletion.parse(body)
                if news is not None and news.exchange == self._exchange and news.instance != self._instance:
                    self._broken = f"replica {news.instance:.20} reports that the exchange was deleted"
                    changed.set()
                return
            self._on_logged(self._name_last, routing_key, body)

        start = "first" if position is None else position.offset
        async with LogConsumer(connection, self._log_stream.name, start, on_entry, changed.set) as consumer:
            if position is None:
                self._mark_connected(connection)
            else:
                await self._verify(consumer, position, changed)
            self._stop_if_broken()
            changed.clear()
            while True:
                await consumer.idle(EXCHANGE_CHECK_SECONDS, changed)
                self._stop_if_broken()
                # The exchange may have been deleted, and the log's binding with it. Repeating the binding changes
                # nothing. RabbitMQ notifies no client.
                await self._check_binding(connection)

    def _stop_if_broken(self) -> None:
        if self._broken is not None:
            self._forget_position(self._broken)
            raise BrokerUnavailable(f"the log does not continue where it was read to: {self._broken}")

    async def _verify(self, consumer: LogConsumer, position: Anchor, changed: asyncio.Event) -> None:
        """Waits for the entry at the position. In a log that was made again it never arrives."""
        deadline = time.monotonic() + VERIFY_SECONDS
        while not changed.is_set():
            await consumer.idle(LOOK_SECONDS, changed)
            if changed.is_set():
                return
            try:
                newest: Anchor | None = await self._log.newest()
            except BrokerUnavailable:
                newest = None
            if newest is None or newest.offset < position.offset:
                self._broken = f"entry {position.offset} is gone; the newest is {newest and newest.offset}"
                return
            if time.monotonic() > deadline:
                self._broken = f"entry {position.offset} did not arrive within {VERIFY_SECONDS:g} s"
                return

    def _name_last(self) -> Anchor:
        anchor = self.reached
        assert anchor is not None, "an entry has just been read"
        return anchor

    async def _check_binding(self, connection: aio_pika.abc.AbstractConnection) -> None:
        try:
            async with amqp.translating(f"checking that exchange {self._exchange!r} exists"):
                channel = await amqp.open_channel(connection)
                await channel.queue_bind(self._log_stream.name, self._exchange, "#")
                await channel.close()
        except AccessRefused:
            pass  # The bridge's user may not bind the log; an operator has.
        except NotFound as error:
            self._forget_position(str(error))
            self._deletion_to_report = time.monotonic()
            raise BrokerUnavailable(f"the exchange is gone, and the log's binding with it: {error}") from error

    async def _find_start(self) -> Anchor | None:
        """The newest entry of the log. After an interruption, and in an empty log, an entry that is written now: a
        client whose position is the newest entry of before may have missed events. None: the log has no entry, and the
        bridge may not write one."""
        newest: Anchor | None = None
        try:
            newest = await self._log.newest()
        except BrokerUnavailable as error:
            _log.info("the log is empty", error=str(error))
        if newest is not None and not self.exchanges_lost:
            return newest
        written: asyncio.Future[Anchor | None] = asyncio.get_running_loop().create_future()

        def on_written(anchor: Anchor | None, _: int) -> None:
            if not written.done():
                written.set_result(anchor)

        self._log.write_watermark(on_written)
        return await written or newest

    def _forget_position(self, why: str) -> None:
        """The log does not have everything after the position: the streams are sent a gap."""
        _log.error("the log was interrupted", detail=f"{why}. All streams are sent a gap")
        self._mark_lost()
        self._last = self._anchor = None
        self.exchanges_lost += 1

    def _mark_connected(self, connection: aio_pika.abc.AbstractConnection) -> None:
        self.connects += 1
        away = None if self.connects == 1 or self.down_since is None else round(time.monotonic() - self.down_since, 3)
        self.down_since = None
        self._up_since = time.monotonic()
        self.last_error = None
        self._outage = Outage()
        _log.info(
            "broker connected",
            address=amqp.address(connection),
            exchange=self._exchange,
            streams=len(self._subscriptions),
            away_seconds=away,
        )
        for subscription in list(self._subscriptions.values()):
            subscription.bind()

    def _mark_lost(self) -> None:
        self._waiting = []  # These streams are bound again later.
        if self.down_since is None:
            self.down_since = time.monotonic()
        for subscription in list(self._subscriptions.values()):
            if subscription.bound:
                subscription.bound = False
                subscription.on_lost()
