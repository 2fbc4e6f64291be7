"""The consuming side of a connection: deliveries go from the socket to a callback, without the library.

`deliveries.Deliveries` cuts deliveries out of a `ConsumingConnection` before the library reads it. A `Consumer` is one
channel of it. Knows nothing of events and streams.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, SupportsIndex, cast

import aio_pika
from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.connection import TransportFactory
from pamqp.common import FieldTable
from yarl import URL

from bridge import amqp
from bridge.service.broker.deliveries import HEARTBEAT, Deliveries, Sink

GATHER_SECONDS = 0.016
"""So long nothing is read from a connection after deliveries that came close behind others: no longer than a screen
shows one picture. An event that comes alone is not delayed."""

TALK_SECONDS = 0.1
"""So long after an answer of the broker's another may be awaited."""

ACK_SECONDS = 0.025
"""Acks wait this long for others of their channel to go with."""

MANY = 100
"""So many deliveries are acknowledged without waiting: half of a live queue's prefetch, so that none runs dry. A packet
of so many is large enough, and nothing is gathered behind it."""

LARGE_BYTES = 65_536
"""A packet of so many is large enough, too: of large events a packet holds few, and the broker has more of them."""

QUIET_SECONDS = 1.0
"""A connection that brings deliveries only shows the library a frame this often."""

_log = logging.getLogger("bridge.consumer")

Batch = AbstractContextManager[object]
"""Entered and left around the callbacks of all deliveries that come in one packet."""


class Consumer:
    """A channel that consumes: its deliveries go to a callback as they come from the socket, and are acknowledged.

    Acknowledged as soon as the callback returns: the live queue may lose, the log is what remembers.

    Made by `open`.
    """

    def __init__(self, deliveries: Deliveries, channel: AbstractChannel, on_message: Sink) -> None:
        self._deliveries = deliveries
        self._on_message = on_message
        self.channel = channel
        deliveries.take(channel.number, on_message)

    @classmethod
    async def open(cls, connection: aio_pika.abc.AbstractConnection, on_message: Sink, *, prefetch: int) -> Self:
        """
        Args:
            connection: a `ConsumingConnection`.
            on_message: called with the consumer's tag, the routing key, the body, and the offset if the queue is a
                stream. What it raises is logged, and the next message comes.
            prefetch: most deliveries that are on their way unacknowledged, for each consumer.

        Raises:
            amqp.BrokerError
        """
        assert isinstance(connection, ConsumingConnection), "only what was opened for consuming cuts out deliveries"
        channel = await amqp.open_channel(connection)
        async with amqp.translating("setting the prefetch"):
            await channel.basic_qos(prefetch_count=prefetch)
        return cls(connection.deliveries, channel, on_message)

    async def consume(self, queue: str, tag: str, *, arguments: FieldTable | None = None) -> None:
        """
        Raises:
            amqp.BrokerError: the channel is closed, by the broker or by the library.
        """
        try:
            async with amqp.translating(f"consuming {queue!r}"):
                await self.channel.basic_consume(queue, _unexpected, consumer_tag=tag, arguments=arguments)
        except BaseException:
            self.stop()  # Also when cancelled: the library has closed the channel then.
            raise

    def stop(self) -> None:
        """No more, and no ack either: to be called before the channel is closed."""
        self._deliveries.drop(self.channel.number, self._on_message)


async def _unexpected(message: DeliveredMessage) -> None:
    raise AssertionError(f"a delivery came through the library: {message.delivery!r}")


class _Reader(asyncio.StreamReader):
    """What the library reads of a connection: everything but deliveries.

    While deliveries come close upon each other, nothing is read for a moment after each packet, so that the next one
    brings all that came meanwhile. To be woken costs a process more than the event that it was woken for: it comes
    back to caches that others have filled (figures in docs/decisions/07).
    """

    def __init__(self, deliveries: Deliveries, write_batch: Batch) -> None:
        super().__init__()
        self._deliveries = deliveries
        self._write_batch = write_batch
        self._clock = asyncio.get_running_loop()
        self._passed_at = self._answered_at = self._delivered_at = self._acked_at = 0.0
        self._gathering = False
        self._ack_timer: asyncio.TimerHandle | None = None
        self.writer: asyncio.StreamWriter

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        deliveries = self._deliveries
        before = deliveries.unacked
        packet = bytes(data)
        with self._write_batch:
            passed = deliveries.feed(packet)
        now = self._clock.time()
        if deliveries.faults:
            self._tell_faults()
        if passed:
            self._answered_at = self._passed_at = now
        elif deliveries.takes and now - self._passed_at > QUIET_SECONDS:
            # The library takes a connection for dead on which it reads nothing, and a busy one has no heartbeats.
            passed = HEARTBEAT
            self._passed_at = now
        if deliveries.unacked != before:
            self._delivered(now, deliveries.unacked - before, len(packet))
        if passed:
            super().feed_data(passed)

    def _delivered(self, now: float, count: int, size: int) -> None:
        busy = now - self._delivered_at < 2 * GATHER_SECONDS
        # Queues are being made, one question after the other: who waits for the answers must not wait for us too.
        in_talk = now - self._answered_at < TALK_SECONDS
        is_small = count < MANY and size < LARGE_BYTES
        if busy and not in_talk and is_small and not self._gathering:
            self._gathering = True
            cast("asyncio.Transport", self.writer.transport).pause_reading()
            self._clock.call_later(GATHER_SECONDS, self._go_on)
        self._delivered_at = now
        if self._deliveries.unacked >= MANY or now - self._acked_at >= ACK_SECONDS:
            self._ack()
        elif self._ack_timer is None:
            self._ack_timer = self._clock.call_later(ACK_SECONDS, self._ack)

    def _go_on(self) -> None:
        self._gathering = False
        if not self.writer.is_closing():
            cast("asyncio.Transport", self.writer.transport).resume_reading()

    def _ack(self) -> None:
        """One write for all that came meanwhile, on all channels."""
        self._acked_at = self._clock.time()
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        acks = self._deliveries.take_acks()
        if acks and not self.writer.is_closing():
            self.writer.write(acks)

    def _tell_faults(self) -> None:
        for fault in self._deliveries.faults:
            _log.error("a delivery was not taken", exc_info=fault)
        self._deliveries.faults.clear()


class _Transport(TransportFactory):
    def __init__(self, write_batch: Batch, max_body: int) -> None:
        self._write_batch = write_batch
        self.deliveries = Deliveries(max_body=max_body)

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = await kwargs.pop("ssl_context_provider").get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        reader = _Reader(self.deliveries, self._write_batch)
        protocol = asyncio.StreamReaderProtocol(reader)
        assert url.host is not None, "parse_urls wants a host"
        port = url.port or (5671 if context else 5672)
        transport, _ = await loop.create_connection(lambda: protocol, url.host, port, ssl=context)
        reader.writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return reader, reader.writer


class ConsumingConnection(amqp.Connection):
    """One whose deliveries are cut out before the library reads them, so that none can break it."""

    @classmethod
    async def open(cls, addresses: Sequence[str], *, name: str, write_batch: Batch, max_body: int) -> Self:
        """As `amqp.connect`, which says what the arguments are and what is raised.

        Properties of messages are not read, so that none that anybody published can break the connection.

        Args:
            write_batch: entered and left around the callbacks of all deliveries that come in one packet.
            max_body: larger bodies are not gathered; callbacks get a `Cut`.

        Raises:
            amqp.BrokerError
        """
        connection = await amqp.connect(addresses, name=name, make=lambda url: cls(url, write_batch, max_body))
        assert isinstance(connection, cls), "made just above"
        return connection

    def __init__(self, url: URL, write_batch: Batch, max_body: int) -> None:
        super().__init__(url)
        transport = _Transport(write_batch, max_body)
        self.deliveries = transport.deliveries
        # aio_pika passes on what it knows from a URL, and this is of aiormq only.
        self.kwargs["transport_factory"] = transport
